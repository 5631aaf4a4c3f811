"""Mutants of what tells of loads: the journal, and spans of OpenTelemetry."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

SPANS = "load_spans.py"
JOURNAL = "runtime/journal.py"

OF_SPANS = "test_load_spans.py"
STAGES = f"{OF_SPANS}::test_a_call_and_its_stages"
UNTOLD = f"{OF_SPANS}::test_nobody_is_told_of_after_the_end"
OF_JOURNAL = "test_journal.py"
FORGOTTEN = f"{OF_JOURNAL}::test_who_was_forgotten_waits_from_its_next_wish"

SPANS_AND_JOURNAL: Mutants = {
    "spans: after its end it hears of no calls": mutant(
        SPANS,
        "        self._leave_calls()\n",
        "",
        f"{OF_SPANS}::test_one_watches_and_nobody_elses_globals_are_touched",
    ),
    "spans: after its end it hears of no events": mutant(
        SPANS, "        self._leave_events()\n", "", UNTOLD
    ),
    "spans: a call that has ended is none": mutant(
        SPANS, "                del self._calls[span]\n", "", UNTOLD
    ),
    "spans: a call that has ended is in no stage": mutant(
        SPANS,
        "                call.end()\n",
        "                pass\n",
        f"{OF_SPANS}::test_streams_pins_and_cancelled_calls",
    ),
    "spans: however a call ends it is in no stage": mutant(
        SPANS,
        """                raise
            finally:
                del self._calls[span]
                self._want(call, None)
                call.end()
""",
        """                raise
            del self._calls[span]
            self._want(call, None)
            call.end()
""",
        f"{OF_SPANS}::test_errors_are_recorded",
    ),
    "spans: a stage ends before the next begins": mutant(
        SPANS,
        "        self.end()\n        self._stage = stage\n",
        "        self._stage = stage\n",
        STAGES,
    ),
    "spans: a call goes on, not back": mutant(
        SPANS,
        "        if _ORDER.index(stage) > _ORDER.index(self._stage):\n",
        "        if stage != self._stage:\n",
        "test_load_span_stages.py::test_who_is_further_than_another_caller_brings_it_stays_there",
    ),
    "journal: a story has an event before it is told": mutant(
        JOURNAL,
        """        if not isinstance(event, BytesMoved | LayerReady):
            story = self._stories.get(event.key, ())
            self._stories[event.key] = (*story[1 - STORY_LENGTH :], event)
        for callback in tuple(self._subscribers.values()):
            try:
                callback(event)
            except (Exception, CancelledError):
                _logger.exception("a subscriber failed on %s", type(event).__name__)
""",
        """        for callback in tuple(self._subscribers.values()):
            try:
                callback(event)
            except (Exception, CancelledError):
                _logger.exception("a subscriber failed on %s", type(event).__name__)
        if not isinstance(event, BytesMoved | LayerReady):
            story = self._stories.get(event.key, ())
            self._stories[event.key] = (*story[1 - STORY_LENGTH :], event)
""",
        f"{OF_JOURNAL}::test_a_story_told_by_a_subscriber_has_the_event_already",
    ),
    "journal: subscribers come and go while it tells": mutant(
        JOURNAL,
        "tuple(self._subscribers.values())",
        "self._subscribers.values()",
        f"{OF_JOURNAL}::test_subscribers_may_come_and_go_while_it_tells",
    ),
    "journal: a subscriber that fails disturbs nobody": mutant(
        JOURNAL,
        "            except (Exception, CancelledError):\n",
        "            except CancelledError:\n",
        f"{OF_JOURNAL}::test_a_subscriber_that_fails_disturbs_nobody",
    ),
    "journal: a subscriber that was cancelled disturbs nobody": mutant(
        JOURNAL,
        "            except (Exception, CancelledError):\n",
        "            except Exception:\n",
        f"{OF_JOURNAL}::test_a_subscriber_that_fails_disturbs_nobody",
    ),
    "journal: who leaves is told nothing more": mutant(
        JOURNAL,
        "lambda: self._subscribers.pop(token, None) and None",
        "lambda: None",
        f"{OF_JOURNAL}::test_every_subscriber_hears_every_event_until_it_leaves",
    ),
    "journal: who is forgotten waits for nothing": mutant(
        JOURNAL, "        self._checked.pop(key, None)\n", "", FORGOTTEN
    ),
    "journal: who has its slot waits no more": mutant(
        JOURNAL, "self._checked.pop(key, since)", "self._checked.get(key, since)", FORGOTTEN
    ),
}
