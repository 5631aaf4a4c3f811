"""Mutants of a group's way: the ring, windows and images, I/O threads, the inbox of the loop."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

TRANSFER, STAGING = "io/transfer.py", "io/staging.py"
INBOX, COPIES = "io/inbox.py", "runtime/copies.py"

STAGED = "io/test_staged_transfer.py"
STAGED_FAILURES = "io/test_staged_failures.py"
FROM_FILES = "io/test_transfer.py"
RING = "io/test_staging.py::TestStagingRing"
IN_INBOX = "io/test_inbox.py"
OF_COPIES = "test_copies.py"

GROUPS: Mutants = {
    "transfer: a buffer is free once its copy is done": mutant(
        TRANSFER,
        "            ticket.add_done_callback(partial(_release, staging, buffer))\n",
        "            staging.release(buffer)\n",
        f"{STAGED}::test_a_buffer_is_not_written_to_before_its_copy_is_done",
    ),
    "transfer: what was sent is waited for when the rest fails": mutant(
        TRANSFER,
        "            wait(sending.tickets)\n",
        "",
        f"{STAGED_FAILURES}::test_each_read",
    ),
    "transfer: rows come with the last bytes": mutant(
        TRANSFER,
        "if target + memory.nbytes == copy.group.nbytes else ()",
        "if target == 0 else ()",
        f"{STAGED_FAILURES}::test_each_read",
    ),
    "transfer: nothing is sent after a copy that failed": mutant(
        TRANSFER,
        "            sending.heed_failures()\n",
        "",
        f"{STAGED_FAILURES}::test_nothing_is_sent_after_a_copy_that_failed",
    ),
    "transfer: a group is done when all its copies are": mutant(
        TRANSFER,
        "    if len(tickets) == 1:\n        return tickets[0]\n",
        "    if tickets:\n        return tickets[-1]\n",
        f"{STAGED_FAILURES}::test_each_copy_that_fails_later",
    ),
    "transfer: copies that end at the same time are counted apart": mutant(
        TRANSFER,
        "        with lock:\n",
        "        if lock:\n",
        f"{STAGED_FAILURES}::test_copies_that_end_at_the_same_moment_are_both_heard",
    ),
    "transfer: what is cast is there before the device is asked": mutant(
        TRANSFER,
        """\
        group, started = copy.group, perf_counter()
""",
        """\
        group, started = copy.group, perf_counter()
        early = FilePieces(copy.reader, group.reads)
        self._device.copy(early, group.rows, copy.extent, copy.slot)
""",
        f"{FROM_FILES}::test_what_is_converted_is_there_before_the_device_is_asked",
    ),
    "transfer: weights are checked once their copy is done": mutant(
        TRANSFER,
        "            ticket.result()\n            names",
        "            names",
        f"{FROM_FILES}::test_weights_are_checked_once_they_are_there",
    ),
    "transfer: staged weights are checked before they are sent": mutant(
        TRANSFER,
        """\
        if self._check_finite:
            names""",
        """\
        if self._check_finite and sending.tickets:
            names""",
        f"{STAGED}::test_weights_that_are_not_finite",
    ),
    "transfer: two buffers are taken at once": mutant(
        TRANSFER,
        "buffer, *scratch = staging.take(2 if window.converts else 1)",
        "buffer, *scratch = [*staging.take(1), *staging.take(1 if window.converts else 0)]",
        f"{STAGED}::test_two_that_need_two_buffers_of_two",
    ),
}

RING_OF_BUFFERS: Mutants = {
    "staging: a taker waits for free buffers": mutant(
        STAGING,
        "return self._turns[0] is turn and len(self._free) >= count",
        "return self._turns[0] is turn",
        RING,
    ),
    "staging: a taker waits for its turn": mutant(
        STAGING,
        "return self._turns[0] is turn and len(self._free) >= count",
        "return len(self._free) >= count",
        f"{RING}::test_who_came_first_is_served_first",
    ),
    "staging: a buffer that comes back wakes the takers": mutant(
        STAGING,
        """\
            self._free.append(buffer)
            self._changed.notify_all()
""",
        """\
            self._free.append(buffer)
""",
        f"{RING}::test_who_finds_none_waits",
    ),
    "staging: who was served wakes the next": mutant(
        STAGING,
        """\
                self._turns.remove(turn)
                self._changed.notify_all()
""",
        """\
                self._turns.remove(turn)
""",
        "io/test_staging.py::test_who_leaves_the_line_wakes_the_next",
    ),
    "staging: a buffer is held for as long as the block runs": mutant(
        STAGING,
        """\
        (buffer,) = self.take(1)
        try:
            yield buffer
        finally:
            self.release(buffer)
""",
        """\
        (buffer,) = self.take(1)
        self.release(buffer)
        yield buffer
""",
        f"{RING}::test_nobody_shares_a_buffer",
    ),
}

NEWS: Mutants = {
    "inbox: the flag is cleared before the items are taken": mutant(
        INBOX,
        """\
        self._awake = False
        self.take()
""",
        """\
        self.take()
        self._awake = False
""",
        f"{IN_INBOX}::test_an_item_that_comes_at_the_last_moment",
    ),
    "inbox: an item is left before the loop is woken": mutant(
        INBOX,
        """\
        self.leave(item)
        self.wake()
""",
        """\
        self.wake()
        self.leave(item)
""",
        IN_INBOX,
    ),
    "inbox: the flag is set before the loop is woken": mutant(
        INBOX,
        """\
        self._awake = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
""",
        """\
        try:
            self._loop.call_soon_threadsafe(self._drain)
            self._awake = True
""",
        f"{IN_INBOX}::test_a_loop_that_is_quicker_than_who_wakes_it",
    ),
    "inbox: the loop is woken": mutant(
        INBOX,
        "self._loop.call_soon_threadsafe(self._drain)",
        "self._loop.call_soon(self._drain)",
        f"{IN_INBOX}::test_a_loop_that_sleeps_is_woken",
    ),
    "inbox: the items behind one that raised are handled": mutant(
        INBOX,
        """\
                self._loop.call_soon(self._drain)
""",
        """\
                pass
""",
        f"{IN_INBOX}::test_one_that_raises_does_not_hold_up_the_rest",
        f"{IN_INBOX}::test_whoever_empties_it_hears_of_the_error_and_the_rest_follows",
    ),
    "copies: a copy has ended when it is done": mutant(
        COPIES,
        "        moved.done.add_done_callback(lambda done: self._end(work, done.exception()))\n",
        "        self._end(work, None)\n",
        f"{OF_COPIES}::test_a_copy_is_heard_of_once_it_is_done",
    ),
    "copies: an outcome is left before it is counted": mutant(
        COPIES,
        """\
        self._inbox.leave(outcome)
        if self._is_urgent(work.tenancy) or error is not None:
            self._inbox.wake()
""",
        """\
        urgent = self._is_urgent(work.tenancy) or error is not None
        self._inbox.leave(outcome)
        if urgent:
            self._inbox.wake()
""",
        f"{OF_COPIES}::test_no_outcome_is_left_behind",
    ),
    "copies: the last outcomes wake the loop": mutant(
        COPIES,
        "            return self._under_way <= self._low_water\n",
        "            return False\n",
        f"{OF_COPIES}::test_a_copy_is_heard_of_once_it_is_done",
    ),
    "copies: outcomes are counted one by one": mutant(
        COPIES,
        """\
        with self._lock:
            self._under_way -= 1
""",
        """\
        if True:
            self._under_way -= 1
""",
        f"{OF_COPIES}::test_copies_that_end_at_the_same_moment_are_both_counted",
    ),
    "copies: one that begins is counted by itself": mutant(
        COPIES,
        """\
        with self._lock:
            self._under_way += 1
""",
        """\
        if True:
            self._under_way += 1
""",
        f"{OF_COPIES}::test_one_that_begins_while_another_ends_is_counted",
    ),
    "copies: the threads' ends are waited for": mutant(
        COPIES,
        """\
        for thread in self._threads:
            thread.join()
""",
        """\
        for thread in self._threads:
            pass
""",
        f"{OF_COPIES}::test_the_end_waits_for_copies_that_were_begun",
    ),
}

PASSAGE: Mutants = {**GROUPS, **RING_OF_BUFFERS, **NEWS}
