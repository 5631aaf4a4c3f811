"""Doubles for tests of your own server: no network, no GPU, no model.

    source = FakeSource()
    source.put("org/sql", config, weights)
    source.hold("org/sql")  # its layers arrive when the test allows them
    async with AdapterLoader(layout, LoaderConfig(device="simulated"), source=source) as loader:
        ...

`FakeSource` serves adapters from memory. `SimulatedDevice`, chosen by `device="simulated"`, has its
own copy stream and memory filled with NaN, so that a missing wait shows as wrong numbers.
`FakeDecoder` replaces the model behind the server's engine.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from math import inf
from threading import Lock
from typing import Literal
from zlib import crc32

import torch

from lorax_async.concurrency import FetchControl
from lorax_async.devices.simulated import SimulatedDevice, SimulatedStream, SimulatedTicket
from lorax_async.engines.layer_gate import LayerGate
from lorax_async.errors import (
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    InternalError,
    LoraxError,
    UsageError,
)
from lorax_async.files import FileReader, Reader, identity_of
from lorax_async.formats.peft_names import WEIGHTS_FILE
from lorax_async.formats.safetensors import header_size
from lorax_async.formats.spans import ByteSpan
from lorax_async.server.engine import DecoderStep, StepResult
from lorax_async.sources.base import AdapterFile
from lorax_async.types import UNCHECKED, AdapterKey, AdapterRef, FileIdentity, Verification

__all__ = [
    "FakeDecoder",
    "FakeReader",
    "FakeSource",
    "FakeVersion",
    "SimulatedDevice",
    "SimulatedStream",
    "SimulatedTicket",
    "SourceCounts",
    "Step",
    "fake_logits",
]


Step = Literal["resolve", "open", "fetch_groups", "verify", "digest", "read"]

_POLL_SECONDS = 0.001
_CHANGED = "the adapter has changed; load it again"


@dataclass(slots=True)
class SourceCounts:
    """Calls of each method of a `FakeSource`, counted when they begin, and objects still open."""

    resolves: int = 0
    opens: int = 0
    reopens: int = 0
    fetches: int = 0
    digests: int = 0
    bytes_read: int = 0
    open_readers: int = 0


@dataclass(slots=True)
class _Failure:
    step: Step
    error: Exception
    id: str | None
    at: int
    times: int


@dataclass(slots=True)
class FakeVersion:
    """One version of an adapter; `here` lists the byte ranges [start, stop) that have arrived."""

    id: str
    key: AdapterKey
    config: bytes
    weights: bytes
    here: list[tuple[int, int]] = field(default_factory=list)

    def add(self, spans: Sequence[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.here, *spans]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.here = merged

    def has(self, start: int, stop: int) -> bool:
        return start == stop or any(first <= start and stop <= last for first, last in self.here)


class _FakeOpen:
    """An object that calls `on_close` at its first `close`, so that open ones can be counted."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close
        self._lock = Lock()
        self._open = True

    def close(self) -> None:
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self._on_close()


class FakeReader(_FakeOpen):
    """The `Reader` of a `FakeSource`; `read` returns the bytes of [start, stop), or raises."""

    def __init__(
        self,
        version: FakeVersion,
        read: Callable[[FakeVersion, int, int], memoryview],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(on_close)
        self.version = version
        self._read = read
        self._file: FileReader | None = None

    @property
    def nbytes(self) -> int:
        return len(self.version.weights)

    def file(self) -> FileReader:
        """Return a reader of a file with the same bytes, which is in memory."""
        with self._lock:
            if not self._open:
                raise FetchError("the reader is closed")
            if self._file is None:
                fd = os.memfd_create(WEIGHTS_FILE)
                with open(fd, "wb", closefd=False) as file:
                    file.write(self.version.weights)
                self._file = FileReader(lambda: fd, identity_of(os.fstat(fd)), WEIGHTS_FILE)
            return self._file

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        if rows > 1:
            whole = buffers[0].cast("B")
            size = whole.nbytes // rows
            for n in range(rows):
                self.read_into([whole[n * size : (n + 1) * size]], offset + n * pitch)
            return
        if not self._open:
            raise FetchError("the reader is closed")
        content = self._read(self.version, offset, offset + sum(each.nbytes for each in buffers))
        for buffer in buffers:
            buffer.cast("B")[:] = content[: buffer.nbytes]
            content = content[buffer.nbytes :]


class FakeSource:
    """A `Source` of adapters in memory, whose bytes arrive layer group by layer group.

    Each group takes `pace` seconds. If `holdable`, the host tier maps a file with an adapter's
    bytes, which is in memory.

    A test can hold back groups (`hold`, `allow`) or the end of a fetch (`hold_verification`), and
    make steps fail (`fail`). Reading bytes that have not arrived raises `InternalError`. Bytes that
    have arrived stay, as in a disk cache. Methods that are not part of `Source` do not wait and may
    be called from any thread.
    """

    def __init__(self, *, pace: float = 0.0, holdable: bool = False) -> None:
        self.pace = pace
        self.holdable = holdable
        self.counts = SourceCounts()
        self.verifications: dict[str, Verification] = {}
        """What `fetch_groups` returns, by id; `UNCHECKED` by default."""
        self._lock = Lock()
        self._numbers = count(1)
        self._current: dict[str, FakeVersion] = {}
        self._versions: dict[AdapterKey, FakeVersion] = {}
        self._allowed: dict[str, set[int]] = {}
        self._unverified: set[str] = set()
        self._failures: list[_Failure] = []

    def put(self, id: str, config: bytes, weights: bytes) -> AdapterKey:
        """Add an adapter or a new version of it; return the key of that version."""
        number = next(self._numbers)
        files = tuple(
            FileIdentity(0, number, len(content), number, number) for content in (config, weights)
        )
        key = AdapterKey(f"memory:{id}", files)
        self._current[id] = self._versions[key] = FakeVersion(id, key, config, weights)
        return key

    def remove(self, id: str) -> None:
        """Remove an adapter; its readers fail from now on."""
        del self._current[id]

    def hold(self, id: str) -> None:
        """Hold back each group of `id` until `allow` releases it."""
        self._allowed[id] = set()

    def allow(self, id: str, *groups: int) -> None:
        """Release these groups, as indices into `fetch_groups`'s `groups`; all if none is given."""
        if not groups:
            self._allowed.pop(id, None)
        elif id in self._allowed:
            self._allowed[id].update(groups)

    def hold_verification(self, id: str) -> None:
        """Hold back the result of `fetch_groups` for `id` until `allow_verification`."""
        self._unverified.add(id)

    def allow_verification(self, id: str) -> None:
        self._unverified.discard(id)

    def fail(
        self, step: Step, error: Exception, *, id: str | None = None, at: int = 0, times: int = 1
    ) -> None:
        """Raise `error` at the next `times` such steps, of `id` or of any adapter.

        `at` is the group that does not arrive ("fetch_groups") or the byte that cannot be read
        ("read"). "verify" follows the last group; its failure discards all bytes.
        """
        self._failures.append(_Failure(step, error, id, at, times))

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        self.counts.resolves += 1
        await asyncio.sleep(0)
        self._maybe_fail("resolve", ref.text)
        version = self._current.get(ref.text)
        if version is None:
            raise AdapterNotFoundError("the fake source has no such adapter; add it with put()")
        return version.key

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:  # noqa: ARG002 - the port's
        self.counts.opens += 1
        version = await self._version(key, "open")
        size = header_size(version.weights[:8], len(version.weights))
        with self._lock:
            version.add([(0, size)])
        prefix = version.weights[:size]
        return AdapterFile(version.config, prefix, self._reader(version), self.holdable)

    def reopen(self, key: AdapterKey) -> Reader:
        self.counts.reopens += 1
        return self._reader(self._versions[key])

    async def fetch_groups(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        self.counts.fetches += 1
        reader = file.reader
        if not isinstance(reader, FakeReader):
            raise InternalError(f"a fake source cannot fetch the bytes of a {type(reader)}")
        version = reader.version
        for group, spans in enumerate(groups):
            await self._wait_for_group(version, group, control)
            with self._lock:
                version.add([part for span in spans for part in span.ranges()])
            arrived(group)
        while version.id in self._unverified:
            self._require_demand(control)
            await asyncio.sleep(_POLL_SECONDS)
        try:
            self._maybe_fail("verify", version.id)
        except Exception:
            with self._lock:
                version.here.clear()
            raise
        return self.verifications.get(version.id, UNCHECKED)

    async def digest(self, key: AdapterKey) -> str:
        self.counts.digests += 1
        version = await self._version(key, "digest")
        return sha256(version.weights).hexdigest()

    def _reader(self, version: FakeVersion) -> FakeReader:
        self._count(1)
        return FakeReader(version, self._read, lambda: self._count(-1))

    def _count(self, readers: int) -> None:
        with self._lock:
            self.counts.open_readers += readers

    def _read(self, version: FakeVersion, start: int, stop: int) -> memoryview:
        self._maybe_fail("read", version.id, start, stop)
        self._require_current(version)
        if stop > len(version.weights):
            raise IntegrityError(f"the adapter ends before byte {stop:,}")
        with self._lock:
            if not version.has(start, stop):
                raise InternalError(f"bytes {start:,} to {stop:,} were read before they arrived")
            self.counts.bytes_read += stop - start
        return memoryview(version.weights)[start:stop]

    async def _wait_for_group(
        self, version: FakeVersion, group: int, control: FetchControl
    ) -> None:
        """Wait until a group may arrive."""
        due = asyncio.get_running_loop().time() + self.pace
        while True:
            self._require_demand(control)
            left = due - asyncio.get_running_loop().time()
            if left <= 0 and group in self._allowed.get(version.id, (group,)):
                break
            await asyncio.sleep(max(_POLL_SECONDS, min(left, 10 * _POLL_SECONDS)))
        self._maybe_fail("fetch_groups", version.id, group, group + 1)
        self._require_current(version)

    def _require_demand(self, control: FetchControl) -> None:
        if control.cancelled:
            raise FetchError("no caller waits for the adapter any more")

    async def _version(self, key: AdapterKey, step: Step) -> FakeVersion:
        await asyncio.sleep(0)
        id = key.location.removeprefix("memory:")
        self._maybe_fail(step, id)
        version = self._current.get(id)
        if version is None or version.key != key:
            raise IntegrityError(_CHANGED)
        return version

    def _require_current(self, version: FakeVersion) -> None:
        if self._current.get(version.id) is not version:
            raise IntegrityError(_CHANGED)

    def _maybe_fail(self, step: Step, id: str, start: int = 0, stop: int = 1) -> None:
        with self._lock:
            for failure in self._failures:
                if (failure.step, failure.id or id) == (step, id) and start <= failure.at < stop:
                    failure.times -= 1
                    if failure.times == 0:
                        self._failures.remove(failure)
                    error = failure.error  # copied, because a raised error collects frames
                    raise error.located() if isinstance(error, LoraxError) else error


class FakeDecoder:
    """A `Decoder` whose logits are random numbers, seeded by a sequence's tokens and adapter.

    It keeps at most `max_sequences` (None: any number). With `loop`, the loader's, each step waits
    for the adapters' layers as a model does. `compute` raises `UsageError` for a part that does not
    continue its sequence, and for too many sequences.
    """

    def __init__(
        self,
        *,
        max_length: int = 64,
        vocabulary: int = 32,
        max_sequences: int | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.steps: list[DecoderStep] = []
        """The steps that were computed, in order."""
        self.kept: dict[int, list[int]] = {}
        """The tokens of each sequence that was not forgotten."""
        self.max_length = max_length
        self.vocabulary = vocabulary
        self._max_sequences = inf if max_sequences is None else max_sequences
        self._loop = loop

    def compute(self, step: DecoderStep) -> StepResult:
        self.steps.append(step)
        sequences = len(self.kept.keys() | {part.sequence for part in step.parts})
        if sequences > self._max_sequences:
            raise UsageError(f"{sequences} sequences, and max_sequences is {self._max_sequences}")
        out = self._run_layers(step)
        logits = torch.zeros(len(step.parts), self.vocabulary)
        for number, part in enumerate(step.parts):
            before = self.kept.get(part.sequence, []) if part.start else []
            if len(before) != part.start:
                raise UsageError(
                    f"the part starts at {part.start}, and its sequence has {len(before)} tokens"
                )
            self.kept[part.sequence] = [*before, *part.tokens]
            id = None if part.handle is None else part.handle.id
            logits[number] = fake_logits(id, self.kept[part.sequence], self.vocabulary)
        for number in out:
            self.forget(step.parts[number].sequence)
        return StepResult(logits, out)

    def forget(self, sequence: int) -> None:
        self.kept.pop(sequence, None)

    def _run_layers(self, step: DecoderStep) -> dict[int, LoraxError]:
        """Enter all layers in order; return the errors of parts that did not get their adapter."""
        handles = [part.handle for part in step.parts]
        if self._loop is None:
            return {}
        gate = LayerGate(handles, self._loop, step.budget, step.others_wait)
        distinct = [handle for handle in dict.fromkeys(handles) if handle is not None]
        with ExitStack() as uses:
            for handle in distinct:
                try:
                    uses.enter_context(handle.use())
                except UsageError:
                    raise
                except LoraxError as error:
                    gate.leave_out(handle, error)
            for layer in sorted({layer for handle in distinct for layer in handle.layers}):
                gate.enter(layer)
        return dict(gate.out)


def fake_logits(id: str | None, tokens: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Return the logits `[vocabulary]` of the token after `tokens`, with the adapter `id`."""
    seed = crc32(repr((id, list(tokens))).encode())
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))
