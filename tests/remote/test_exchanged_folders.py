"""A folder behind a URL that is exchanged as a whole between two answers: never a part of each."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_server import Asked, Client, FaultServer, answer
from safetensors.torch import load
from tiny_loaders import fails
from user_loads import at, contents, loader, version_of, written
from web_folder import CONFIG, WEIGHTS, Folder, name_of

from lorax_async import AdapterHandle, AdapterLoader, errors

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

LAYERS = 2
Files = dict[str, bytes]
Flip = Callable[["Exchanged", str], None]


@dataclass
class Exchanged(Folder):
    """One of two folders at a time. `before` and `after` each answer may exchange them."""

    versions: list[Files] = field(default_factory=list)
    now: int = 0
    etags: bool = True
    before: Flip = lambda _, __: None
    after: Flip = lambda _, __: None
    answered: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, asked: Asked, client: Client) -> None:
        self.asked.append(asked)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = name_of(asked)
        self.before(self, name)
        with self.changed:
            number = self.now
            self.answered.append(name)
            self.after(self, name)
            self.changed.notify_all()
        data = self.versions[number][name]
        answer(asked, client, data, *([f'ETag: "{number}-{name}"'] if self.etags else []))

    def exchange(self) -> None:
        self.now = 1 - self.now

    def wait_for(self, name: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: name in self.answered, 20)


@dataclass
class World:
    origin: Exchanged
    server: FaultServer
    folder: Path

    def loader(self, name: str = "cache", **settings: object) -> AdapterLoader:
        given: dict[str, object] = {"revalidate": 0, "allow": (at(self.server.netloc),)}
        return loader(self.folder / name, layers=LAYERS, **{**given, **settings})

    @property
    def id(self) -> str:
        return self.server.url("/adapter/")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Two adapters of other weights, ranks and scales; all comes with the first answers."""
    folders = [written(tmp_path / str(n), n, layers=LAYERS, rank=r) for n, r in ((0, 8), (1, 8))]
    versions = [contents(folder) for folder in folders]
    config = json.loads(versions[1][CONFIG])
    versions[1][CONFIG] = json.dumps(config | {"lora_alpha": 9, "x": None}).encode()
    origin = Exchanged({}, versions=versions)
    with FaultServer(b"", origin) as server:
        yield World(origin, server, tmp_path)


def held(origin: Exchanged, handle: AdapterHandle) -> tuple[int, int]:
    """Of which folder the config is, and the weights."""
    (scale,) = {module.scale for module in handle.modules.values()}
    name, module = next(iter(handle.modules.items()))
    tensors = [
        load(files[WEIGHTS])[f"base_model.model.{name}.lora_A.weight"] for files in origin.versions
    ]
    (weights,) = [n for n, tensor in enumerate(tensors) if torch.equal(tensor, module.a)]
    rank = tensors[0].shape[0]
    return [8 / rank, 9 / rank].index(scale), weights


def once(first: str, second: str) -> dict[str, Any]:
    """Exchange them between the first answers for two files, in this order."""

    def before(origin: Exchanged, name: str) -> None:
        if name == second:
            origin.wait_for(first)

    def after(origin: Exchanged, name: str) -> None:
        if name == first and origin.answered.count(first) == 1:
            origin.exchange()

    return {"before": before, "after": after}


@pytest.mark.parametrize("etags", [True, False], ids=["etags", "no etags"])
@pytest.mark.parametrize("first", [CONFIG, WEIGHTS])
async def test_what_was_exchanged_between_two_first_answers_is_taken_again(
    world: World, first: str, etags: bool
) -> None:
    second = {CONFIG: WEIGHTS, WEIGHTS: CONFIG}[first]
    origin = world.origin
    origin.etags = etags
    for name, value in once(first, second).items():
        setattr(origin, name, value)
    async with world.loader() as there:
        async with await there.load(world.id) as handle:
            assert held(origin, handle) == (1, 1)
            version = version_of(handle)
        async with await there.load(world.id) as handle:
            assert version_of(handle) == version
    async with world.loader("plain") as there, await there.load(world.id) as handle:
        assert version_of(handle) == version  # the one that is there at rest


@pytest.mark.parametrize("first", [CONFIG, WEIGHTS])
async def test_a_fetched_folder_is_of_one_version(world: World, first: str) -> None:
    for name, value in once(first, {CONFIG: WEIGHTS, WEIGHTS: CONFIG}[first]).items():
        setattr(world.origin, name, value)
    async with world.loader() as there:
        with await there.fetch(world.id) as folder:
            found = {name: (folder.path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    assert found == world.origin.versions[1]


async def test_config_and_weights_of_two_versions_need_not_fit(world: World) -> None:
    """Their ranks differ: what is refused is the mixture, and neither of the two."""
    world.origin.versions[1] = contents(written(world.folder / "2", 2, layers=LAYERS, rank=4))
    for name, value in once(CONFIG, WEIGHTS).items():
        setattr(world.origin, name, value)
    async with world.loader() as there, await there.load(world.id) as handle:
        assert {module.a.shape[0] for module in handle.modules.values()} == {4}


@pytest.mark.parametrize("moment", range(9))
async def test_exchanged_at_any_answer(world: World, moment: int) -> None:
    """Two first answers, two after them, two at the end; and those of the next attempt."""
    origin = world.origin

    def after(origin: Exchanged, _: str) -> None:
        if len(origin.answered) == moment:
            origin.exchange()

    origin.after = after
    async with world.loader() as there, await there.load(world.id) as handle:
        config, weights = held(origin, handle)
        assert config == weights


async def test_a_folder_that_is_always_exchanged_is_an_error(world: World) -> None:
    def after(origin: Exchanged, name: str) -> None:
        if name == CONFIG:
            origin.exchange()

    world.origin.after = after
    async with world.loader() as there:
        error = await fails(there.load(world.id), errors.IntegrityError, "replaced while they were")
        assert error.retryable
        world.origin.after = lambda _, __: None
        async with await there.load(world.id) as handle:
            assert held(world.origin, handle) == (world.origin.now,) * 2
