"""Mutants of the scheduler's slots: those in which nothing comes, and those that are left."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant
from ordering.scheduler_tests import CLOCK, ENDS, SLOTS

BOOK = "scheduling/guestbook.py"
OF_SLOTS = "scheduling/slots.py"


SCHEDULING_SLOTS: Mutants = {
    "guests: one alarm watches": mutant(
        BOOK,
        """\
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due\
""",
        "        due",
        f"{CLOCK}::test_no_alarm_outlives_what_it_was_for",
    ),
    "guests: who is in a batch is looked at now and then": mutant(
        BOOK,
        "max(due, self._looked) + self._patience",
        "due + self._patience",
        f"{CLOCK}::test_a_slot_in_which_nothing_comes_is_given_away_with_its_batch",
    ),
    "guests: a pass hears that it keeps a slot in vain": mutant(
        BOOK,
        "                self._in_the_way(guest)\n",
        "                pass\n",
        f"{CLOCK}::test_a_slot_in_which_nothing_comes_is_given_away_with_its_batch",
    ),
    "guests: only a slot in which nothing came is given away": mutant(
        BOOK,
        "            if now < latest + self._patience or not len(self._waiting):",
        "            if not len(self._waiting):",
        f"{SLOTS}::test_every_slot_is_waited_for_since_something_came_into_it",
    ),
    "guests: only to somebody who waits": mutant(
        BOOK,
        "            if now < latest + self._patience or not len(self._waiting):",
        "            if now < latest + self._patience:",
        f"{SLOTS}::test_a_slot_in_which_nothing_comes_is_kept_while_nobody_waits",
    ),
    "guests: a slot of a batch is not given away": mutant(
        BOOK,
        "            if guest.flights:\n                self._looked",
        "            if False:\n                self._looked",
        f"{CLOCK}::test_a_slot_in_which_nothing_comes_is_given_away_with_its_batch",
    ),
    "guests: what is not late yet is looked at again": mutant(
        BOOK,
        """\
                self._send_back(guest, resting=True)
        self._watch()
""",
        "                self._send_back(guest, resting=True)\n",
        f"{SLOTS}::test_every_slot_is_waited_for_since_something_came_into_it",
    ),
    "guests: it hears of nothing after its end": mutant(
        BOOK,
        "        self._unsubscribe()\n",
        "",
        f"{CLOCK}::test_no_alarm_outlives_what_it_was_for",
    ),
    "guests: nobody watches after its end": mutant(
        BOOK,
        """\
        if self._alarm is not None:
            self._alarm.cancel()
        for\
""",
        "        for",
        f"{CLOCK}::test_no_alarm_outlives_what_it_was_for",
    ),
    "guests: requests end with it": mutant(
        BOOK,
        "            self.fail(guest, error)\n        for guest in tuple(self.held)",
        "            pass\n        for guest in tuple(self.held)",
        f"{ENDS}::test_close_answers_everybody",
    ),
    "guests: slots are given back with it": mutant(
        BOOK,
        """\
        for guest in tuple(self.held):
            self._release(guest)
        await\
""",
        "        await",
        f"{ENDS}::test_close_answers_everybody",
    ),
    "slots: a slot that is to be left is known before it is given": mutant(
        OF_SLOTS,
        "                self._leaving.add(slot)\n",
        "                pass\n",
        f"{SLOTS}::test_who_is_told_to_leave_while_it_comes_leaves",
    ),
    "slots: who is told to leave while layers come is told again when they are there": mutant(
        "runtime/actions.py",
        "            if life is not None and life.told:  # or that would say that it stays\n",
        "            if False:\n",
        f"{SLOTS}::test_who_is_told_to_leave_while_layers_come_leaves_when_they_are_there",
    ),
}
