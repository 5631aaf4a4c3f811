"""Mutants of the CUDA device: what opening, closing, tickets and tables wait for."""

from __future__ import annotations

from ordering.gpu import CLEARING, CLOSING, COPY, CUDA, DEVICE, FAILURES
from ordering.mutant import Mutants, mutant

WATCHER, COLUMNS = "io/devices/watcher.py", "io/devices/columns.py"
MEMORY = "io/devices/device_memory.py"

WATCHING = "io/test_watcher.py"
BEHIND_CURRENT = f"{DEVICE}::TestOpening::test_what_stands_on_the_current_stream_comes_first"

ENDS: Mutants = {
    "cuda: close waits for the copies' news": mutant(
        CUDA,
        """\
            self._copies.end()
            self._uses.end()
""",
        """\
            self._uses.end()
""",
        f"{CLOSING}::test_waits_for_all_that_is_on_its_way",
    ),
    "cuda: close waits for the uses": mutant(
        CUDA,
        """\
            self._copies.end()
            self._uses.end()
""",
        """\
            self._copies.end()
""",
        f"{CLOSING}::test_waits_for_all_that_is_on_its_way",
    ),
    "cuda: close waits for the copy stream": mutant(
        CUDA,
        "                self._memory.stream.synchronize()  # clearings have no ticket\n",
        "                pass\n",
        f"{CLOSING}::test_waits_for_a_clearing_that_has_no_ticket",
    ),
    "cuda: the copy stream starts behind the current one": mutant(
        MEMORY,
        "        before.wait(stream)\n",
        "",
        BEHIND_CURRENT,
    ),
    "cuda: the current stream's event is recorded": mutant(
        MEMORY,
        "        before.record(stream_on(self._device, None))\n",
        "",
        BEHIND_CURRENT,
    ),
    "cuda: the tables are empty when open returns": mutant(
        MEMORY,
        "        stream.synchronize()\n",
        "",
        BEHIND_CURRENT,
    ),
}

TICKETS: Mutants = {
    "cuda: a ticket keeps its staged bytes": mutant(
        CUDA,
        "return EventTicket(self, event, piece)",
        "return EventTicket(self, event)",
        f"{COPY}::test_keeps_its_memory_alive_until_it_is_done",
    ),
    "cuda: a ticket with rows keeps its staged bytes": mutant(
        CUDA,
        "return EventTicket(self, event, piece, lambda",
        "return EventTicket(self, event, None, lambda",
        f"{COPY}::test_keeps_its_memory_alive_until_it_is_done",
    ),
    "cuda: a row image is free once its copy is done": mutant(
        CUDA,
        "        return EventTicket(self, event, piece, lambda: columns.give_back(image))\n",
        """\
        columns.give_back(image)
        return EventTicket(self, event, piece)
""",
        f"{COPY}::test_waits_while_all_row_images_are_in_use",
    ),
    "watcher: it waits for the event": mutant(
        WATCHER,
        "                ticket.event.synchronize()\n",
        "                pass\n",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "watcher: it waits again where a capture forbids it": mutant(
        WATCHER,
        "                time.sleep(_AGAIN_SECONDS)\n",
        "                return None\n",
        f"{FAILURES}::test_a_capture_of_others_delays_the_news",
    ),
    "watcher: a ticket is done after its memory is given back": mutant(
        WATCHER,
        """\
        release()
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)
""",
        """\
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)
        release()
""",
        f"{FAILURES}::TestCallbacks::test_the_row_image_is_back_before_they_run",
    ),
    "watcher: a ticket cannot be cancelled": mutant(
        WATCHER,
        "        self.set_running_or_notify_cancel()\n",
        "",
        f"{DEVICE}::TestCopying::test_tickets_cannot_be_cancelled",
    ),
    "watcher: its end is waited for": mutant(
        WATCHER,
        "            self._thread.join()\n",
        "            pass\n",
        f"{WATCHING}::test_its_end_waits_for_all_events",
    ),
    "watcher: no ticket comes behind its end": mutant(
        WATCHER,
        """\
        with self._lock:
            if self._ended:
                raise""",
        """\
        if True:
            if self._ended:
                raise""",
        f"{WATCHING}::test_no_ticket_is_lost_behind_its_end",
    ),
    "watcher: its end comes behind all tickets": mutant(
        WATCHER,
        """\
        with self._lock:
            if not self._ended:
""",
        """\
        if True:
            if not self._ended:
""",
        f"{WATCHING}::test_no_ticket_is_lost_behind_its_end",
    ),
    "tenants: weights are shown once their copy is done": mutant(
        "io/devices/tenants.py",
        "if ticket is None or not ticket.succeeded:",
        "if ticket is None:",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
}

TABLES: Mutants = {
    "columns: ranks come last": mutant(
        COLUMNS,
        """\
            self._entries[slot, rows].copy_(image.entries[copied], non_blocking=True)
            self._ranks[slot, rows].copy_(image.ranks[copied], non_blocking=True)
""",
        """\
            self._ranks[slot, rows].copy_(image.ranks[copied], non_blocking=True)
            self._entries[slot, rows].copy_(image.entries[copied], non_blocking=True)
""",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "columns: ranks are cleared first": mutant(
        COLUMNS,
        """\
        self._ranks[slot].copy_(self._zeros.ranks, non_blocking=True)
        self._entries[slot].copy_(self._zeros.entries, non_blocking=True)
""",
        """\
        self._entries[slot].copy_(self._zeros.entries, non_blocking=True)
        self._ranks[slot].copy_(self._zeros.ranks, non_blocking=True)
""",
        f"{CLEARING}::test_comes_before_the_next_tenant_and_ranks_first",
    ),
    "columns: a copy waits for a row image": mutant(
        COLUMNS,
        "return self._free.get() if rows",
        "return self._images(1, self._capacity)[0] if rows",
        f"{COPY}::test_waits_while_all_row_images_are_in_use",
    ),
}

TICKETS_AND_TABLES: Mutants = {**ENDS, **TICKETS, **TABLES}
