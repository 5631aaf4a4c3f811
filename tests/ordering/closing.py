"""Mutants of the loader's end, and of what goes on without its caller."""

from __future__ import annotations

from ordering.loader import DRIVER, OWNERSHIP
from ordering.mutant import Mutants, mutant

MACHINERY, RESOLVER, PREFETCH, ACQUIRING, TURNS = (
    f"runtime/{name}.py" for name in ("machinery", "resolver", "prefetch", "acquiring", "turns")
)

ENDING = "test_ending.py"
HINTS = "test_many_hints.py"

CLOSING: Mutants = {
    "driver: close waits for leases": mutant(
        DRIVER,
        "            await self._vacate(timeout)\n",
        "",
        f"{OWNERSHIP}::test_close_fails_waiters_and_revokes_leases",
    ),
    "driver: close gives leases their time": mutant(
        DRIVER,
        """\
            async with asyncio.timeout(timeout):
                await self._at_rest()
""",
        """\
            raise TimeoutError
""",
        f"{OWNERSHIP}::test_close_goes_on_when_its_caller_is_cancelled",
    ),
    "driver: close waits for kernels": mutant(
        DRIVER,
        """\
                lease.end("the loader was closed")
            await self._at_rest()
""",
        """\
                lease.end("the loader was closed")
""",
        f"{OWNERSHIP}::test_close_waits_for_kernels_whatever_its_deadline",
    ),
    "driver: whoever waits for rest is woken": mutant(
        DRIVER,
        "        self._rested.set()\n",
        "",
        f"{OWNERSHIP}::test_close_waits_for_kernels_whatever_its_deadline",
    ),
    "driver: rest is waited for again": mutant(
        DRIVER,
        "            self._rested.clear()\n",
        "",
        f"{OWNERSHIP}::test_close_goes_on_when_its_caller_is_cancelled",
    ),
    "driver: close waits for the tasks": mutant(
        DRIVER,
        "            await self.files.stop()\n",
        "",
        f"{ENDING}::test_a_fetch_ends_with_the_loader_even_if_close_is_broken_off",
    ),
    "machinery: I/O threads end before the device": mutant(
        MACHINERY,
        """\
    def _end(self) -> None:
        self.driver.join()
""",
        """\
    def _end(self) -> None:
        self._device.close()
        self.driver.join()
""",
        f"{ENDING}::test_the_device_ends_after_the_copies_even_if_close_is_broken_off",
    ),
    "machinery: close waits for the I/O threads": mutant(
        MACHINERY,
        "        self.driver.join()\n",
        "",
        f"{ENDING}::test_the_device_ends_after_the_copies_even_if_close_is_broken_off",
    ),
    "machinery: close waits for the metadata threads": mutant(
        MACHINERY,
        "        self._metadata.shutdown()\n        self._cache.close()\n",
        "        self._metadata.shutdown(wait=False)\n        self._cache.close()\n",
        f"{ENDING}::test_close_waits_for_what_still_runs",
    ),
    "machinery: close waits for prefetches": mutant(
        MACHINERY,
        "            await asyncio.gather(*self._prefetching, return_exceptions=True)\n",
        "",
        f"{ENDING}::test_close_waits_for_what_still_runs",
    ),
    "machinery: the end is waited for": mutant(
        MACHINERY,
        "        await done\n        thread.join()\n",
        "        thread.name\n",
        OWNERSHIP,
    ),
    "machinery: the thread that ended all has ended": mutant(
        MACHINERY,
        "        await done\n        thread.join()\n",
        "        await done\n",
        f"{ENDING}::test_not_even_the_thread_that_ended_the_others_is_left",
    ),
    "loader: close goes on without its caller": mutant(
        "loader.py",
        "        await asyncio.shield(self._closing)\n",
        "        await self._closing\n",
        f"{OWNERSHIP}::test_close_goes_on_when_its_caller_is_cancelled",
    ),
    "resolver: a question goes on without its first asker": mutant(
        RESOLVER,
        "return await asyncio.shield(task)",
        "return await task",
        "test_resolver.py::test_a_cancelled_caller_leaves_the_others_their_answer",
    ),
    "resolver: questions that are stopped are waited for": mutant(
        RESOLVER,
        "        await asyncio.gather(*tasks, return_exceptions=True)\n",
        "",
        f"{ENDING}::test_questions_that_are_stopped_are_waited_for",
    ),
    "prefetch: a few begin in a turn of the loop": mutant(
        PREFETCH,
        "                await asyncio.sleep(0)\n",
        "                pass\n",
        f"{HINTS}::test_cancelled_while_they_begin",
    ),
    "prefetch: a few are opened at a time": mutant(
        ACQUIRING,
        "nullcontext() if foreground else self._turn(ref, priority)",
        "nullcontext()",
        f"{HINTS}::test_a_load_does_not_stand_behind_them",
    ),
    "prefetch: a turn lasts until the file was opened": mutant(
        ACQUIRING,
        "                        await self._driver.files.opened(key)\n",
        "                        pass\n",
        f"{HINTS}::test_two_files_are_opened_at_a_time",
    ),
    "turns: a turn is waited for": mutant(
        TURNS,
        "        if self._free and self._held[origin] < self._most:\n",
        "        if True:\n",
        f"{HINTS}::test_turns_go_by_priority_and_pass_over_who_left",
    ),
    "turns: a turn ends": mutant(
        TURNS,
        "            self._end(origin, freed=not overdue)\n",
        "",
        f"{HINTS}::test_turns_go_by_priority_and_pass_over_who_left",
    ),
    "turns: who takes long keeps no other origin waiting": mutant(
        TURNS,
        "            self._free += 1\n",
        "",
        f"{HINTS}::test_a_turn_that_takes_long_keeps_no_other_origin_waiting",
    ),
    "turns: who is just leaving passes it on": mutant(
        TURNS,
        """\
            if mine.done() and not mine.cancelled():  # it came in the same turn of the loop
                self._end(origin, freed=True)
""",
        "",
        f"{HINTS}::test_a_turn_that_comes_to_one_who_is_just_leaving_is_passed_on",
    ),
    "prefetch: who awaits it waits for all": mutant(
        PREFETCH,
        "        await asyncio.wait([self.task])\n",
        "",
        "test_prefetch.py::test_each_tier",
    ),
    "prefetch: it is done when all that it began is": mutant(
        PREFETCH,
        "            await asyncio.wait(self._begun)\n",
        "            pass\n",
        "test_prefetch.py::test_each_tier",
    ),
}
