"""Mutants of the devices in host memory: the CPU's, the gated and the simulated one."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

CPU, GATED, SIMULATED = (f"io/devices/{name}.py" for name in ("cpu", "gated", "simulated"))

DEVICES = "io/test_devices.py"
SIM = "io/test_simulated_device.py"
WAITS = "io/test_missing_waits.py"
TURNS = "io/test_turns.py"

IN_PLACE: Mutants = {
    "cpu: bytes come before rows": mutant(
        CPU,
        """\
            read(pieces.reader, pieces.reads, memory)
        self._write_rows(rows, extent, slot)
""",
        """\
            self._write_rows(rows, extent, slot)
            read(pieces.reader, pieces.reads, memory)
            return self._done
        self._write_rows(rows, extent, slot)
""",
        f"{DEVICES}::TestCpuDevice::test_bytes_come_before_rows",
    ),
    "cpu: staged bytes come before rows": mutant(
        CPU,
        """\
            self.host_view(target).copy_(pieces.memory)
""",
        """\
            self._write_rows(rows, extent, slot)
            self.host_view(target).copy_(pieces.memory)
""",
        f"{WAITS}::test_bytes_come_before_rows_and_rows_before_the_ticket",
    ),
    "cpu: ranks come last": mutant(
        CPU,
        """\
            self._address_words[cell] = self._base + extent.offset + a
""",
        """\
            self._rank_words[cell] = rank
            self._address_words[cell] = self._base + extent.offset + a
""",
        f"{DEVICES}::test_the_rank_is_written_last",
    ),
    "cpu: ranks are cleared first": mutant(
        CPU,
        """\
            self._rank_words[cell] = 0
            self._scale_words[cell] = 0.0
            self._address_words[cell] = 0
            self._address_words[modules * slots + cell] = 0
""",
        """\
            self._scale_words[cell] = 0.0
            self._address_words[cell] = 0
            self._address_words[modules * slots + cell] = 0
            self._rank_words[cell] = 0
""",
        f"{TURNS}::test_ranks_are_cleared_first",
    ),
    "gated: copies wait for the gate": mutant(
        GATED,
        "        self.gate.wait()\n",
        "",
        f"{DEVICES}::test_the_gated_device_does_as_told",
    ),
    "gated: each copy has a number of its own": mutant(
        GATED,
        "        with self._count:\n",
        "        if True:\n",
        f"{TURNS}::test_each_gated_copy_has_a_number_of_its_own",
    ),
}

SIMULATION: Mutants = {
    "simulated: a stream waits for its gate": mutant(
        SIMULATED,
        "        self._gate.wait()\n",
        "",
        f"{WAITS}::test_a_kernel_that_does_not_wait_reads_poison",
    ),
    "simulated: copies run on their stream": mutant(
        SIMULATED,
        """\
            ticket = self._copying.put(
                lambda ticket: self._copy(ticket, number, kept, written, extent, slot)
            )
""",
        """\
            ticket = SimulatedTicket(self)
            self._copy(ticket, number, kept, written, extent, slot)
            ticket.set_result(None)
""",
        f"{WAITS}::test_a_kernel_that_does_not_wait_reads_poison",
    ),
    "simulated: compute waits for the copy": mutant(
        SIMULATED,
        "        self._stream(stream).run(ticket.exception)",
        "        self._stream(stream)",
        f"{WAITS}::test_a_kernel_that_does_not_wait_reads_poison",
    ),
    "simulated: compute waits on the stream that was named": mutant(
        SIMULATED,
        "        self._stream(stream).run(ticket.exception)",
        "        self.compute.run(ticket.exception)",
        f"{WAITS}::test_a_wait_holds_up_its_own_stream_alone",
    ),
    "simulated: a use stands on its stream": mutant(
        SIMULATED,
        "return self._stream(stream).run(lambda: None)",
        "return self.stream('none').run(lambda: None)",
        f"{WAITS}::test_a_use_ends_after_the_kernels_before_it",
    ),
    "simulated: columns are cleared on the copy stream": mutant(
        SIMULATED,
        "self._copying.run(lambda: self._clear(index))",
        "self._clear(index)",
        f"{WAITS}::test_columns_are_cleared_in_their_turn_and_weights_with_them",
    ),
    "simulated: a ticket cannot be cancelled": mutant(
        SIMULATED,
        "        self.set_running_or_notify_cancel()\n",
        "",
        f"{SIM}::test_tickets_cannot_be_cancelled",
    ),
    "simulated: the number of a copy is its place": mutant(
        SIMULATED,
        "        with self._order:  # the number of a copy is its place in the stream\n",
        "        if True:\n",
        f"{TURNS}::test_the_number_of_a_simulated_copy_is_its_place",
    ),
    "simulated: no work comes behind a stream's end": mutant(
        SIMULATED,
        """\
        with self._lock:
            if self._ended:
                raise""",
        """\
        if True:
            if self._ended:
                raise""",
        f"{TURNS}::test_no_work_is_lost_behind_the_end_of_a_stream",
    ),
    "simulated: a stream's end comes behind all work": mutant(
        SIMULATED,
        """\
        with self._lock:
            if not self._ended:
""",
        """\
        if True:
            if not self._ended:
""",
        f"{TURNS}::test_no_work_is_lost_behind_the_end_of_a_stream",
    ),
    "simulated: the end of a stream is waited for": mutant(
        SIMULATED,
        "            self._thread.join()\n",
        "            pass\n",
        f"{SIM}::test_closing_opens_the_gate_and_ends_the_threads",
    ),
    "simulated: close waits for all streams": mutant(
        SIMULATED,
        "            stream.end()\n",
        "            pass\n",
        f"{SIM}::test_closing_opens_the_gate_and_ends_the_threads",
    ),
    "simulated: close opens the gate": mutant(
        SIMULATED,
        """\
        self.gate.set()
        for stream""",
        """\
        for stream""",
        f"{SIM}::test_closing_opens_the_gate_and_ends_the_threads",
    ),
    "simulated: copies are late by the delay": mutant(
        SIMULATED,
        "        time.sleep(self.delay)\n",
        "",
        f"{SIM}::test_copies_are_late_by_the_delay",
    ),
}

HOST: Mutants = {**IN_PLACE, **SIMULATION}
