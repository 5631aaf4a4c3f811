"""Mutants of the loader: its files, and how it obeys what was decided."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

FILES, DRIVER, ACTIONS = (f"runtime/{name}.py" for name in ("files", "driver", "actions"))

OWNERSHIP = "test_ownership.py"
REENTRY = "test_reentry.py"
FILES_ALONE = "test_files.py"

OF_FILES: Mutants = {
    "files: a hold is closed before that is told": mutant(
        FILES,
        """\
        try:
            await self._close_hold(key)
        finally:  # nothing refers""",
        """\
        try:
            self._outcomes.released(key, attempt)
            await self._close_hold(key)
        finally:  # nothing refers""",
        f"{FILES_ALONE}::test_a_hold_is_there_when_it_is_told_and_closed_when_that_is_told",
    ),
    "files: closing a hold is waited for": mutant(
        FILES,
        "                await closing\n",
        "                pass\n",
        f"{FILES_ALONE}::test_closing_a_hold_is_waited_for",
    ),
    "files: a hold is there before that is told": mutant(
        FILES,
        """\
                self.holds[key] = hold
            self._outcomes.populated(key, attempt)
""",
        """\
                self._outcomes.populated(key, attempt)
                self.holds[key] = hold
                return
            self._outcomes.populated(key, attempt)
""",
        f"{FILES_ALONE}::test_a_hold_is_there_when_it_is_told_and_closed_when_that_is_told",
    ),
    "files: one plan in a turn of the loop": mutant(
        FILES,
        "        async with self._planning:\n",
        "        if self._planning:\n",
        f"{FILES_ALONE}::test_one_plan_in_each_turn_of_the_loop",
    ),
    "files: a plan ends its turn of the loop": mutant(
        FILES,
        "            await asyncio.sleep(0)\n",
        "",
        f"{FILES_ALONE}::test_one_plan_in_each_turn_of_the_loop",
    ),
    "files: a file is published once all of it is here": mutant(
        FILES,
        "                verification = await self._bring(key, attempt, file, plan, demand)\n",
        '                verification = Verification("none")\n',
        f"{FILES_ALONE}::test_a_file_is_published_once_it_is_brought",
    ),
    "files: a fetch is over before its outcome is told": mutant(
        FILES,
        """\
        del self._demands[key]
        self._end_opening(key)
        if error is None:
            self._outcomes.published(key, attempt)
        else:
            self.close_reader(key)
            self._outcomes.fetch_failed(key, attempt, error)
""",
        """\
        if error is None:
            self._outcomes.published(key, attempt)
        else:
            self.close_reader(key)
            self._outcomes.fetch_failed(key, attempt, error)
        del self._demands[key]
        self._end_opening(key)
""",
        f"{FILES_ALONE}::test_what_is_told_may_begin_the_next_fetch",
    ),
    "files: a hint waits until its file was opened": mutant(
        FILES,
        "            await opening.wait()\n",
        "            pass\n",
        f"{FILES_ALONE}::test_who_waits_until_it_is_opened_does_not_wait_for_its_bytes",
    ),
    "files: tasks that are stopped are waited for": mutant(
        FILES,
        "        await asyncio.gather(*self._tasks, return_exceptions=True)\n",
        "",
        f"{FILES_ALONE}::test_stop_waits_for_what_its_tasks_undo",
    ),
    "files: who is populated when it closes need not be": mutant(
        FILES,
        "        self._closing = True\n",
        "        pass\n",
        f"{FILES_ALONE}::test_who_is_populated_when_it_closes_is_lost",
    ),
    "files: holds that are stopped are closed": mutant(
        FILES,
        """\
            await self._close_hold(key)

    def _spawn""",
        """\
            self._spawn("release", key, self._close_hold(key))

    def _spawn""",
        f"{FILES_ALONE}::test_closing_a_hold_is_waited_for",
    ),
    "actions: a reader stays open while it is copied from": mutant(
        ACTIONS,
        " or life.slot is SlotState.FILLING or life.copying",
        " or life.slot is SlotState.FILLING",
        "test_readers.py",
    ),
}

OBEYING: Mutants = {
    "actions: a column is cleared": mutant(
        ACTIONS,
        "            self._device.clear_column(command.grant.slot.index)\n",
        "            pass\n",
        "test_same_calls.py::test_the_simulated_device_is_asked_for_what_the_cpu_is",
        "test_same_calls.py::test_the_script_has_what_was_counted_by_hand",
    ),
    "actions: a column is cleared before its slot is used again": mutant(
        ACTIONS,
        "            self._device.clear_column(command.grant.slot.index)\n",
        """\
            from asyncio import get_running_loop

            get_running_loop().call_soon(self._device.clear_column, command.grant.slot.index)
""",
        "test_same_calls.py::test_the_script_has_what_was_counted_by_hand",
        "test_contention.py::test_whatever_happens_in_whatever_order",
    ),
    "actions: who waits is told once the rows are there": mutant(
        ACTIONS,
        """\
        tenancy.advance(command.watermark)
        if self._journal""",
        """\
        if self._journal""",
        "test_streaming.py::test_layers_come_one_by_one",
    ),
    "driver: commands are obeyed in order": mutant(
        DRIVER,
        "self._carry_out(self._commands.popleft())",
        "self._carry_out(self._commands.pop())",
        "test_loader.py",
    ),
    "driver: what a subscriber causes comes after": mutant(
        DRIVER,
        """\
        if self._obeying:
            return
""",
        "",
        f"{REENTRY}::test_what_a_subscriber_causes_comes_after",
    ),
    "driver: a finalizer decides nothing by itself": mutant(
        DRIVER,
        "        if soon:\n",
        "        if False:\n",
        f"{REENTRY}::test_a_handle_that_is_forgotten_in_the_midst_of_a_decision",
    ),
    "driver: no lease ends in the midst of a decision": mutant(
        "core/undisturbed.py",
        "before, self.deciding = self.deciding, True",
        "before = self.deciding",
        f"{REENTRY}::test_a_release_in_the_midst_of_a_decision",
    ),
    "driver: no lease ends in the midst of another's end": mutant(
        DRIVER,
        "busy = self._telling or self._obeying or self.lifecycle.deciding",
        "busy = self._obeying or self.lifecycle.deciding",
        f"{REENTRY}::test_a_release_in_the_midst_of_another",
    ),
    "driver: the ends of leases are told on the loop": mutant(
        DRIVER,
        "        if busy or running_loop() is not self._loop:\n",
        "        if busy:\n",
        f"{REENTRY}::test_ends_in_threads_are_the_loops_to_decide_on",
    ),
    "driver: who comes hears of copies that ended": mutant(
        DRIVER,
        "        self._copies.hear()\n",
        "",
        "test_streaming.py::test_who_comes_later_hears_of_the_layers_that_came_before",
    ),
    "driver: waiting wishes grow older": mutant(
        DRIVER,
        "None if due is None else self._loop.call_at(due, self._tick)",
        "None",
        "test_room.py::test_a_starving_request_ends_new_leases",
    ),
}

LOADER: Mutants = {**OF_FILES, **OBEYING}
