"""Whatever fails on the way: no copy is left behind, no buffer is lost, no row names the slot."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import pytest
from device_groups import BytesReader, holds, settle
from staged_groups import (
    KINDS,
    Case,
    RecordingDevice,
    Running,
    case,
    failing_at,
    opened,
    require_whole,
    ring_of,
    transfer,
    until,
)

from lorax_async.errors import FetchError, TransferError
from lorax_async.io import staging
from lorax_async.io.ports import CopyTicket
from lorax_async.io.staging import StagingRing
from lorax_async.io.transfer import _all_of

LATE = 0.002
"""Seconds that a copy is late: long enough to be still under way if nobody waits."""


def left_nothing(device: RecordingDevice, ring: StagingRing, *, at_once: bool) -> None:
    """`at_once`: at this moment no copy is under way."""
    if at_once:
        assert all(ticket.done() for ticket in device.tickets)
    require_whole(ring)
    assert all(ticket.done() for ticket in device.tickets)
    holds(device, 0, {})


def clear(device: RecordingDevice, slot: int) -> None:
    device.clear_column(slot)
    settle(device)


def works(device: RecordingDevice, ring: StagingRing, made: Case) -> None:
    transfer(device, ring).run(made.copy(slot=1, place=1)).done.result(10)
    holds(device, 1, made.weights)
    clear(device, 1)


@pytest.mark.parametrize("buffers", [2, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_each_read(kind: str, buffers: int) -> None:
    made, calls = case(kind), list[None]()
    with opened(made.dtype) as device:
        device.delay = LATE
        ring = ring_of(device, buffers)
        reader = BytesReader(made.file, lambda: calls.append(None))
        transfer(device, ring).run(made.copy(reader, slot=1, place=1)).done.result(10)
        assert len(calls) >= made.windows
        for number in range(len(calls)):
            error = FetchError("the disk is on fire")
            with pytest.raises(FetchError) as caught:
                reader = BytesReader(made.file, failing_at(number, error))
                transfer(device, ring).run(made.copy(reader))
            assert caught.value is error
            left_nothing(device, ring, at_once=True)
        works(device, ring, made)


def checked(before: Callable[[], None], cast: Callable[..., None], *args: object) -> None:
    before()
    cast(*args)


@pytest.mark.parametrize("kind", ["cast", "padded", "mixed"])
def test_each_cast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, cast = case(kind), staging._cast
    with opened(made.dtype) as device:
        device.delay = LATE
        ring = ring_of(device, 3)
        for number in range(len(made.group.converts)):
            before = failing_at(number, MemoryError("none left"))
            with monkeypatch.context() as patch, pytest.raises(MemoryError, match="none left"):
                patch.setattr(staging, "_cast", partial(checked, before, cast))
                transfer(device, ring).run(made.copy())
            left_nothing(device, ring, at_once=True)
        works(device, ring, made)


@pytest.mark.parametrize("kind", ["verbatim", "mixed"])
def test_each_copy_that_is_refused(kind: str) -> None:
    made = case(kind)
    with opened(made.dtype) as device:
        device.delay = LATE
        ring = ring_of(device, 3)
        for number in range(made.windows):
            device.refusing = {len(device.tickets) + number}
            with pytest.raises(TransferError, match="refused"):
                transfer(device, ring).run(made.copy())
            left_nothing(device, ring, at_once=True)
        device.refusing = set()
        works(device, ring, made)


@pytest.mark.parametrize("buffers", [2, 3, 20])
@pytest.mark.parametrize("kind", ["verbatim", "mixed"])
def test_each_copy_that_fails_later(kind: str, buffers: int) -> None:
    """Heard where it is asked for, if it fails before the last, or from `done`."""
    made = case(kind)
    with opened(made.dtype) as device:
        ring = ring_of(device, buffers)
        works(device, ring, made)
        for number in range(made.windows):
            first = device.copies
            device.failing = {first + number}
            with pytest.raises(TransferError, match=f"copy {first + number} was told"):
                transfer(device, ring).run(made.copy()).done.result(10)
            clear(device, 0)
            left_nothing(device, ring, at_once=False)
        device.failing = set()
        works(device, ring, made)


def test_nothing_is_sent_after_a_copy_that_failed() -> None:
    """With two buffers the third window has the first one's: by the fourth the failure is known."""
    made = case("verbatim")
    with opened() as device:
        device.failing = {0}
        ring = ring_of(device, 2)
        with pytest.raises(TransferError, match="copy 0 was told"):
            transfer(device, ring).run(made.copy())
        assert len(device.tickets) <= 3 < made.windows
        left_nothing(device, ring, at_once=True)


def test_the_first_failure_is_told() -> None:
    made = case("verbatim")
    with opened() as device:
        device.failing = {1, 3}
        device.gate.clear()
        moved = transfer(device, ring_of(device, 20)).run(made.copy())
        device.gate.set()
        with pytest.raises(TransferError, match="copy 1 was told"):
            moved.done.result(10)
        assert all(ticket.done() for ticket in device.tickets)


def test_a_device_that_is_lost_frees_who_waits_for_a_buffer() -> None:
    made = case("verbatim")
    with opened() as device:
        device.gate.clear()
        ring = ring_of(device, 2)
        running = Running(transfer(device, ring), made.copy())
        until(lambda: len(device.tickets) >= 2 and bool(ring._turns))  # it waits for a buffer
        device.lose()
        device.gate.set()
        with pytest.raises(TransferError, match="lost"):
            running.result()
        left_nothing(device, ring, at_once=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_could_not_be_filled(kind: str) -> None:
    made, calls = case(kind), list[None]()
    with opened(made.dtype) as device:
        ring = ring_of(device, 2)
        image = device.staging_memory(made.group.nbytes)

        def run(before: Callable[[], None]) -> None:
            copy = replace(made.copy(BytesReader(made.file, before)), image=image)
            transfer(device, ring).run(copy).done.result(10)

        run(lambda: calls.append(None))
        clear(device, 0)
        sent = len(device.tickets)
        for number in range(len(calls)):
            with pytest.raises(FetchError, match="on fire"):
                run(failing_at(number, FetchError("the disk is on fire")))
            assert len(device.tickets) == sent
        device.refusing = {sent}
        with pytest.raises(TransferError, match="refused"):
            run(lambda: None)
        left_nothing(device, ring, at_once=True)


class Interrupted(Future[None]):
    """Another ticket ends, in a thread of its own, while this one is asked what it failed with."""

    def __init__(self, other: Future[None]) -> None:
        super().__init__()
        self._ending = threading.Thread(target=other.set_result, args=(None,))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._ending.start()
        self._ending.join(0.05)
        return super().exception(timeout)


def test_copies_that_end_at_the_same_moment_are_both_heard() -> None:
    second: CopyTicket = Future()
    first = Interrupted(second)
    done = _all_of([first, second])
    first.set_exception(TransferError("told to fail"))
    with pytest.raises(TransferError, match="told to fail"):
        done.result(10)
