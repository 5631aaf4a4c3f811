"""Mutants of the scheduler's queue, of its requests, and of what becomes of them in a batch."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant
from ordering.scheduler_tests import (
    AHEAD,
    CANCELLED,
    CLOCK,
    CLOSING,
    ENDS,
    FLIGHTS,
    IN_QUEUE,
    PLAIN,
    SLOTS,
    WAITED_FOR,
    WAITS,
)

QUEUE = "scheduling/waiting.py"
NEWS = "scheduling/news.py"
REQUESTS = "scheduling/requests.py"
GUESTS = "scheduling/guests.py"
PICKING = "scheduling/picking.py"
BATCH = "scheduling/batch.py"


SCHEDULING_QUEUE: Mutants = {
    "ticket: a cancelled one has no deadline": mutant(
        REQUESTS,
        "        self.disarm()\n        self._future.cancel()",
        "        self._future.cancel()",
        f"{CLOCK}::test_no_alarm_outlives_what_it_was_for",
    ),
    "ticket: the scheduler hears that it was cancelled": mutant(
        REQUESTS,
        "        self._cancel(self)\n",
        "",
        f"{CANCELLED}::test_the_last_request_takes_its_load_with_it",
    ),
    "ticket: one that ended has no deadline": mutant(
        REQUESTS,
        "        self.disarm()\n        self.error = error\n",
        "        self.error = error\n",
        f"{CLOCK}::test_no_alarm_outlives_what_it_was_for",
    ),
    "ticket: who awaits it may be cancelled without it": mutant(
        REQUESTS,
        "            await asyncio.wait([self._future])\n",
        "            await self._future\n",
        f"{CANCELLED}::test_who_awaits_may_be_cancelled_without_the_request",
    ),
    "ticket: a deadline that was met is none": mutant(
        REQUESTS,
        "            self.alarm.cancel()\n",
        "",
        f"{CLOCK}::test_no_alarm_outlives_what_it_was_for",
    ),
    "news: who was woken is not woken twice": mutant(
        NEWS,
        "            if not future.done():\n                future.set_result(None)",
        "            future.set_result(None)",
        f"{ENDS}::test_close_answers_everybody",
    ),
    "news: everybody is woken": mutant(
        NEWS,
        "                future.set_result(None)\n",
        "                future.set_result(None)\n                break\n",
        f"{WAITS}::test_who_wants_a_batch_when_it_closes_wants_none",
    ),
    "news: who waits is woken in time": mutant(
        NEWS,
        "        alarm = None if due == inf else self._clock.call_at(due, self.tell)\n",
        "        alarm = None\n",
        f"{CLOCK}::test_who_streams_joins_when_it_is_time_though_nothing_tells",
    ),
    "news: who waits no longer is forgotten": mutant(
        NEWS,
        "            self._idle.discard(future)\n",
        "",
        f"{CLOCK}::test_who_streams_joins_when_it_is_time_though_nothing_tells",
    ),
    "news: nobody is woken who waits no longer": mutant(
        NEWS,
        "            if alarm is not None:\n                alarm.cancel()\n",
        "            pass\n",
        f"{CLOCK}::test_who_streams_joins_when_it_is_time_though_nothing_tells",
    ),
    "batch of rows: it is good until it was completed": mutant(
        BATCH,
        "        if self.completed:\n",
        "        if False:\n",
        f"{AHEAD}::test_a_stale_batch_is_caught",
    ),
    "batch of rows: it is good while its adapters are held": mutant(
        BATCH,
        "            if row.handle is not None and row.handle.released:",
        "            if False:",
        f"{CLOSING}::test_who_is_computed_hears_that_the_loader_was_closed",
    ),
    "batch of rows: it is good while its slots are its own": mutant(
        BATCH,
        "        require_current([row.place for row in self.rows], self.tenants)\n",
        "",
        f"{AHEAD}::test_a_stale_batch_is_caught",
    ),
    "batch of rows: a row is in one batch": mutant(
        GUESTS,
        "if ticket.flying or (fresh",
        "if (fresh",
        f"{PLAIN}::test_several_batches_may_be_under_way",
    ),
    "batch of rows: no more begin than may": mutant(
        GUESTS,
        "if ticket.flying or (fresh <= 0 and not ticket.begun):",
        "if ticket.flying:",
        f"{IN_QUEUE}::test_who_may_not_begin_takes_no_row_from_who_has_begun",
    ),
    "batch of rows: who leaves joins no batch": mutant(
        PICKING,
        "        if guest.leaving:\n            continue\n",
        "",
        f"{FLIGHTS}::test_who_is_to_leave_is_in_no_further_batch",
    ),
    "batch of rows: who waited in vain waits for all": mutant(
        PICKING,
        "if not guest.trusted or guest.arrival is None:",
        "if guest.arrival is None:",
        f"{WAITED_FOR}::test_a_pass_is_told_of_others_that_did_not_fit",
    ),
    "batch of rows: who is alone waits for a layer": mutant(
        PICKING,
        "at = now if guest.arrival.arrived else inf",
        "at = now",
        f"{WAITS}::test_a_layer_that_comes_is_computed",
    ),
    "queue: it is closed when its loads have ended": mutant(
        QUEUE,
        "        if self._tasks:\n            await asyncio.wait(self._tasks)\n",
        "        pass\n",
        f"{CLOSING}::test_it_is_closed_when_its_loads_have_ended",
    ),
    "queue: it is looked at once all has changed": mutant(
        QUEUE,
        "            asyncio.get_running_loop().call_soon(self._look)\n",
        "            self._look()\n",
        f"{IN_QUEUE}::test_an_adapter_of_which_somebody_urgent_wants_something_comes_first",
    ),
    "queue: it is looked at again": mutant(
        QUEUE,
        "        self._looking = False\n        now =",
        "        now =",
        f"{IN_QUEUE}::test_another_is_loaded_for_who_was_cancelled",
    ),
    "queue: who begins to wait is brought nearer": mutant(
        QUEUE,
        '            self._hint(errand, "disk")\n        self.look_soon()\n',
        '            self._hint(errand, "disk")\n',
        f"{WAITS}::test_who_may_not_begin_does_when_another_is_cancelled",
    ),
    "queue: who rests waits for its file": mutant(
        QUEUE,
        '        if resting:\n            self._hint(errand, "disk")\n',
        "",
        f"{SLOTS}::test_a_slot_is_not_for_who_gets_nothing_in_it_when_others_waited_before",
    ),
    "queue: who has become more urgent is brought nearer": mutant(
        QUEUE,
        """\
            insort(self._line, (errand.place, errand))
            self.look_soon()
""",
        "            insort(self._line, (errand.place, errand))\n",
        f"{IN_QUEUE}::test_an_adapter_of_which_somebody_urgent_wants_something_comes_first",
    ),
    "queue: who has become more urgent is wished for once more": mutant(
        QUEUE,
        "            self._wish(errand)  # beside",
        "            pass  # beside",
        f"{IN_QUEUE}::test_an_adapter_of_which_somebody_urgent_wants_something_comes_first",
    ),
    "queue: who waits no longer is loaded no longer": mutant(
        QUEUE,
        "        for task in errand.wishes:\n            task.cancel()\n",
        "",
        f"{WAITS}::test_who_may_not_begin_does_when_another_is_cancelled",
    ),
    "queue: and no longer hinted": mutant(
        QUEUE,
        "        for hint in errand.hints.values():\n            hint.cancel()\n",
        "",
        f"{IN_QUEUE}::test_nothing_is_loaded_when_its_hint_is_given_up",
    ),
    "queue: another is brought nearer for who waits no longer": mutant(
        QUEUE,
        "            hint.cancel()\n        self.look_soon()\n",
        "            hint.cancel()\n",
        f"{IN_QUEUE}::test_another_is_loaded_for_who_was_cancelled",
    ),
    "queue: who has no answer holds up the others for a while": mutant(
        QUEUE,
        "return not late and not errand.resting",
        "return not errand.resting",
        f"{CLOCK}::test_a_source_that_does_not_answer_holds_up_the_next_for_a_while_only",
    ),
    "queue: who rests holds up nobody": mutant(
        QUEUE,
        "return not late and not errand.resting",
        "return not late",
        f"{SLOTS}::test_who_got_nothing_in_its_slot_is_behind_those_who_may",
    ),
    "queue: patience ends in time": mutant(
        QUEUE,
        "            self._alarm = self._clock.call_at(since + self._patience, self._look)\n",
        "            pass\n",
        f"{CLOCK}::test_a_source_that_does_not_answer_holds_up_the_next_for_a_while_only",
    ),
    "queue: one alarm is for patience": mutant(
        QUEUE,
        """\
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None\
""",
        "        self._alarm = None",
        f"{CLOCK}::test_no_alarm_outlives_what_it_was_for",
    ),
    "queue: patience counts from the first load on": mutant(
        QUEUE,
        "        if not errand.wishes:\n            errand.since",
        "        if True:\n            errand.since",
        f"{CLOCK}::test_a_source_that_does_not_answer_holds_up_the_next_for_a_while_only",
    ),
    "queue: a load keeps its slot when it is through": mutant(
        QUEUE,
        """\
            async with stay as streaming:
                handle = streaming.clone()
""",
        """\
            async with stay as streaming:
                handle = streaming
""",
        f"{PLAIN}::test_a_request_is_computed_a_token_at_a_time",
    ),
    "queue: what was hinted is loaded when it is there": mutant(
        QUEUE,
        "            hint.task.add_done_callback(lambda _: self._hinted(errand, hint))\n",
        "            pass\n",
        f"{AHEAD}::test_a_slot_in_which_nothing_comes_is_given_to_others",
    ),
    "queue: a hint is for who still waits": mutant(
        QUEUE,
        """\
        if self._errands.get(errand.guest) is not errand:
            return
        for\
""",
        "        for",
        f"{IN_QUEUE}::test_nothing_is_loaded_when_its_hint_is_given_up",
    ),
    "queue: who rested is loaded when its file is here": mutant(
        QUEUE,
        """\
        errand.resting = False
        if not errand.wishes:
            self._wish(errand)\
""",
        "        errand.resting = False",
        f"{AHEAD}::test_a_slot_in_which_nothing_comes_is_given_to_others",
    ),
}
