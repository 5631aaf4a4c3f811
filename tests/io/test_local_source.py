"""Local folders: who may name them, and what may lie in them."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import uvloop
from local_world import CONFIG_NAME, LIMITS, WEIGHTS_NAME, LocalWorld, nothing_left_open, refusal
from source_conformance import Run, SourceConformance, T

from lorax_async import errors
from lorax_async.adapter import AdapterRef
from lorax_async.io.sources import local_folder
from lorax_async.io.sources.local import LocalSource

COMMIT, BLOB = "c" * 40, "b" * 64


class NoThreads(ThreadPoolExecutor):
    """The default executor of the loop, which is not ours to use."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the default executor was used")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run(main: Coroutine[Any, Any, T]) -> T:
        new_loop: Callable[[], asyncio.AbstractEventLoop] = request.param
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.get_loop().set_default_executor(NoThreads())
            return runner.run(main)

    return run


class TestConformance(SourceConformance):
    pass


def test_every_spelling_of_a_folder_gives_one_key(world: LocalWorld, run: Run) -> None:
    folder = world.fill(world.roots[1] / "o rg" / "ü")
    (world.roots[0] / "link").symlink_to(folder)
    spellings: list[AdapterRef] = [
        AdapterRef(folder),
        AdapterRef(Path(os.path.relpath(folder))),
        AdapterRef(folder, source="local", token="t"),
        AdapterRef(str(folder)),
        AdapterRef(f"{folder}/"),
        AdapterRef(f"{folder}/../ü"),
        AdapterRef("./o rg/ü"),
        AdapterRef("./link"),
        AdapterRef("o rg/ü", source="local"),
        AdapterRef(folder.as_uri()),
        AdapterRef("FILE:" + folder.as_uri()[7:]),
        AdapterRef("file://localhost" + folder.as_uri()[7:]),
    ]

    async def main() -> None:
        keys = {await world.source.resolve(ref) for ref in spellings}
        assert [key.location for key in keys] == [str(folder)]

    run(main())


def test_the_first_root_that_has_a_folder_wins(world: LocalWorld, run: Run) -> None:
    for root in world.roots:
        world.fill(root / "both")
    key = run(world.source.resolve(AdapterRef("./both")))
    assert key.location == str(world.roots[0] / "both")


def test_a_root_may_be_a_link_that_is_moved(tmp_path: Path, world: LocalWorld, run: Run) -> None:
    for version in ("v1", "v2"):
        world.fill(tmp_path / version / "one")
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "v1")
    with ThreadPoolExecutor(1) as threads:
        source = LocalSource(roots=[current], limits=LIMITS, threads=threads)
        for version in ("v1", "v2"):
            current.unlink()
            current.symlink_to(tmp_path / version)
            key = run(source.resolve(AdapterRef(f"{current}/one")))
            assert key.location == str(tmp_path / version / "one")


@pytest.mark.parametrize(
    "ref",
    [
        *map(AdapterRef, ["org/name", "name", "s3://b/k", "hf://org/name", "https://h/x", "~/x"]),
        AdapterRef("org/name", source="hub"),
        AdapterRef("/a/b", source="s3"),
        AdapterRef(Path("/a/b"), source="hub"),
        AdapterRef("s3://b/k", source="local"),
    ],
)
def test_no_other_source_is_asked(world: LocalWorld, ref: AdapterRef) -> None:
    """What is no id says why; what names another place says that this source has folders only."""
    error = refusal(world, ref)
    assert type(error) is errors.InvalidAdapterIdError
    assert len(error.problem) > 40


@pytest.mark.parametrize(
    "id", ["org/name", "s3://buc/k", "https://h/x", "gs://buc/k", "az://con/k"]
)
def test_another_source_is_said_to_be_one(world: LocalWorld, id: str) -> None:
    error = refusal(world, id)
    assert re.search(r"only local folders.*local_roots", error.problem)


@pytest.mark.parametrize("id", ["./one", Path("one")])
def test_a_folder_has_no_revision(world: LocalWorld, id: str | Path) -> None:
    error = refusal(world, AdapterRef(id, revision="main"))
    assert type(error) is errors.InvalidAdapterIdError
    assert "revision" in error.problem


@pytest.mark.parametrize(
    "id",
    ["", "./a\0b", "./a\nb", "./a\x7fb", "./\x85", "./\ud800", "/" + "a" * 4096, Path("a\0b")]
    + ["file:", "file:one", "file://host/a", "file:///a%00b", "file:///a%0ab", "file:///%ff"]
    + ["file:///a?b", "file:///a#b", "file:///a%zz"],
)
def test_what_is_no_id_is_refused(world: LocalWorld, id: Any) -> None:
    assert type(refusal(world, AdapterRef(id))) is errors.InvalidAdapterIdError


@pytest.mark.parametrize("id", [b"/a", 7, None, ["a"]])
def test_what_is_neither_text_nor_path_is_no_ref(id: Any) -> None:
    with pytest.raises(errors.InvalidAdapterIdError):
        AdapterRef(id)


def test_outside_of_the_roots_nothing_is_told(world: LocalWorld) -> None:
    secret = world.fill(world.outside / "secret")
    (world.roots[0] / "out").symlink_to(secret)
    (world.roots[0] / "dangling").symlink_to(world.outside / "nothing")
    (world.roots[0] / "loop").symlink_to("../outside/loop")
    (world.outside / "loop").symlink_to("loop")
    (secret / "empty").mkdir()
    ids = [
        *(f"{world.outside}/{end}" for end in ("secret", "nothing", "secret/empty", "loop", "")),
        *(f"{world.outside}/{end}" for end in (f"secret/{CONFIG_NAME}", "a" * 300)),
        *("./out", "./out/empty", "./out/nothing", "./dangling", "./loop", "./../outside/secret"),
        *("../outside/nothing", f"{world.roots[0]}2", "/", "/proc/self/cwd", "/dev/null"),
    ]
    refusals = [refusal(world, id) for id in ids]
    assert {type(error) for error in refusals} == {errors.AccessDeniedError}
    (text,) = {str(error) for error in refusals}
    assert "local_roots" in text
    assert "pathlib.Path" in text
    assert {error.__cause__ or error.__context__ for error in refusals} == {None}


def test_without_roots_no_text_is_local(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        source = LocalSource(roots=[], limits=LIMITS, threads=threads)
        for id in (str(tmp_path), "./one", "/nothing"):
            with pytest.raises(errors.AccessDeniedError, match=r"local_roots.*pathlib\.Path"):
                asyncio.run(source.resolve(AdapterRef(id)))


@pytest.mark.parametrize("id", ["./nothing", "./a/b", "./" + "a" * 300])
def test_inside_a_root_a_missing_folder_is_not_found(world: LocalWorld, id: str) -> None:
    assert type(refusal(world, id)) is errors.AdapterNotFoundError


@pytest.mark.parametrize("trusted", [True, False])
def test_a_link_that_may_not_be_read(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """As /proc/1/root, which no path leads through: not even where it leads may be asked."""
    place = "/proc/1/root"
    refused = PermissionError(errno.EACCES, "Permission denied", place)

    def no_link(*_: object, **__: object) -> NoReturn:
        raise refused

    monkeypatch.setattr(os.path, "realpath", no_link)
    monkeypatch.setattr(local_folder, "located", no_link)
    error = refusal(world, Path(place) if trusted else place)
    assert type(error) is errors.AccessDeniedError
    assert ("give it permission" if trusted else "local_roots only") in str(error)


def test_links_stay_in_the_folder(world: LocalWorld, run: Run) -> None:
    other = world.fill(world.roots[0] / "other")
    folder = world.fill(world.roots[0] / "one")
    (folder / "sub").mkdir()
    (folder / WEIGHTS_NAME).rename(folder / "sub" / "w")
    (folder / WEIGHTS_NAME).symlink_to("sub/w")
    run(world.source.resolve(AdapterRef("./one")))
    texts = set()
    for target in (other / WEIGHTS_NAME, other / "nothing", other, "/dev/null", WEIGHTS_NAME):
        (folder / WEIGHTS_NAME).unlink()
        (folder / WEIGHTS_NAME).symlink_to(target)
        error = refusal(world, "./one")
        assert type(error) is errors.AccessDeniedError
        texts.add(str(error))
    assert len(texts) == 1
    (folder / WEIGHTS_NAME).unlink()
    (folder / WEIGHTS_NAME).symlink_to(other / WEIGHTS_NAME)
    key = run(world.source.resolve(AdapterRef(folder)))
    assert key.files[1].inode == (other / WEIGHTS_NAME).stat().st_ino


@pytest.mark.parametrize("sub", ["", "deep/er"])
@pytest.mark.parametrize(
    ("snapshot", "blob", "allowed"),
    [
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--n/blobs/{BLOB}", True),
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--n/blobs/{BLOB[:40]}", True),
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--x/blobs/{BLOB}", False),
        (f"models--o--n/snapshots/{COMMIT}", "models--o--n/blobs/secret", False),
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--n/blobs/x/{BLOB}", False),
        ("models--o--n/snapshots/main", f"models--o--n/blobs/{BLOB}", False),
        (f"o--n/snapshots/{COMMIT}", f"o--n/blobs/{BLOB}", False),
    ],
)
def test_the_hub_cache_keeps_its_links(
    world: LocalWorld, sub: str, snapshot: str, blob: str, allowed: bool
) -> None:
    folder, target = world.fill(world.roots[0] / snapshot / sub), world.roots[0] / blob
    target.parent.mkdir(parents=True)
    (folder / WEIGHTS_NAME).rename(target)
    (folder / WEIGHTS_NAME).symlink_to(os.path.relpath(target, folder))
    if allowed:
        key = asyncio.run(world.source.resolve(AdapterRef(str(folder))))
        assert key.files[1].inode == target.stat().st_ino
    else:
        assert type(refusal(world, str(folder))) is errors.AccessDeniedError
