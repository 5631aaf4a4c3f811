"""Mutants of the scheduler: who is woken, whose time is up, and what becomes of batches."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant
from ordering.scheduler_tests import (
    CANCELLED,
    CLOCK,
    CLOSING,
    DIGESTS,
    ENDS,
    FLIGHTS,
    PLAIN,
    PLAYS,
    WAITED_FOR,
    WAITS,
)

SCHEDULER = "scheduler.py"
BOOK = "scheduling/guestbook.py"


SCHEDULING: Mutants = {
    "scheduler: who wants a batch when it closes is woken": mutant(
        SCHEDULER,
        'name="lorax scheduler close")\n            self._changed()\n',
        'name="lorax scheduler close")\n',
        f"{WAITS}::test_who_wants_a_batch_when_it_closes_wants_none",
    ),
    "scheduler: closing goes on without who asked for it": mutant(
        SCHEDULER,
        "await asyncio.shield(self._closing)",
        "await self._closing",
        f"{ENDS}::test_cancelling_who_closes_does_not_stop_it",
    ),
    "scheduler: its queue is closed with it": mutant(
        BOOK,
        "        await self._waiting.close()\n",
        "        self._waiting._closed = True\n",
        f"{CLOSING}::test_it_is_closed_when_its_loads_have_ended",
    ),
    "scheduler: what is completed after its end is thrown away": mutant(
        SCHEDULER,
        """\
        if self._closing is not None:
            batch.completed = True
            return ()
""",
        "",
        f"{ENDS}::test_close_answers_everybody",
    ),
    "scheduler: who wants a batch looks whether it is closed": mutant(
        SCHEDULER,
        "        while True:\n            self._check_open()\n",
        "        while True:\n",
        f"{ENDS}::test_close_answers_everybody",
    ),
    "scheduler: a request has a deadline": mutant(
        SCHEDULER,
        "        self._arm(ticket, seconds)\n        return ticket",
        "        return ticket",
        f"{ENDS}::test_a_deadline_ends_the_waiting",
    ),
    "scheduler: who is in a batch is in time": mutant(
        SCHEDULER,
        "            ticket.flying = True\n            ticket.disarm()\n",
        "            ticket.flying = True\n",
        f"{ENDS}::test_a_request_that_has_begun_is_not_late",
    ),
    "scheduler: who waited in vain has a deadline again": mutant(
        SCHEDULER,
        """\
            self._book.begin_again(ticket)
            self._arm(ticket, self._patience)
""",
        "            self._book.begin_again(ticket)\n",
        f"{PLAYS}::test_ready_requests_are_as_fast_beside_cold_ones",
    ),
    "scheduler: who has begun has a deadline when it loses its slot": mutant(
        SCHEDULER,
        "        if ticket.begun or ticket.alarm is None:\n            self._arm(ticket, self._patience)",
        "        pass",
        f"{CLOCK}::test_who_loses_its_slot_has_all_its_time_again",
    ),
    "scheduler: who has not begun keeps its own deadline": mutant(
        SCHEDULER,
        "        if ticket.begun or ticket.alarm is None:\n            self._arm(ticket, self._patience)",
        "        self._arm(ticket, self._patience)",
        f"{CLOCK}::test_who_has_not_begun_has_its_own_time_only",
    ),
    "scheduler: a new deadline takes the place of the one before": mutant(
        SCHEDULER,
        "        ticket.disarm()\n        when =",
        "        when =",
        f"{CLOCK}::test_who_loses_its_slot_has_all_its_time_again",
    ),
    "scheduler: others have their turn before a batch": mutant(
        SCHEDULER,
        "        await asyncio.sleep(0)  # news",
        "        pass  # news",
        f"{WAITS}::test_others_have_their_turn_before_a_batch_that_is_there",
    ),
    "scheduler: what no event tells is seen before a batch": mutant(
        SCHEDULER,
        "            self._book.check()\n",
        "",
        f"{DIGESTS}::test_false_weights_are_in_no_further_batch",
    ),
    "scheduler: what no event tells is seen after a batch": mutant(
        SCHEDULER,
        "        self._book.judge(batch.guests)\n",
        "",
        f"{DIGESTS}::test_the_last_token_of_false_weights_is_none",
    ),
    "scheduler: who streams joins when it is time": mutant(
        SCHEDULER,
        "self._news.wait(picked.due)",
        "self._news.wait(inf)",
        f"{CLOCK}::test_who_streams_joins_when_it_is_time_though_nothing_tells",
    ),
    "scheduler: who may not begin makes way": mutant(
        SCHEDULER,
        "                self._book.make_way()\n",
        "                pass\n",
        f"{WAITED_FOR}::test_who_may_not_begin_keeps_no_slot_from_who_has_begun",
    ),
    "scheduler: nobody makes way while others are computed": mutant(
        SCHEDULER,
        "if places.free < 1 and not self._out:",
        "if places.free < 1:",
        f"{WAITS}::test_who_may_not_begin_keeps_its_slot_while_others_are_computed",
    ),
    "scheduler: who waits is woken": mutant(
        SCHEDULER,
        "        self._news.tell()\n        self._tell_passes()",
        "        self._tell_passes()",
        f"{WAITED_FOR}::test_next_batch_waits_until_there_is_something",
    ),
    "scheduler: a pass is told of others that come": mutant(
        SCHEDULER,
        "        self._news.tell()\n        self._tell_passes()",
        "        self._news.tell()",
        f"{WAITED_FOR}::test_who_waited_in_vain_joins_when_all_is_there",
    ),
    "scheduler: a pass is told of others that did not fit": mutant(
        SCHEDULER,
        "        self._tell_passes()  # of rows",
        "        pass  # of rows",
        f"{WAITED_FOR}::test_a_pass_is_told_of_others_that_did_not_fit",
    ),
    "scheduler: a pass is not told of others that must wait": mutant(
        SCHEDULER,
        "        if streaming and self._book.has_ready:",
        "        if streaming:",
        f"{WAITED_FOR}::test_who_waited_in_vain_joins_when_all_is_there",
    ),
    "scheduler: a pass is told that it keeps a slot in vain": mutant(
        SCHEDULER,
        "            batch.others_wait = batch.others_wait or guest in batch.guests\n",
        "            pass\n",
        f"{CLOCK}::test_a_slot_in_which_nothing_comes_is_given_away_with_its_batch",
    ),
    "scheduler: who is in a batch is in no other": mutant(
        SCHEDULER,
        "            ticket.flying = True\n",
        "",
        f"{PLAIN}::test_several_batches_may_be_under_way",
    ),
    "scheduler: who was in a batch may be in the next": mutant(
        SCHEDULER,
        "            row.ticket.flying = False\n",
        "",
        f"{PLAIN}::test_a_request_is_computed_a_token_at_a_time",
    ),
    "scheduler: who has ended meanwhile does not go on": mutant(
        SCHEDULER,
        "            if row.ticket.done:\n",
        "            if False:\n",
        f"{CANCELLED}::test_cancelled_at_every_await_of_who_serves",
    ),
    "scheduler: a batch keeps its adapters": mutant(
        SCHEDULER,
        "        for guest in batch.guests:\n            guest.flights += 1\n",
        "        for guest in batch.guests:\n            guest.flights += 0\n",
        f"{FLIGHTS}::test_an_adapter_is_given_back_after_the_last_of_its_batches",
    ),
    "scheduler: a batch gives its adapters back": mutant(
        SCHEDULER,
        "        self._book.landed(batch.guests)\n",
        "",
        f"{FLIGHTS}::test_an_adapter_is_given_back_after_the_last_of_its_batches",
    ),
    "scheduler: another engine is woken by what was completed": mutant(
        SCHEDULER,
        "        self._book.landed(batch.guests)\n        self._changed()\n",
        "        self._book.landed(batch.guests)\n",
        f"{WAITS}::test_what_one_completes_another_goes_on_with",
    ),
    "scheduler: another begins for who was cancelled": mutant(
        SCHEDULER,
        "        self._changed()  # another one may begin instead\n",
        "",
        f"{WAITS}::test_who_may_not_begin_does_when_another_is_cancelled",
    ),
}
