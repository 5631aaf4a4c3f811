"""What passes between a loader and its device, and what it decides, written down to be compared."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from hashlib import sha256
from typing import Any

import pytest
import torch

from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Extent
from lorax_async.core.commands import Command
from lorax_async.core.moves import Row
from lorax_async.events import Event
from lorax_async.io.ports import CopyTicket, Device, FilePieces, StagedPiece
from lorax_async.io.staging import Buffer, read
from lorax_async.runtime.actions import Actions
from wrapped_device import WrappedDevice

Told = tuple[object, ...]


@dataclass(slots=True)
class Recording:
    """Calls of the device, events, commands and moves of files and slots, each in its order."""

    calls: list[Told] = field(default_factory=list)
    events: list[Told] = field(default_factory=list)
    commands: list[Told] = field(default_factory=list)
    file_moves: list[Told] = field(default_factory=list)
    slot_moves: list[Told] = field(default_factory=list)

    def hear(self, event: Event) -> None:
        self.events.append(_told(event, without={"time"}))


class RecordingDevice(WrappedDevice):
    """Writes down each call. Copies wait for `gate`; those whose numbers are told so fail.

    `refusing` raise when they are asked for, `failing` in their tickets, once the bytes are there.
    """

    def __init__(self, inner: Device, recording: Recording) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.gate.set()
        self.refusing: dict[int, Exception] = {}
        self.failing: dict[int, Exception] = {}
        self.copies = 0
        self._calls = recording.calls
        self._tickets: dict[CopyTicket, tuple[int, CopyTicket]] = {}

    def open(self) -> None:
        self._calls.append(("open",))
        super().open()

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        self._calls.append(("staging_memory", nbytes))
        return super().staging_memory(nbytes)

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        self.gate.wait(30)
        number, self.copies = self.copies, self.copies + 1
        covered, digest = _written(pieces, extent)
        self._calls.append(("copy", number, slot, extent, covered, digest, tuple(rows)))
        if number in self.refusing:
            raise self.refusing[number]
        begun = super().copy(pieces, rows, extent, slot)
        ticket: CopyTicket = Future()
        self._tickets[ticket] = number, begun
        begun.add_done_callback(lambda done: _pass_on(done, ticket, self.failing.get(number)))
        return ticket

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        number, begun = self._tickets[ticket]
        self._calls.append(("wait_for", number))
        super().wait_for(begun, stream)

    def note_use(self, stream: object | None = None) -> CopyTicket:
        self._calls.append(("note_use",))
        return super().note_use(stream)

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        self._calls.append(("wipe", *extents))
        return super().wipe(extents)

    def clear_column(self, slot: int) -> None:
        self._calls.append(("clear_column", slot))
        super().clear_column(slot)

    def close(self) -> None:
        self._calls.append(("close",))
        super().close()


def _pass_on(done: CopyTicket, ticket: CopyTicket, failure: Exception | None) -> None:
    problem = failure or done.exception()
    if problem is None:
        ticket.set_result(None)
    else:
        ticket.set_exception(problem)


def _written(pieces: FilePieces | StagedPiece, extent: Extent) -> tuple[list[list[int]], str]:
    """Which bytes of the extent are covered, as [start, stop), and a digest of what they become."""
    image = torch.zeros(extent.nbytes, dtype=torch.uint8)
    if isinstance(pieces, StagedPiece):
        spans = [(pieces.target, pieces.target + pieces.memory.nbytes)]
        image[spans[0][0] : spans[0][1]] = pieces.memory
    else:
        memory = Buffer.of(image).memory
        spans = [(each.target, each.target + each.nbytes) for each in pieces.reads]
        read(pieces.reader, pieces.reads, memory)
    return _merged(spans), sha256(bytes(Buffer.of(image).memory)).hexdigest()


def _merged(spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for start, stop in sorted(spans):
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return merged


def _told(thing: Any, without: set[str]) -> Told:
    """A dataclass by its words: errors without their stories, keys as where they are."""
    values = ((each.name, getattr(thing, each.name)) for each in fields(thing))
    told = [(name, _word(value)) for name, value in values if name not in without]
    return (type(thing).__name__, *told)


def _word(value: object) -> object:
    if isinstance(value, AdapterKey):
        return value.location
    if isinstance(value, Exception):
        return type(value).__name__
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


@contextmanager
def recorded() -> Iterator[Recording]:
    """Commands and moves of the loaders that run within, but for those of earlier ones."""
    recording = Recording()
    carry_out = Actions.carry_out

    def noted(self: Actions, command: Command) -> None:
        recording.commands.append(_told(command, without={"since"}))
        carry_out(self, command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Actions, "carry_out", noted)
        for name, moves in (
            ("next_file_state", recording.file_moves),
            ("next_slot_state", recording.slot_moves),
        ):
            for module in _who_has(name):
                patch.setattr(module, name, _noting(getattr(module, name), moves))
        yield recording


def _who_has(name: str) -> list[Any]:
    core = [sys.modules[module] for module in sys.modules if module.startswith("lorax_async.core.")]
    return [module for module in core if hasattr(module, name)]


def _noting(step: Callable[[Any, Any], Any], moves: list[Told]) -> Callable[[Any, Any], Any]:
    def noted(state: Any, move: Any) -> Any:
        after = step(state, move)
        moves.append((state.value, move.value, after.value))
        return after

    return noted
