"""Leases, waiters and the loader's end: waits and wake-ups."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from lorax_async import concurrency
from lorax_async.concurrency import OrderedCalls
from lorax_async.handle import AdapterHandle
from lorax_async.runtime import leases
from lorax_async.runtime.driver import Driver, WaiterTable
from lorax_async.runtime.fetches import FetchTasks
from lorax_async.runtime.host_tier import MapTasks
from lorax_async.runtime.leases import DigestChecks, Lease, SlotOccupancy
from mutants.mutation import Mutants, NoLock, mutant, same, seen_by, skipped

HANDLES = "test_handle.py"
ENDING = "runtime/test_ending.py"
DIGESTS = "runtime/test_verification.py"

_tickets, _needed, _end = SlotOccupancy.tickets, SlotOccupancy._needed, Lease.end
_unmap = MapTasks._unmap


def _own_tickets_only(self: SlotOccupancy, layer: int) -> Any:
    found = _tickets(self, layer)
    return None if found is None else found[-1:]


def _known_tickets_only(self: SlotOccupancy, layer: int) -> Any:
    groups = range(self.watermark, self._needed(layer))
    return [self.group_tickets[group] for group in groups if group in self.group_tickets]


def _ended_unused(self: Lease, why: str = "released", *, soon: bool = False) -> None:
    self._uses = 0
    _end(self, why, soon=soon)


async def _not_waited_for(self: WaiterTable, key: Any, seconds: float) -> None:
    self._driver.execute(self._driver.lifecycle.unload(key))


def _ended_at_once(self: Driver, lease: Lease, in_use: bool, soon: bool) -> None:
    self.lease_table.end_lease(lease)
    self._execute(self.lifecycle.end_lease(lease.occupancy.key, in_use=in_use))


def _obeyed_at_once(self: Driver, decided: list[Any]) -> None:
    for command in decided:
        self._execute_one(command)
    self._rested.set()


class _NoTurn:
    def __await__(self) -> Iterator[None]:
        return iter(())


async def _unmapped_later(self: MapTasks, key: Any) -> None:
    self._spawn("release", key, _unmap(self, key))


LOADER: Mutants = {
    "occupancy: a layer is ready once its own group is": mutant(
        f"{HANDLES}::test_layers_come_one_by_one",
        (SlotOccupancy, "_needed", lambda self, layer: max(0, _needed(self, layer) - 1))),
    "occupancy: a stream waits for the copies before a layer's": mutant(
        f"{HANDLES}::test_a_stream_awaits_all_before",
        (SlotOccupancy, "tickets", _own_tickets_only)),
    "occupancy: a stream waits for all copies or is told to wait": mutant(
        f"{HANDLES}::test_a_kernel_behind_copies_sees_their_bytes",
        (SlotOccupancy, "tickets", _known_tickets_only)),
    "occupancy: a thread waits for its layer": mutant(
        f"{HANDLES}::test_layers_come_one_by_one",
        (SlotOccupancy, "wait", lambda self, layer, timeout, check: check())),
    "occupancy: a failure wakes all waiters": mutant(
        f"{HANDLES}::test_a_failure_reaches_all_who_wait",
        (SlotOccupancy, "fail", lambda self, error: setattr(self, "error", error))),
    "occupancy: the end of a lease wakes its waiters": mutant(
        f"{HANDLES}::test_a_release_ends_the_waits_of_others",
        skipped(SlotOccupancy, "wake_threads"),
        skipped(SlotOccupancy, "wake_tasks")),
    "handle: weights are shown once their layer is here": mutant(
        f"{HANDLES}::test_layers_come_one_by_one", skipped(SlotOccupancy, "is_ready", True)),
    "handle: a use ends when the device has computed": mutant(
        f"{HANDLES}::test_a_slot_is_kept_until_the_device_has_computed",
        (AdapterHandle, "_end_use", lambda self, _: self._lease.end_use())),
    "lease: a kernel outlives its lease": mutant(
        f"{HANDLES}::test_a_slot_is_kept_until_the_device_has_computed",
        (Lease, "end", _ended_unused)),
    "lease: no use begins while it ends": mutant(
        f"{HANDLES}::test_release_while_a_use_begins", seen_by(leases, "threading", Lock=NoLock)),
    "unload: it waits until the adapter is gone": mutant(
        "runtime/test_room.py::test_a_kernel_is_waited_for", (WaiterTable, "unload", _not_waited_for)),
    "driver: ends of leases in threads are decided on the loop": mutant(
        f"{HANDLES}::test_the_loop_decides_on_ends",
        (Driver, "_on_loop", lambda self, tell: self._report(tell))),
    "driver: a finalizer decides nothing by itself": mutant(
        f"{HANDLES}::test_end_in_a_decision", (Driver, "_lease_ended", _ended_at_once)),
    "driver: what a subscriber causes comes after": mutant(
        f"{HANDLES}::test_a_subscriber_unpins", (Driver, "_execute", _obeyed_at_once)),
    "fetches: a reader stays open while it is copied from": mutant(
        f"{ENDING}::test_a_file_is_opened_once_for_its_fetch_and_its_copies",
        (FetchTasks, "close_idle_reader", lambda self, key: self.close_reader(key))),
    "replace: calls with one name come in their order": mutant(
        "runtime/test_replacing.py::test_several_replacements_at_once_come_in_their_order",
        (OrderedCalls, "enter", lambda *_: nullcontext(_NoTurn()))),
    "files: closing a hold is waited for": mutant(
        f"{ENDING}::test_unmap_is_awaited", (MapTasks, "_unmap", _unmapped_later)),
    "digests: a load waits for the comparison": mutant(
        f"{DIGESTS}::test_a_digest_is_compared_for_its_caller_alone",
        skipped(DigestChecks, "require")),
    "resolver: a resolve outlives its first caller": mutant(
        "test_loader.py::test_a_cancelled_caller_leaves_the_others_their_answer",
        seen_by(concurrency, "asyncio", shield=same)),
    "close: leases have their time": mutant(
        f"{ENDING}::test_close_fails_waiters_and_revokes_leases", skipped(Driver, "_vacate")),
    "close: kernels are waited for": mutant(
        f"{ENDING}::test_close_waits_for_kernels_whatever_its_deadline",
        skipped(Driver, "_at_rest")),
    "close: fetches have ended": mutant(
        f"{ENDING}::test_undo_is_awaited", skipped(FetchTasks, "stop")),
    "close: the device ends after the copies": mutant(
        f"{ENDING}::test_the_device_outlives_copies", skipped(Driver, "join")),
    "close: it goes on without its caller": mutant(
        "whole/test_sweep.py::test_close_at_every_turn_of_everything",
        seen_by(concurrency, "asyncio", shield=same)),
}  # fmt: skip
