"""The accelerator that `bench_gpu_load.py` measures, or the tests' stand-in for one.

The stand-in ("late") is host memory behind streams that work later than they were asked to: the
code that is measured runs on it unchanged, and its times say nothing about any hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from work_files import HIDDEN, INTERMEDIATE, KEY_VALUE, LAYERS, TARGETS, module_paths

TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True, slots=True)
class Size:
    """What is loaded and computed: all shapes of `work_files`, divided by `divisor`."""

    divisor: int
    rank: int
    tokens: int
    rounds: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {
            name: (inside // self.divisor, outside // self.divisor)
            for name, (inside, outside) in TARGETS.items()
        }

    def layout(self) -> ModelLayout:
        modules = (
            Module(path, inside, outside, int(path.split(".")[2]), Parallelism.REPLICATED)
            for path, inside, outside in module_paths(self.divisor)
        )
        return ModelLayout(tuple(modules), LAYERS, "BF16", "model.")


WHOLE = Size(divisor=1, rank=16, tokens=512, rounds=15)
SMOKE = Size(divisor=32, rank=16, tokens=8, rounds=3)
assert HIDDEN % SMOKE.divisor == KEY_VALUE % SMOKE.divisor == INTERMEDIATE % SMOKE.divisor == 0


class NoSuchDeviceError(RuntimeError):
    """There is nothing to measure on; the text says so."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A torch device with streams and events."""

    device: torch.device
    hardware: str
    size: Size

    @property
    def is_hardware(self) -> bool:
        return self.device.type == "cuda"

    def stream(self) -> torch.Stream:
        if self.device.type == "cuda":
            return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.Stream(self.device)

    def timed(self, stream: torch.Stream, work: Callable[[], None]) -> float:
        """ms between two events on `stream` around what `work` puts there; where events keep no
        time, by the clock, until the stream has run dry."""
        if not self.is_hardware:
            start = perf_counter()
            self.on(stream, work)
            stream.synchronize()
            return (perf_counter() - start) * 1e3
        first, last = _timing_event(), _timing_event()
        first.record(stream)
        self.on(stream, work)
        last.record(stream)
        last.synchronize()
        return float(first.elapsed_time(last))

    @staticmethod
    def on(stream: torch.Stream, work: Callable[[], None]) -> None:
        with stream:
            work()

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory for DMA, uint8 `[nbytes]`, every page touched."""
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def machine(name: str) -> Machine:
    """ "cuda", "cuda:N" or "late". Raises `NoSuchDeviceError`."""
    if name == "late":
        return _late()
    if not torch.cuda.is_available():
        raise NoSuchDeviceError("no CUDA device here: nothing was measured on hardware")
    device = torch.device(name if ":" in name else f"{name}:{torch.cuda.current_device()}")
    return Machine(device, torch.cuda.get_device_name(device), WHOLE)


def _late() -> Machine:
    sys.path.insert(0, str(TESTS))
    from late_device import build

    try:
        build.load()
    except build.NotBuilt as missing:
        raise NoSuchDeviceError(str(missing)) from missing
    return Machine(torch.device("late:0"), "none: host memory that stands for a GPU", SMOKE)


class Forward:
    """The matmuls of one forward pass of `tokens` tokens, on a stream of its own.

    One layer's weights stand for all: they are far larger than any cache of a GPU.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.stream = machine.stream()
        shapes = list(machine.size.shapes().values())
        self._weights = [self._filled(inside, outside) for inside, outside in shapes]
        tokens = machine.size.tokens
        self._inputs = {inside: self._filled(tokens, inside) for inside, _ in shapes}
        self._outputs = [self._filled(tokens, outside) for _, outside in shapes]
        torch.accelerator.synchronize(machine.device)  # no stream is ordered with ours by itself

    def _filled(self, *shape: int) -> torch.Tensor:
        made = torch.full(shape, 0.01, dtype=torch.bfloat16)
        return made.to(self._machine.device)

    def put(self, passes: int) -> None:
        """All matmuls of so many passes, on the current stream."""
        for _ in range(passes * LAYERS):
            for weight, output in zip(self._weights, self._outputs, strict=True):
                torch.mm(self._inputs[weight.shape[0]], weight, out=output)

    def timed(self, passes: int) -> float:
        """ms of so many passes."""
        return self._machine.timed(self.stream, lambda: self.put(passes))


class Memcpy:
    """The floor: copies of the same sizes from pinned memory into one arena, on one stream."""

    def __init__(self, machine: Machine, sizes: Sequence[int]) -> None:
        self._machine = machine
        self.stream = machine.stream()
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        source = machine.pinned(sum(sizes))
        target = torch.empty(sum(sizes), dtype=torch.uint8, device=machine.device)
        for start, stop in _ranges(sizes):
            self._pairs.append((source[start:stop], target[start:stop]))
        self._source, self._target = source, target

    def spoil(self, value: int) -> None:
        self._source.fill_(value)

    def put(self) -> None:
        """One copy for each size, on the current stream."""
        for source, target in self._pairs:
            target.copy_(source, non_blocking=True)

    def run(self) -> None:
        """As a caller who waits for the last byte sees it."""
        self._machine.on(self.stream, self.put)
        self.stream.synchronize()

    def holds(self, value: int) -> bool:
        return bool((self._target.cpu() == value).all())


def _ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, start + size
        start += size
