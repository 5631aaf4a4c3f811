"""What several threads ask of the devices in host memory at the same moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from device_groups import ARENA, LAYOUT, NEW, SLOTS, extent, group, holds, made_by, move

from lorax_async.errors import TransferError
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.testing import SimulatedDevice


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    making = made_by(SimulatedDevice)
    device = next(making)()
    device.open()
    yield device
    next(making, None)


class Looking:
    """An array that looks around before an element is written."""

    def __init__(self, words: Any, look: Callable[[], None]) -> None:
        self._words, self._look = words, look

    def __setitem__(self, cell: int, word: int) -> None:
        self._look()
        self._words[cell] = word


def test_ranks_are_cleared_first() -> None:
    """Whoever reads a rank that is not 0 reads a complete row."""
    device, made = CpuDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS), group(1, [2])
    device.open()
    move(device, made, extent(0), 1)
    (row,), base = made.rows, device.host_view(extent(0)).data_ptr()
    seen: list[tuple[list[int], float]] = []
    device._rank_words = Looking(  # type: ignore[assignment]
        device._rank_words,
        lambda: seen.append((device.address[:, 2, 1].tolist(), float(device.scale[2, 1]))),
    )
    device.clear_column(1)
    scale = float(torch.tensor(made.weights[2][2]))
    assert seen == [([base + row.a, base + row.b], scale)]
    holds(device, 1, {})
    device.close()


class SlowInt(int):
    """While it is added to, others have their turn."""

    def __add__(self, other: int) -> SlowInt:
        time.sleep(0.03)
        return SlowInt(int(self) + other)


def test_each_gated_copy_has_a_number_of_its_own() -> None:
    device, made = GatedDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS), group(1, [0])
    device.open()
    device.copies, device.failing = SlowInt(0), {1}
    with ThreadPoolExecutor(2) as threads:
        copying = [threads.submit(move, device, made, extent(n), n) for n in range(2)]
        failures = [each.exception(10) for each in copying]
    assert [type(failure) for failure in failures if failure] == [TransferError]
    assert device.copies == 2
    device.close()


def test_the_number_of_a_simulated_copy_is_its_place(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, put = [NEW.staged(device) for _ in range(2)], device._copying.put
    putting = threading.Event()

    def slowly(work: Any) -> Any:
        first = not putting.is_set()
        putting.set()
        if first:
            time.sleep(0.05)
        return put(work)

    monkeypatch.setattr(device._copying, "put", slowly)
    device.failing = {0}
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(device.copy, pieces[0], NEW.rows, extent(0), 0)
        assert putting.wait(10)
        second = device.copy(pieces[1], NEW.rows, extent(1), 1)
        assert second.exception(10) is None
        assert isinstance(first.result(10).exception(10), TransferError)


class Interrupted:
    """A queue in which somebody acts just before an item of this kind is put."""

    def __init__(self, queue: Any, kind: type, act: Callable[[], None]) -> None:
        self._queue, self._kind, self._act = queue, kind, act
        self.get = queue.get

    def put(self, item: object) -> None:
        if isinstance(item, self._kind):
            self._act()
        self._queue.put(item)


def test_no_work_is_lost_behind_the_end_of_a_stream(device: SimulatedDevice) -> None:
    stream = device.stream("other")
    ending = threading.Thread(target=stream.end)

    def end() -> None:
        ending.start()
        ending.join(0.05)

    stream._queue = Interrupted(stream._queue, tuple, end)  # type: ignore[assignment]
    assert stream.run(lambda: None).result(5) is None
    ending.join(10)
    assert not ending.is_alive()
