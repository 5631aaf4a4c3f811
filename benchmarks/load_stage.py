"""What the contenders of one row share, and the loader as one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from floors import Arena, Threads
from harness import Contender, Role, WrongBytesError
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.tracing import Trace
from peers import Places
from work_files import CONFIG, PEFT_PREFIX, SCALE, AdapterFolder, drop_from_cache


@dataclass(slots=True)
class Stage:
    """What the contenders of one row share: the adapter to load, its destination, another adapter.

    Before each timed run the destination is filled with `other`'s bytes, so that stale bytes
    cannot pass for loaded ones, and every contender finds the caches in the same state.
    """

    current: AdapterFolder
    other: AdapterFolder
    arena: Arena
    threads: Threads
    dtype: torch.dtype
    cold: bool = False
    expected: dict[str, torch.Tensor] = field(default_factory=dict)
    places: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.expected = {k: t.to(self.dtype) for k, t in self.current.tensors.items()}
        self.places = self.arena.places(self.current, self.dtype)

    async def fill_with_other(self) -> None:
        self.threads.read(self.other, self.arena)
        self.drop_if_cold()

    def drop_if_cold(self) -> None:
        if self.cold:
            drop_from_cache(self.current.weights)
            drop_from_cache(self.current.path / CONFIG)

    def check_arena(self) -> None:
        require_equal(self.places, self.expected)

    def check_whole_file(self) -> None:
        folder, arena = self.current, self.arena
        data = arena.tensor[folder.data_start : folder.file_size]
        header = bytes(arena.bytes[: folder.data_start])
        if header != folder.header or not torch.equal(data, folder.data):
            raise WrongBytesError("the arena does not hold the file")

    def contender(
        self, name: str, load: Callable[[Path, Places], None], every: int = 1
    ) -> Contender:
        """A peer, as a function of the file and of where its tensors go."""

        async def run() -> None:
            load(self.current.weights, self.places)

        return Contender(name, "peer", run, self.check_arena, self.fill_with_other, every)

    def floor(self, name: str, read: Callable[[], None], check: Callable[[], None]) -> Contender:
        return self._bare(name, "floor", read, check)

    def reference(
        self, name: str, read: Callable[[], None], check: Callable[[], None]
    ) -> Contender:
        """Bare reads of another kind, beside the floor."""
        return self._bare(name, "reference", read, check)

    def _bare(
        self, name: str, role: Role, read: Callable[[], None], check: Callable[[], None]
    ) -> Contender:
        async def run() -> None:
            read()

        return Contender(name, role, run, check, self.fill_with_other)


def require_equal(loaded: Places, expected: Places) -> None:
    """Byte for byte, after the cast that the row asks for."""
    if loaded.keys() != expected.keys():
        raise WrongBytesError(f"{len(loaded)} tensors instead of {len(expected)}")
    for name, tensor in expected.items():
        same_kind = loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        if not same_kind or not torch.equal(_raw(loaded[name]), _raw(tensor)):
            raise WrongBytesError(f"{name} is not what the file says")


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_handle(handle: AdapterHandle, expected: Places) -> None:
    """What a caller of the loader sees: every module's A, B and scale."""
    modules = dict(handle.modules)
    loaded = {
        f"{PEFT_PREFIX}{path}.lora_{part}.weight": weight
        for path, module in modules.items()
        for part, weight in (("A", module.a), ("B", module.b))
    }
    require_equal(loaded, expected)
    scales = {module.scale for module in modules.values()}
    if scales != {SCALE}:
        raise WrongBytesError(f"scales {scales}, not {SCALE}")


class Ours:
    """`await loader.load(Path(...))`, on a loader whose arena has room for one adapter.

    Each run is traced into `traces`, if given.
    """

    def __init__(
        self, loader: AdapterLoader, stage: Stage, traces: list[Trace] | None = None
    ) -> None:
        self._loader = loader
        self._stage = stage
        self._traces = traces
        self._handle: AdapterHandle | None = None

    async def load_other(self) -> None:
        """Evicts what was resident: the next load moves every byte again."""
        (await self._loader.load(self._stage.other.path)).release()
        self._stage.drop_if_cold()

    async def run(self) -> None:
        self._handle = await self._loader.load(self._stage.current.path)

    def check(self) -> None:
        assert self._handle is not None
        check_handle(self._handle, self._stage.expected)
        self._handle.release()

    def contender(self) -> Contender:
        if self._traces is not None:
            return self.traced(self._traces)
        return Contender("lorax_async load", "ours", self.run, self.check, self.load_other)

    def untraced(self) -> Contender:
        """The same as a floor, for what a trace costs."""
        return Contender("not traced", "floor", self.run, self.check, self.load_other)

    def traced(self, traces: list[Trace]) -> Contender:
        """The same while a trace is recorded, which begins and ends outside of the timer."""

        async def prepare() -> None:
            await self.load_other()
            traces.append(self._loader.trace().start())

        async def settle() -> None:
            traces[-1].stop()

        return Contender("traced", "ours", self.run, self.check, prepare, settle=settle)
