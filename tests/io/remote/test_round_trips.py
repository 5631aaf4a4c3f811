"""How many answers are waited for, one after the other, before layer 0 is there.

The stand-in answers questions that are put at once only when it has all of them, so that a question
that waits for another one's answer would wait for ever.
"""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from answering_server import Asked
from hub_stand_in import HubStandIn
from user_loads import LAYERS, RANK, at, contents, has, loader, until, written

import tiny
from lorax_async import AdapterLoader, Allow
from lorax_async.core.spans import Span

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

PATIENCE = 40.0


def span_of_layer_0(weights: bytes) -> Span:
    """By the header, as the format has it."""
    (length,) = struct.unpack("<Q", weights[:8])
    entries = json.loads(weights[8 : 8 + length]).items()
    spans = [entry["data_offsets"] for name, entry in entries if ".layers.0." in name]
    starts, stops = zip(*spans, strict=True)
    return 8 + length + min(starts), 8 + length + max(stops)


@dataclass
class Rounds:
    """What is asked before layer 0 is there, by round; what is not for layer 0 waits until then."""

    layer_0: Span
    heads: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    begins: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    is_there: threading.Event = field(default_factory=threading.Event)
    rounds: list[str] = field(default_factory=list)

    def __call__(self, asked: Asked) -> None:
        if self.is_there.is_set():
            return
        if asked.method == "HEAD":
            self.heads.wait(PATIENCE)
            self.rounds.append("head")
        elif "range" not in asked.fields or asked.fields["range"].startswith("bytes=0-"):
            self.begins.wait(PATIENCE)
            self.rounds.append("beginning")
        elif self._is_for_layer_0(asked):
            self.rounds.append("layer 0")
        else:
            assert self.is_there.wait(PATIENCE)

    def _is_for_layer_0(self, asked: Asked) -> bool:
        first, last = asked.fields["range"].removeprefix("bytes=").split("-")
        return int(first) < self.layer_0[1] and self.layer_0[0] <= int(last)

    def expect(self, *, heads: int, layer_0: bool) -> None:
        """Two of each that are put at once, and however many ranges for layer 0."""
        ranges = self.rounds.count("layer 0")
        assert self.rounds == ["head"] * heads + ["beginning"] * 2 + ["layer 0"] * ranges
        assert bool(ranges) is layer_0


def over(hub: HubStandIn, folder: Path, layers: int) -> AdapterLoader:
    allow = (Allow("hub"), at(hub.store_netloc))
    return loader(folder, layers=layers, allow=allow, hub_endpoint=hub.endpoint)


async def streamed(there: AdapterLoader, id: str, adapter: Path, rounds: Rounds, last: int) -> None:
    async with there.stream(id) as handle:
        await handle.layer_ready(0)
        rounds.is_there.set()
        await handle.layer_ready(last)
        tiny.assert_equal_to_file(handle, adapter)


async def given_up(there: AdapterLoader, id: str, hub: HubStandIn) -> None:
    """A load that ends when it was told which version there is, and has asked for what comes next."""
    asked_for: list[str] = []
    go_on = threading.Event()

    def hold(asked: Asked) -> None:
        if asked.method == "GET":
            asked_for.append(asked.target)
            assert go_on.wait(PATIENCE)

    hub.behave = hold
    loading = asyncio.create_task(there.load(id))
    await until(lambda: len(asked_for) == 2)
    loading.cancel()
    await asyncio.wait([loading])
    go_on.set()


SIZES = pytest.mark.parametrize(
    ("layers", "rank", "beyond"), [(LAYERS, RANK, True), (4, 16, False)], ids=["large", "small"]
)


@SIZES
async def test_which_version_then_where_layers_lie_then_layer_0(
    layers: int, rank: int, beyond: bool, tmp_path: Path
) -> None:
    """Of a small adapter layer 0 comes with its header. From the cache nobody is asked."""
    adapter = written(tmp_path / "a", layers=layers, rank=rank)
    files = contents(adapter)
    with HubStandIn() as hub:
        id = f"org/name@{hub.put('org/name', files)}"
        hub.behave = rounds = Rounds(span_of_layer_0(files["adapter_model.safetensors"]))
        async with over(hub, tmp_path, layers) as there:
            await streamed(there, id, adapter, rounds, layers - 1)
        rounds.expect(heads=2, layer_0=beyond)
        begun = len(hub.asked)
        async with over(hub, tmp_path, layers) as there:
            await has(there, id, adapter)
        assert len(hub.asked) == begun


@SIZES
async def test_one_less_where_the_version_was_told_a_while_ago(
    layers: int, rank: int, beyond: bool, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "a", layers=layers, rank=rank)
    files = contents(adapter)
    with HubStandIn() as hub:
        id = f"org/name@{hub.put('org/name', files)}"
        async with over(hub, tmp_path, layers) as there:
            await given_up(there, id, hub)
            hub.behave = rounds = Rounds(span_of_layer_0(files["adapter_model.safetensors"]))
            await streamed(there, id, adapter, rounds, layers - 1)
        rounds.expect(heads=0, layer_0=beyond)
