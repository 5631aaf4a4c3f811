"""Mutants of the server's engine: its loop, its thread, its ends."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

ENGINE = "server/engine.py"

OF_ENGINE = "server/test_engine.py"
ENDS = "server/test_engine_ends.py"
TURNS = "server/test_engine_turns.py"
DRAINS = f"{ENDS}::test_draining_ends_what_was_taken_and_takes_nothing_more"
CLOSES = f"{ENDS}::test_closing_fails_the_rest_after_the_step_that_is_computed"
LEAVES_NO_THREAD = f"{TURNS}::test_a_decoder_that_cannot_forget_leaves_no_thread"
FAILS = f"{TURNS}::test_an_engine_that_fails_tells_everybody"
FALSE = f"{TURNS}::test_no_token_of_an_adapter_that_was_false_comes_out"
NEXT = f"{OF_ENGINE}::test_who_comes_later_joins_those_under_way"
COUNTED = f"{OF_ENGINE}::test_what_waits_is_counted_until_something_of_it_was_computed"

SERVER_ENGINE: Mutants = {
    "server engine: a drain takes nothing more": mutant(
        ENGINE,
        '        self._refusing = "the server is closing"\n',
        "",
        DRAINS,
    ),
    "server engine: a drain waits for the last one": mutant(
        ENGINE,
        "                await self._ended.wait()\n",
        "                pass\n",
        DRAINS,
    ),
    "server engine: a drain waits for who was taken": mutant(
        ENGINE,
        "        self._ended.clear()\n",
        "",
        DRAINS,
    ),
    "server engine: the last one who leaves ends a drain": mutant(
        ENGINE,
        "        if not self._answers:\n            self._ended.set()\n",
        "",
        DRAINS,
    ),
    "server engine: only the last one who leaves ends a drain": mutant(
        ENGINE,
        "        if not self._answers:\n            self._ended.set()\n",
        "        self._ended.set()\n",
        DRAINS,
    ),
    "server engine: a drain has its time": mutant(
        ENGINE,
        "asyncio.timeout(timeout)",
        "asyncio.timeout(None)",
        CLOSES,
    ),
    "server engine: it is closed once": mutant(
        ENGINE,
        "        if self._closing is None:\n            self._refusing",
        "        if True:\n            self._refusing",
        CLOSES,
    ),
    "server engine: one that closes takes nobody": mutant(
        ENGINE,
        '            self._refusing = "the engine was closed"\n',
        "",
        f"{TURNS}::test_nobody_is_taken_while_it_closes",
    ),
    "server engine: who closes may be cancelled": mutant(
        ENGINE,
        "        await asyncio.shield(self._closing)\n",
        "        await self._closing\n",
        f"{TURNS}::test_cancelling_who_closes_it_does_not_stop_it",
    ),
    "server engine: the end ends those under way": mutant(
        ENGINE,
        '        self._end_all(LoaderClosedError("the engine was closed"))\n',
        "",
        CLOSES,
    ),
    "server engine: the end tells before the step that is computed ends": mutant(
        ENGINE,
        "            if answer.ticket.cancel():\n                answer.end(error)\n",
        "            answer.ticket.cancel()\n",
        FAILS,
    ),
    "server engine: the end does not break off who has ended": mutant(
        ENGINE,
        "            if answer.ticket.cancel():\n                answer.end(error)\n",
        "            answer.ticket.cancel()\n            answer.end(error)\n",
        f"{TURNS}::test_who_had_ended_when_it_closes_is_not_broken_off",
    ),
    "server engine: the end ends who waits for a batch": mutant(
        ENGINE,
        "            self._running.cancel()\n",
        "            pass\n",
        NEXT,
    ),
    "server engine: the end waits for the step": mutant(
        ENGINE,
        "            await self._in_thread(self._forget, self._take_gone())\n",
        "            self._forget(self._take_gone())\n",
        CLOSES,
    ),
    "server engine: the end waits for the step in its thread": mutant(
        ENGINE, "ThreadPoolExecutor(1,", "ThreadPoolExecutor(2,", CLOSES
    ),
    "server engine: the end forgets all": mutant(
        ENGINE,
        "            await self._in_thread(self._forget, self._take_gone())\n",
        "            pass\n",
        NEXT,
    ),
    "server engine: the end ends the thread": mutant(
        ENGINE,
        "            self._thread.shutdown()  # it has nothing to do any more\n",
        "            pass\n",
        NEXT,
    ),
    "server engine: the end ends the thread, whatever a decoder says": mutant(
        ENGINE,
        """        try:  # behind the step that is computed, if there is one
            await self._in_thread(self._forget, self._take_gone())
        finally:
            self._thread.shutdown()  # it has nothing to do any more
""",
        """        await self._in_thread(self._forget, self._take_gone())
        self._thread.shutdown()
""",
        LEAVES_NO_THREAD,
    ),
    "server engine: what is refused was not queued": mutant(
        ENGINE,
        """        self._check(generation)
        ticket = self._scheduler.submit(request)
""",
        """        ticket = self._scheduler.submit(request)
        self._check(generation)
""",
        f"{OF_ENGINE}::test_what_can_never_be_computed_is_refused",
    ),
    "server engine: who is done is told": mutant(
        ENGINE,
        "        ticket.add_done_callback(partial(self._leave, answer))\n",
        "",
        NEXT,
    ),
    "server engine: who leaves waits no more": mutant(
        ENGINE,
        "        self._waiting.discard(answer)\n        self._gone",
        "        self._gone",
        COUNTED,
    ),
    "server engine: who was computed waits no more": mutant(
        ENGINE,
        "            self._waiting.discard(answer)\n            if",
        "            if",
        f"{TURNS}::test_who_was_out_of_its_first_step_still_waits",
    ),
    "server engine: who leaves is forgotten": mutant(
        ENGINE,
        "        self._gone.append(answer.number)\n",
        "",
        f"{ENDS}::test_cancelled_while_it_is_computed",
    ),
    "server engine: who is about to leave is forgotten": mutant(
        ENGINE,
        "        gone, self._gone = self._gone + untold, []\n",
        "        gone, self._gone = self._gone, []\n",
        f"{ENDS}::test_who_has_gone_has_left_its_place_before_another_takes_it",
    ),
    "server engine: a scheduler's end is its own": mutant(
        ENGINE,
        '            self._refusing = "the scheduler was closed"\n',
        "            raise\n",
        f"{ENDS}::test_a_scheduler_that_closes_first_ends_the_engine",
    ),
    "server engine: one that has failed takes nobody": mutant(
        ENGINE,
        '            self._refusing = "the engine has failed"\n',
        "",
        FAILS,
    ),
    "server engine: one that has failed keeps nobody waiting": mutant(
        ENGINE,
        "            self._end_all(failed)\n",
        "",
        FAILS,
    ),
    "server engine: a batch is completed before its tokens are given": mutant(
        ENGINE,
        """        again = self._scheduler.complete(
            work.batch, finished, again=outcome.again, failed=outcome.failed
        )
        for row, answer in work.rows:
            if row.ticket in again:
                if answer in outcome.tokens:  # its first one, which does not count
                    answer.sampler = Sampler(answer.generation.sampling)
                continue
            self._waiting.discard(answer)
            if answer in outcome.tokens and _counts(row.ticket):
                answer.add(outcome.tokens[answer])
""",
        """        again = set(outcome.again)
        for row, answer in work.rows:
            if row.ticket in again:
                continue
            self._waiting.discard(answer)
            if answer in outcome.tokens and _counts(row.ticket):
                answer.add(outcome.tokens[answer])
        self._scheduler.complete(work.batch, finished, again=outcome.again, failed=outcome.failed)
""",
        FALSE,
    ),
    "server engine: who was out of a step goes on waiting": mutant(
        ENGINE,
        "            if row.ticket in again:\n",
        "            if False:\n",
        f"{TURNS}::test_who_was_out_of_its_first_step_still_waits",
    ),
    "server engine: who has gone gets no token": mutant(
        ENGINE,
        "    return not ticket.cancelled and ticket.error is None\n",
        "    return ticket.error is None\n",
        f"{ENDS}::test_cancelled_while_it_is_computed",
    ),
    "server engine: whose adapter was false gets no token": mutant(
        ENGINE,
        "    return not ticket.cancelled and ticket.error is None\n",
        "    return not ticket.cancelled\n",
        FALSE,
    ),
    "server engine: a step that was asked for forgets who has gone": mutant(
        ENGINE,
        "        return await asyncio.shield(done)\n",
        "        return await done\n",
        f"{TURNS}::test_a_step_that_is_not_begun_with_forgets_who_has_gone",
    ),
    "server engine: the loop is free while a step is computed": mutant(
        ENGINE,
        "        done = loop.run_in_executor(self._thread, copy_context().run, work, *given)\n"
        "        return await asyncio.shield(done)\n",
        "        del loop\n        return copy_context().run(work, *given)\n",
        f"{OF_ENGINE}::test_the_loop_is_free_while_a_step_is_computed",
    ),
}
