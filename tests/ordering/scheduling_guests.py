"""Mutants of the scheduler's guests: adapters with requests, and the slots that they have."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant
from ordering.scheduler_tests import (
    AHEAD,
    CANCELLED,
    CLOCK,
    CLOSING,
    ENDS,
    FAILURES,
    FLIGHTS,
    IN_QUEUE,
    PLAIN,
    SLOTS,
    WAITED_FOR,
    WAITS,
)

BOOK = "scheduling/guestbook.py"


SCHEDULING_GUESTS: Mutants = {
    "guests: who begins to wait is watched for": mutant(
        BOOK,
        """\
                self._waiting.add(guest)
                self._watch()
        self._changed()\
""",
        "                self._waiting.add(guest)\n        self._changed()",
        f"{AHEAD}::test_a_slot_in_which_nothing_comes_is_given_to_others",
    ),
    "guests: a request wakes who waits": mutant(
        BOOK,
        "                self._watch()\n        self._changed()\n",
        "                self._watch()\n",
        f"{WAITED_FOR}::test_next_batch_waits_until_there_is_something",
    ),
    "guests: a more urgent request moves its adapter forward": mutant(
        BOOK,
        "            guest.add(ticket)\n            self._waiting.update(guest)\n",
        "            guest.add(ticket)\n",
        f"{IN_QUEUE}::test_an_adapter_of_which_somebody_urgent_wants_something_comes_first",
    ),
    "guests: and back when it is gone": mutant(
        BOOK,
        """\
        if guest.tickets:
            self._waiting.update(guest)
        else\
""",
        "        if guest.tickets:\n            pass\n        else",
        f"{IN_QUEUE}::test_an_adapter_of_which_somebody_urgent_wants_something_comes_first",
    ),
    "guests: who waited in vain does not join before all is there": mutant(
        BOOK,
        "        self._guests[ticket.ref].trusted = False\n",
        "",
        f"{WAITED_FOR}::test_a_pass_is_told_of_others_that_did_not_fit",
    ),
    "guests: in its next slot it may": mutant(
        BOOK,
        "        guest.trusted = True\n",
        "",
        f"{FLIGHTS}::test_who_waited_in_vain_is_trusted_in_its_next_slot",
    ),
    "guests: a slot is kept until the last batch is completed": mutant(
        BOOK,
        "            if guest.flights:\n                continue\n",
        "",
        f"{FLIGHTS}::test_an_adapter_is_given_back_after_the_last_of_its_batches",
    ),
    "guests: a slot is kept for its batches though its requests are gone": mutant(
        BOOK,
        """\
        if not guest.flights:
            self._release(guest)

    # -- slots\
""",
        "        self._release(guest)\n\n    # -- slots",
        f"{FLIGHTS}::test_an_adapter_is_given_back_after_the_last_of_its_batches",
    ),
    "guests: what was kept for a batch is given back after it": mutant(
        BOOK,
        """\
            if not guest.tickets:
                self._release(guest)
            elif\
""",
        """\
            if not guest.tickets:
                pass
            elif\
""",
        f"{FLIGHTS}::test_an_adapter_is_given_back_after_the_last_of_its_batches",
    ),
    "guests: who is to leave leaves after its batch": mutant(
        BOOK,
        "            elif guest.leaving:\n                self._settle(guest)\n",
        "",
        f"{FLIGHTS}::test_who_is_to_leave_leaves_with_its_batch",
    ),
    "guests: a stalled slot goes with its batch": mutant(
        BOOK,
        "        self._relieve()\n\n    def fail",
        "\n    def fail",
        f"{CLOCK}::test_a_slot_in_which_nothing_comes_is_given_away_with_its_batch",
    ),
    "guests: others begin for who failed": mutant(
        BOOK,
        """\
            ticket.end(error.located(id=guest.id))
        self._changed()
""",
        "            ticket.end(error.located(id=guest.id))\n",
        f"{WAITS}::test_who_may_not_begin_does_when_another_has_failed",
    ),
    "guests: who failed gives its slot back": mutant(
        BOOK,
        "            self.places.leave(ticket)\n        self._part(guest)\n",
        "            self.places.leave(ticket)\n",
        f"{FAILURES}::test_a_failing_adapter_fails_its_requests_and_no_other",
    ),
    "guests: new requests are another guest's": mutant(
        BOOK,
        "            del self._guests[guest.ref]\n        self._waiting",
        "            pass\n        self._waiting",
        f"{CANCELLED}::test_the_last_request_takes_its_load_with_it",
    ),
    "guests: who has no requests waits no longer": mutant(
        BOOK,
        "        self._waiting.remove(guest)\n        if not guest.flights",
        "        if not guest.flights",
        f"{ENDS}::test_close_answers_everybody",
    ),
    "guests: who got a slot may be computed": mutant(
        BOOK,
        "        self._adopt(guest, handle)\n        self._changed()\n",
        "        self._adopt(guest, handle)\n",
        f"{WAITS}::test_who_has_a_slot_is_computed_though_all_of_it_came_before",
    ),
    "guests: a slot that is to be left is not settled in": mutant(
        BOOK,
        "        guest.leaving = self.slots.is_leaving(slot)\n",
        "        guest.leaving = False\n",
        f"{SLOTS}::test_who_is_told_to_leave_while_it_comes_leaves",
    ),
    "guests: it is left at once": mutant(
        BOOK,
        "        self._settle(guest)\n        self._watch()\n\n    def _release",
        "        self._watch()\n\n    def _release",
        f"{SLOTS}::test_who_is_told_to_leave_while_it_comes_leaves",
    ),
    "guests: who gets a slot while others wait is watched": mutant(
        BOOK,
        "        self._settle(guest)\n        self._watch()\n\n    def _release",
        "        self._settle(guest)\n\n    def _release",
        f"{SLOTS}::test_a_slot_is_not_for_who_gets_nothing_in_it_when_others_waited_before",
    ),
    "guests: a slot is given back": mutant(
        BOOK,
        "        handle.release()\n        self._waiting.look_soon()",
        "        self._waiting.look_soon()",
        f"{PLAIN}::test_a_request_is_computed_a_token_at_a_time",
    ),
    "guests: the next one is brought nearer then": mutant(
        BOOK,
        "        handle.release()\n        self._waiting.look_soon()\n",
        "        handle.release()\n",
        f"{IN_QUEUE}::test_the_next_one_is_brought_nearer_when_a_slot_is_given_back",
    ),
    "guests: who lost its slot is watched for": mutant(
        BOOK,
        """\
        self._waiting.add(guest, resting=resting)
        self._watch()
""",
        "        self._waiting.add(guest, resting=resting)\n",
        f"{SLOTS}::test_nor_when_another_has_lost_its_own",
    ),
    "guests: who got nothing in its slot rests": mutant(
        BOOK,
        "self._send_back(guest, resting=True)",
        "self._send_back(guest)",
        f"{SLOTS}::test_who_got_nothing_in_its_slot_is_behind_those_who_may",
    ),
    "guests: a layer wakes who waits": mutant(
        BOOK,
        "not isinstance(event, Resident)\n            self._changed()\n",
        "not isinstance(event, Resident)\n",
        f"{WAITS}::test_a_layer_that_comes_is_computed",
    ),
    "guests: who need not leave stays": mutant(
        BOOK,
        "            guest.leaving = guest.leaving and not isinstance(event, Resident)\n",
        "",
        f"{SLOTS}::test_who_need_not_leave_any_more_stays",
    ),
    "guests: a failure or a departure is heard": mutant(
        BOOK,
        "            asyncio.get_running_loop().call_soon(self._settle, guest)\n",
        "            pass\n",
        f"{FLIGHTS}::test_a_failure_is_told_beside_a_batch_that_goes_on",
    ),
    "guests: it is settled after it was told": mutant(
        BOOK,
        "            asyncio.get_running_loop().call_soon(self._settle, guest)\n",
        "            self._settle(guest)\n",
        f"{FLIGHTS}::test_a_failure_is_told_beside_a_batch_that_goes_on",
    ),
    "guests: who is to leave stays for its batches": mutant(
        BOOK,
        "elif guest.leaving and guest.tickets and not guest.flights:",
        "elif guest.leaving and guest.tickets:",
        f"{FLIGHTS}::test_who_is_to_leave_leaves_with_its_batch",
    ),
    "guests: a loader that was closed fails its requests": mutant(
        BOOK,
        "        if guest.handle.released:\n",
        "        if False:\n",
        f"{CLOSING}::test_who_is_computed_hears_that_the_loader_was_closed",
    ),
    "guests: false weights fail its requests": mutant(
        BOOK,
        "        self.judge([guest])\n",
        "",
        f"{FAILURES}::test_a_failing_adapter_fails_its_requests_and_no_other",
    ),
    "guests: who gave way keeps what it gets next": mutant(
        BOOK,
        "            guest.gave_way = self._clock.time()\n",
        "",
        f"{WAITS}::test_who_gave_way_in_vain_keeps_what_it_gets_next",
    ),
    "guests: only they make way who have not begun": mutant(
        BOOK,
        "        if in_vain and not any(guest.begun for guest in held):",
        "        if in_vain:",
        f"{WAITED_FOR}::test_who_may_not_begin_keeps_no_slot_from_who_has_begun",
    ),
}
