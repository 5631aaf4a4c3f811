"""Mutants of the CUDA device: what is put on streams, and in which order."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

CUDA, MEMORY = "io/devices/cuda.py", "io/devices/device_memory.py"

ORDER = "io/test_cuda_order.py"
DEVICE = "io/test_cuda_device.py"
FAILURES = "io/test_cuda_failures.py"
WIPING = "io/test_wiping.py"
TURNS = "io/test_cuda_turns.py"
COPY = f"{ORDER}::TestACopy"
CLEARING = f"{ORDER}::TestAClearing"
COMPUTE = f"{ORDER}::TestCompute"
CLOSING = f"{DEVICE}::TestClosing"

_PUT = """\
            ticket.error = self._put(pieces, start, slot, cells, column, image)
            if ticket.error is None:
                tenant.add(cells, ticket)
            self._record(ticket)
"""

STREAM: Mutants = {
    "cuda: the event stands behind the bytes": mutant(
        CUDA,
        _PUT,
        """\
            self._record(ticket)
            ticket.error = self._put(pieces, start, slot, cells, column, image)
            if ticket.error is None:
                tenant.add(cells, ticket)
""",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "cuda: the event stands behind the rows": mutant(
        CUDA,
        _PUT,
        """\
            ticket.error = self._put(pieces, start, slot, cells, column, None)
            tenant.add(cells, ticket)
            self._record(ticket)
            if image is not None:
                with self._memory.stream:
                    self._memory.columns.write(slot, cells, column, image)
""",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "cuda: rows are put behind the bytes": mutant(
        CUDA,
        """\
                target.copy_(piece.memory, non_blocking=True)
                if image is not None:
                    self._memory.columns.write(slot, modules, column, image)
""",
        """\
                if image is not None:
                    self._memory.columns.write(slot, modules, column, image)
                target.copy_(piece.memory, non_blocking=True)
""",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "cuda: an event is recorded at all": mutant(
        CUDA,
        "            ticket.event.record(self._memory.stream)\n",
        "            pass\n",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "cuda: the event is recorded on the copy stream": mutant(
        CUDA,
        "ticket.event.record(self._memory.stream)",
        "ticket.event.record(stream_on(self._device, None))",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "cuda: copies are put on the copy stream": mutant(
        CUDA,
        """\
            with self._memory.stream:
                target.copy_""",
        """\
            if target is not None:
                target.copy_""",
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
    ),
    "cuda: the watcher is told once the event is recorded": mutant(
        CUDA,
        """\
        try:
            ticket.event.record(self._memory.stream)
""",
        """\
        self._copies.watch(ticket)
        try:
            ticket.event.record(self._memory.stream)
""",
        f"{TURNS}::test_nothing_is_watched_before_its_event_is_recorded",
    ),
    "cuda: the watcher is told once a use is recorded": mutant(
        CUDA,
        """\
        try:
            ticket.event.record(where)
""",
        """\
        self._uses.watch(ticket)
        try:
            ticket.event.record(where)
""",
        f"{TURNS}::test_nothing_is_watched_before_its_event_is_recorded",
    ),
    "cuda: compute waits for the event": mutant(
        CUDA,
        "                ticket.event.wait(where)\n",
        "                pass\n",
        f"{COMPUTE}::test_sees_the_copy_only_if_it_waits",
    ),
    "cuda: compute waits on the stream that was named": mutant(
        CUDA,
        "where = stream_on(self._device, stream)",
        "where = stream_on(self._device, None)",
        f"{COMPUTE}::test_sees_the_copy_only_if_it_waits",
    ),
    "cuda: a use has an event": mutant(
        CUDA,
        "            ticket.event.record(where)\n",
        "            pass\n",
        f"{COMPUTE}::test_a_use_is_noted_until_it_has_run",
    ),
    "cuda: a use is recorded on its stream": mutant(
        CUDA,
        "ticket.event.record(where)",
        "ticket.event.record(self._memory.stream)",
        f"{COMPUTE}::test_a_use_is_noted_until_it_has_run",
    ),
    "cuda: a use that has no event is waited for": mutant(
        CUDA,
        "                where.synchronize()\n",
        "                pass\n",
        f"{TURNS}::test_a_use_without_an_event_is_waited_for",
    ),
    "cuda: uses have a watcher of their own": mutant(
        CUDA,
        "self._uses.watch(ticket)",
        "self._copies.watch(ticket)",
        f"{COMPUTE}::test_a_use_is_noted_until_it_has_run",
    ),
    "cuda: columns are cleared on the copy stream": mutant(
        CUDA,
        """\
                with self._memory.stream:
                    self._memory.columns.clear(slot)
""",
        """\
                self._memory.columns.clear(slot)
""",
        f"{CLEARING}",
    ),
    "cuda: what broke is zeroed on the copy stream": mutant(
        MEMORY,
        """\
        with self.stream:
            for extent""",
        """\
        if True:
            for extent""",
        f"{WIPING}::test_the_ticket_comes_after_the_zeros",
    ),
    "cuda: zeros have an event": mutant(
        CUDA,
        """\
                ticket.error = self._failures.note(error)
            self._record(ticket)
""",
        """\
                ticket.error = self._failures.note(error)
            ticket.finish(ticket.error)
""",
        f"{WIPING}::test_the_ticket_comes_after_the_zeros",
    ),
    "cuda: a copy that was begun fails after its event": mutant(
        CUDA,
        _PUT,
        """\
            ticket.error = self._put(pieces, start, slot, cells, column, image)
            if ticket.error is not None:
                ticket.finish(ticket.error)
                return ticket
            tenant.add(cells, ticket)
            self._record(ticket)
""",
        f"{FAILURES}::TestOutOfMemory::test_is_the_tickets_and_not_before_the_event",
    ),
}

LOCKS: Mutants = {
    "cuda: one copy is put at a time": mutant(
        CUDA,
        """\
        with self._order:
            try:
""",
        """\
        if True:
            try:
""",
        f"{TURNS}::test_one_thing_is_put_at_a_time",
    ),
    "cuda: a clearing is not put into the midst of a copy": mutant(
        CUDA,
        """\
        with self._order:
            self._require_open()
""",
        """\
        if True:
            self._require_open()
""",
        f"{TURNS}::test_one_thing_is_put_at_a_time",
    ),
    "cuda: close comes before or after a copy": mutant(
        CUDA,
        "with self._order:  # nothing is put on the stream from here on",
        "if True:",
        f"{TURNS}::test_close_comes_after_a_copy_that_is_being_put",
    ),
    "cuda: a copy looks again once it is its turn": mutant(
        CUDA,
        """\
            try:
                self._require_working()
                tenant""",
        """\
            try:
                tenant""",
        f"{CLOSING}::test_a_copy_that_waits_for_an_image_meanwhile",
        f"{FAILURES}::TestALostDevice::test_whoever_waits_for_a_row_image_is_told",
    ),
    "cuda: a second close waits for the first": mutant(
        CUDA,
        "        with self._closing:\n",
        "        if True:\n",
        f"{CLOSING}::test_a_second_one_waits_for_the_first",
    ),
}

GPU: Mutants = {**STREAM, **LOCKS}
