"""Mutants of what records a loader: traces, how late its loop is, its numbers."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

TRACE = "tracing/trace.py"
RECORDER = "tracing/recorder.py"
COPIES = "tracing/copies.py"
STAYS = "tracing/stays.py"
LAG = "metrics/loop_lag.py"
COLLECTOR = "metrics/collector.py"

OF_TRACE = "tracing/test_trace.py"
OF_RECORDER = "tracing/test_recorder.py"
CUT = f"{OF_TRACE}::test_what_goes_on_at_the_end_is_cut_there"
OFF = f"{OF_TRACE}::test_nothing_is_recorded_or_held_when_off"
TWO = "tracing/test_trace_bounds.py::test_two_may_record_at_once"
EVICTED = f"{OF_TRACE}::test_what_is_evicted_has_its_ends"
ALL_OF_IT = f"{OF_RECORDER}::test_whoever_finds_a_recorder_finds_all_of_it"
ONCE = f"{OF_RECORDER}::test_what_has_ended_has_ended_once"
LAG_ENDS = "metrics/test_loop_lag.py::test_it_ends"
OF_COLLECTOR = "metrics/test_collector.py"
SCRAPES = "metrics/test_scrapes.py"
BUSY = f"{OF_COLLECTOR}::test_a_loop_that_does_not_answer_keeps_nobody_waiting"
ASKS = f"{OF_COLLECTOR}::test_a_scrape_in_a_thread_asks_the_loop"

TRACING: Mutants = {
    "trace: a block's end ends it": mutant(TRACE, "        self.stop()\n", "        pass\n", OFF),
    "trace: its end lets go of the recorder": mutant(
        TRACE, "        self._tracer.end(self._ring)\n", "", OFF
    ),
    "trace: it is read before its recorder is let go of": mutant(
        TRACE,
        """        self._kept = self._look()
        self._tracer.end(self._ring)
        self._recorder = None
""",
        """        self._tracer.end(self._ring)
        self._recorder = None
        self._kept = self._look()
""",
        CUT,
    ),
    "trace: what was read at its end is kept": mutant(
        TRACE,
        "        if recorder is None and kept is not None:\n            return kept\n",
        "",
        CUT,
    ),
    "trace: what goes on is in it": mutant(
        TRACE, "recorder.unfinished() if recorder is not None else []", "list[Record]()", CUT
    ),
    "trace: what is computed in vain is in it": mutant(
        TRACE,
        """        try:
            yield
        finally:
            recorder.add""",
        """        yield
        if True:
            recorder.add""",
        f"{OF_RECORDER}::test_what_is_computed_in_vain_is_in_the_trace",
    ),
    "recorder: what has begun can be read": mutant(
        RECORDER, "        self._open[id(span)] = span\n", "", ONCE
    ),
    "recorder: what has ended ends once": mutant(
        RECORDER,
        "        if self._open.pop(id(span), None) is not None:\n",
        "        if self._open.pop(id(span), None) is not None or True:\n",
        ONCE,
    ),
    "recorder: what has ended goes on no more": mutant(
        RECORDER,
        "        if self._open.pop(id(span), None) is not None:\n",
        "        if self._open.get(id(span)) is not None:\n",
        ONCE,
    ),
    "recorder: others begin while it is read": mutant(
        RECORDER,
        "spans = tuple(self._open.values())\n",
        "spans = self._open.values()\n",
        f"{OF_RECORDER}::test_others_begin_and_end_while_it_is_read",
    ),
    "recorder: two that look count one after the other": mutant(
        RECORDER,
        "        with self._looking:\n",
        "        if True:\n",
        f"{OF_RECORDER}::test_who_looks_waits_for_another_who_looks",
    ),
    "recorder: it has a ring before it is found": mutant(
        RECORDER,
        "        recorder.rings = (*recorder.rings, ring)\n        self.on = recorder\n",
        "        self.on = recorder\n        recorder.rings = (*recorder.rings, ring)\n",
        ALL_OF_IT,
    ),
    "recorder: it knows the tenants before it is found": mutant(
        RECORDER,
        "            recorder = Recorder()\n",
        "            recorder = self.on = Recorder()\n",
        ALL_OF_IT,
    ),
    "recorder: two record into one": mutant(
        RECORDER,
        "        if recorder is None:\n            recorder = Recorder()\n",
        "        if True:\n            recorder = Recorder()\n",
        TWO,
    ),
    "recorder: a ring ends alone": mutant(
        RECORDER,
        "tuple(each for each in recorder.rings if each is not ring)",
        "()",
        TWO,
    ),
    "recorder: a ring that has ended takes nothing more": mutant(
        RECORDER,
        "tuple(each for each in recorder.rings if each is not ring)",
        "recorder.rings if len(recorder.rings) > 1 else ()",
        f"{OF_RECORDER}::test_a_recording_that_has_stopped_takes_nothing_more",
    ),
    "recorder: the last ring takes it away": mutant(
        RECORDER,
        "            if not recorder.rings:\n                self.on = None\n",
        "",
        OFF,
    ),
    "copies: one ends with its ticket": mutant(
        COPIES,
        "        ticket.add_done_callback(done)\n",
        "        done(ticket) if ticket.done() else None\n",
        f"{OF_RECORDER}::test_a_copy_ends_when_its_ticket_is_done",
    ),
    "stays: what an adapter did ends before the next begins": mutant(
        STAYS, "    recorder.end(before, outcome=outcome)\n", "", EVICTED
    ),
    "stays: a slot that is nobody's has nobody": mutant(
        STAYS,
        '            recorder.end(stay.span, outcome="left")\n',
        "            pass\n",
        EVICTED,
    ),
    "lag: it looks again": mutant(
        LAG,
        "        if not self._ended():\n            self._set()\n",
        "",
        "metrics/test_loop_lag.py::test_each_look_is_counted_in_its_bucket",
    ),
    "lag: it ends": mutant(
        LAG,
        "        if not self._ended():\n            self._set()\n",
        "        self._set()\n",
        LAG_ENDS,
    ),
    "lag: its end takes the timer away": mutant(
        LAG, "            self._timer.cancel()\n", "", LAG_ENDS
    ),
    "lag: a timer that has run is none": mutant(
        LAG, "        self._timer = None\n        lag", "        lag", LAG_ENDS
    ),
    "collector: looks at the loop end with it": mutant(
        COLLECTOR,
        "        self._lag.close()\n",
        "        pass\n",
        f"{OF_COLLECTOR}::test_looks_at_the_loop_end_with_the_collector",
    ),
    "collector: looks at the loop end with the loader": mutant(
        COLLECTOR,
        "lambda: loader.closed",
        "lambda: False",
        f"{OF_COLLECTOR}::test_looks_at_the_loop_end_with_the_collector",
    ),
    "collector: the loop does not wait for itself": mutant(
        COLLECTOR,
        "        if running_loop() is self._loop or self._loop.is_closed():\n",
        "        if self._loop.is_closed():\n",
        f"{OF_COLLECTOR}::test_a_known_sequence",
    ),
    "collector: a closed loop is not asked": mutant(
        COLLECTOR,
        "        if running_loop() is self._loop or self._loop.is_closed():\n",
        "        if running_loop() is self._loop:\n",
        f"{OF_COLLECTOR}::test_a_closed_loop_is_not_asked",
    ),
    "collector: the loop is woken": mutant(
        COLLECTOR,
        "self._loop.call_soon_threadsafe(",
        "self._loop.call_soon(",
        f"{SCRAPES}::test_a_scrape_wakes_a_loop_that_sleeps",
    ),
    "collector: an answer is waited for": mutant(
        COLLECTOR,
        "done, _ = wait([answer], self._timeout)",
        "done = ()",
        f"{SCRAPES}::test_a_scrape_tells_the_numbers_of_when_the_loop_answers",
    ),
    "collector: an answer is not waited for for ever": mutant(
        COLLECTOR, "wait([answer], self._timeout)", "wait([answer])", BUSY
    ),
    "collector: a loop that closes meanwhile does not answer": mutant(
        COLLECTOR,
        "        except RuntimeError:  # it was closed now\n",
        "        except ZeroDivisionError:\n",
        f"{SCRAPES}::test_of_a_loop_that_closes_meanwhile_the_last_numbers_are_told",
    ),
    "collector: who waits no more asks no more": mutant(
        COLLECTOR, "not done and answer.cancel()", "not done and not answer.done()", BUSY
    ),
    "collector: nobody is answered who waits no more": mutant(
        COLLECTOR,
        "        if not answer.set_running_or_notify_cancel():\n            return\n",
        "",
        BUSY,
    ),
    "collector: who waits is told of an error": mutant(
        COLLECTOR,
        "            answer.set_exception(error)\n",
        "            del error\n",
        f"{OF_COLLECTOR}::test_a_look_that_fails_is_told_who_asked",
    ),
    "collector: who waits is answered": mutant(
        COLLECTOR, "            answer.set_result(None)\n", "            pass\n", ASKS
    ),
    "collector: it looks before it answers": mutant(
        COLLECTOR,
        """        try:
            self._look()
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            answer.set_exception(error)
        else:
            answer.set_result(None)
""",
        """        answer.set_result(None)
        self._loop.call_later(0.1, self._look)
""",
        ASKS,
    ),
}
