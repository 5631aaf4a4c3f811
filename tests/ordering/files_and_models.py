"""Mutants of files that are open or mapped, and of models that compute with adapters."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

OPEN, LOCAL, MAPPED = "io/sources/checked_open.py", "io/sources/local.py", "io/mapped.py"
BATCH = "engines/batch.py"
GATE = "engines/layer_gate.py"
PLANS = "engines/last_plans.py"

OF_OPEN = "io/test_checked_open.py"
OF_FILE_READER = "io/test_file_reader.py"
OUTLIVES = f"{OF_FILE_READER}::test_a_descriptor_outlives_the_read_it_serves"
GIVEN_UP = f"{OF_OPEN}::test_closed_even_when_the_open_was_given_up"
THREADS = "engines/test_attach_threads.py"
OF_GATE = "engines/test_layer_gate.py"
ALONE = "engines/test_gate_alone.py"
LOCKS = "engines/test_engine_locks.py"

FILES: Mutants = {
    "reader: a descriptor outlives the read it serves": mutant(
        OPEN,
        "unused = not self._closed and not self._reading",
        "unused = not self._closed",
        OUTLIVES,
    ),
    "reader: the last read closes": mutant(
        OPEN,
        "            last = self._closed and not self._reading\n",
        "            last = False\n",
        OUTLIVES,
    ),
    "reader: one read opens": mutant(
        OPEN,
        "            with self._opening:\n",
        "            if self._opening:\n",
        "test_readers.py::test_two_who_read_first_open_once",
    ),
    "local: weights that are being opened are closed": mutant(
        LOCAL,
        "            opening.add_done_callback(_close)\n",
        "",
        GIVEN_UP,
    ),
    "local: an error waits for the other file": mutant(
        LOCAL,
        "                    await asyncio.wrap_future(opening)\n            raise",
        "                    pass\n            raise",
        f"{OF_OPEN}::test_an_error_waits_for_the_other_file",
    ),
    "local: a config is closed after its last hop": mutant(
        LOCAL,
        "            latest.add_done_callback(lambda _: _close(opening))\n",
        "            _close(opening)\n",
        GIVEN_UP,
        "io/test_local_source.py",
    ),
    "local: a hold that is being made is closed": mutant(
        LOCAL,
        "            beginning.add_done_callback(_close)\n",
        "",
        "io/test_local_hold.py",
        "io/test_local_source.py",
    ),
    "local: all pieces are here before the hold is": mutant(
        LOCAL,
        "                await loop.run_in_executor(self._threads, hold.populate, start)\n",
        "                loop.run_in_executor(self._threads, hold.populate, start)\n",
        "io/test_local_hold.py",
    ),
    "mapped: who populates keeps the map": mutant(
        MAPPED,
        """\
        address = ctypes.addressof(memory)
        try:
""",
        """\
        address = ctypes.addressof(memory)
        del memory
        memory = None
        try:
""",
        "io/test_mapped.py::test_closed_while_it_is_populated",
    ),
}

MODELS: Mutants = {
    "batch: adapters are in use while it runs": mutant(
        BATCH,
        "                uses.enter_context(handle.use())\n",
        "                handle.rank\n",
        f"{THREADS}::test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter",
    ),
    "batch: they are free after the last layer": mutant(
        BATCH,
        "            last = self._running == 0\n",
        "            last = self._ended\n",
        f"{THREADS}::test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter",
    ),
    "batch: a layer begins before its block ends, or not": mutant(
        BATCH,
        """\
        with self._lock:
            if self._ended:
""",
        """\
        if self._lock:
            if self._ended:
""",
        f"{LOCKS}::test_a_layer_that_begins_while_the_block_ends_keeps_its_adapters",
    ),
    "batch: layers end one after the other": mutant(
        BATCH,
        "        with self._lock:\n            self._running -= 1\n",
        "        if self._lock:\n            self._running -= 1\n",
        f"{LOCKS}::test_two_layers_that_end_at_once_are_both_over",
    ),
    "batch: its block ends before it leaves": mutant(
        BATCH,
        """\
        self._ended = True
        self._leave()  # after those that did not see it had entered
""",
        """\
        self._leave()
        self._ended = True
""",
        f"{LOCKS}::test_no_layer_begins_while_adapters_are_let_go",
    ),
    "batch: no layer begins after its block": mutant(
        BATCH,
        "            if self._ended:\n",
        "            if False:\n",
        f"{THREADS}::test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter",
    ),
    "batch: a layer passes the gate": mutant(
        BATCH,
        "        self.gate.enter(adapted.module.layer)\n",
        "",
        f"{OF_GATE}::test_a_layer_within_the_budget_is_waited_for",
    ),
    "batch: a plan knows who is out": mutant(
        BATCH,
        "        out = self.gate.slots_out\n",
        "        out = frozenset()\n",
        f"{OF_GATE}::test_a_spent_budget_takes_out_the_rows_that_wait",
    ),
    "gate: it waits for a layer": mutant(
        GATE,
        "            handle.wait_layer(layer)\n",
        "            handle.rank\n",
        f"{OF_GATE}::test_what_is_on_this_machine_is_waited_for_beyond_the_budget",
    ),
    "gate: who is alone waits for a layer": mutant(
        GATE,
        "                handle.wait_layer(layer, timeout=max(0.0, min(seconds, _LOOK_SECONDS)))\n",
        "                handle.rank\n",
        f"{ALONE}::test_who_is_alone_waits_beyond_the_budget",
    ),
    "gate: who is alone looks whether others wait": mutant(
        GATE,
        "            if self._others_wait():\n",
        "            if False:\n",
        f"{ALONE}::test_who_is_alone_waits_no_longer_when_others_could_be_computed",
    ),
    "gate: it waits for a layer within the budget": mutant(
        GATE,
        "            handle.wait_layer(layer, timeout=max(0.0, self.left))\n",
        "            handle.rank\n",
        f"{OF_GATE}::test_a_layer_within_the_budget_is_waited_for",
    ),
    "gate: what turned out to be false computes no further": mutant(
        GATE,
        "            self._go_on(handle, handle.require_sound)\n",
        "            handle.rank\n",
        "engines/test_attach_false_bytes.py::test_they_fail_and_the_others_go_on",
    ),
    "gate: the loop's own thread does not wait": mutant(
        GATE,
        "        if running_loop() is self._loop:\n",
        "        if False:\n",
        f"{THREADS}::test_the_loops_own_thread_does_not_wait_for_a_layer",
    ),
    "gate: what is here is waited for": mutant(
        GATE,
        "        if self._budget is None or handle.arrived:\n",
        "        if self._budget is None:\n",
        f"{OF_GATE}::test_what_is_on_this_machine_is_waited_for_beyond_the_budget",
    ),
    "gate: threads leave out one after the other": mutant(
        GATE,
        "        with self._lock:  # passes of several threads\n",
        "        if self._lock:\n",
        f"{LOCKS}::test_two_threads_that_leave_somebody_out_leave_both_out",
    ),
    "gate: another pass has a budget of its own": mutant(
        GATE,
        "        if layer < self._layer:\n",
        "        if False:\n",
        f"{OF_GATE}::test_each_pass_has_the_whole_budget",
    ),
    "gate: who is alone waits as long as the loader says": mutant(
        GATE,
        "            if seconds <= 0:\n",
        "            if False:\n",
        f"{ALONE}::test_who_is_alone_waits_as_long_as_the_loader_says",
    ),
    "gate: who came too late for himself is not waited for": mutant(
        GATE,
        "            handle.require_sound()  # it may have ended with such an error itself\n",
        "",
        f"{THREADS}::test_a_pass_does_not_wait_for_an_adapter_that_came_too_late_for_itself",
    ),
    "plans: one thread makes one": mutant(
        PLANS,
        "        with self._lock:\n            plan = ",
        "        if self._lock:\n            plan = ",
        f"{LOCKS}::test_two_threads_make_one_plan",
    ),
    "plans: what is being made is forgotten as well": mutant(
        PLANS,
        "        with self._lock:\n            self._plans.clear()\n",
        "        if self._lock:\n            self._plans.clear()\n",
        f"{LOCKS}::test_a_plan_that_was_being_made_is_forgotten",
    ),
    "gate: what a pass has waited counts": mutant(
        GATE,
        "            self.left -= monotonic() - began\n",
        "            pass\n",
        f"{OF_GATE}::test_each_pass_has_the_whole_budget",
    ),
}

FILES_AND_MODELS: Mutants = {**FILES, **MODELS}
