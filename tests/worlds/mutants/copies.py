"""Copies of layer groups: staging buffers, tickets, and reports to the loop."""

from typing import Any

from lorax_async.concurrency import Inbox
from lorax_async.devices import transfer
from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.staging import StagingBuffer, StagingRing
from lorax_async.devices.transfer import CopyThreads, GroupTransfer, SubmittedCopies
from lorax_async.lifecycle import rules
from lorax_async.lifecycle.adapter_state import AdapterState
from mutants.mutation import Mutants, NoLock, mutant, nothing, skipped

STAGING = "devices/test_staging.py::TestStagingRing"
TRANSFER = "devices/test_transfer.py"

_take, _run_from_file = StagingRing.take, GroupTransfer._run_from_file


def _given_back_at_once(self: StagingRing, count: int) -> list[StagingBuffer]:
    taken = self._free[:count]
    self._free = self._free[count:] + taken
    return taken


def _one_by_one(self: StagingRing, count: int) -> list[StagingBuffer]:
    return [buffer for _ in range(count) for buffer in _take(self, 1)]


def _rows_with_the_first(
    self: Any, copy: Any, memory: Any, target: int, pending: SubmittedCopies
) -> CopyTicket:
    rows = () if target else copy.group.rows
    ticket: CopyTicket = self.device.copy(StagedPiece(memory, target), rows, copy.extent, copy.slot)
    pending.parts.append(ticket)
    pending.tickets.append(ticket)
    return ticket


def _rows_before_the_bytes(self: GroupTransfer, copies: Any, pending: SubmittedCopies) -> None:
    for copy in copies:
        self.device.copy(None, copy.group.rows, copy.extent, copy.slot)
    _run_from_file(self, copies, pending)


def _ended_when_asked_for(self: CopyThreads, work: Any) -> None:
    self._transfer.run(work.group_copies())
    self._end(work, None)


def _flag_cleared_after(self: Inbox[Any]) -> None:
    while self.items:
        self._handle(self.items.popleft())
    self._wake_pending = False


def _by_arrival(life: AdapterState) -> tuple[bool, int, int]:
    return True, life.grant.slot.generation if life.grant else 0, 0


GROUPS: Mutants = {
    "queues: a large load does not go before smaller ones": mutant(
        "whole/test_independence.py", (rules, "_copy_order", _by_arrival)),
    "staging: a buffer is reused after its copy": mutant(
        f"{TRANSFER}::test_a_buffer_is_not_written_to_before_its_copy_is_done",
        (StagingRing, "take", _given_back_at_once)),
    "staging: a window's two buffers are taken at once": mutant(
        f"{TRANSFER}::test_two_that_need_two_buffers_of_two", (StagingRing, "take", _one_by_one)),
    "staging: a taker waits for free buffers": mutant(
        f"{STAGING}::test_takers_do_not_block_each_other",
        skipped(StagingRing, "_is_served", True)),
    "transfer: rows come with the last bytes": mutant(
        f"{TRANSFER}::test_each_read", (GroupTransfer, "_send", _rows_with_the_first)),
    "transfer: rows are written behind the bytes of a file": mutant(
        f"{TRANSFER}::test_a_reader_or_a_device_that_fails_leaves_no_row",
        (GroupTransfer, "_run_from_file", _rows_before_the_bytes)),
    "transfer: a failure waits for the copies that were sent": mutant(
        f"{TRANSFER}::test_each_read", (transfer, "wait", nothing)),
    "transfer: nothing is sent after a copy that failed": mutant(
        f"{TRANSFER}::test_nothing_is_sent_after_a_copy_that_failed",
        skipped(SubmittedCopies, "raise_failures")),
    "transfer: a group is done when all its copies are": mutant(
        f"{TRANSFER}::test_each_copy_that_fails_later",
        (SubmittedCopies, "joined", lambda self: self.parts[-1])),
    "copies: an outcome is reported when the copy is done": mutant(
        "test_handle.py::test_a_kernel_behind_copies_sees_their_bytes",
        (CopyThreads, "_run", _ended_when_asked_for)),
    "copies: ends are counted one by one": mutant(
        "runtime/test_ending.py::test_copies_that_end_at_the_same_moment_are_both_counted",
        (transfer, "Lock", NoLock)),
    "inbox: the flag is cleared before the items are taken": mutant(
        "test_concurrency.py::test_an_item_at_the_last_moment",
        (Inbox, "take", _flag_cleared_after)),
}  # fmt: skip
