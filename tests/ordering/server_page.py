"""Mutants of the server's page: its streams, its picture, and what is recorded for it."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

COLD = "server/cold_requests.py"
ROUTES = "server/calls/page/routes.py"
TIMELINE = "server/calls/page/timeline.py"
WATCHING = "server/calls/page/watching.py"

OF_COLD = "server/page/test_cold_requests.py"
OF_EVENTS = "server/page/test_page_events.py"
AT_A_TIME = f"{OF_COLD}::test_one_thread_draws_at_a_time"
GOES = f"{OF_EVENTS}::test_a_page_that_goes_is_counted_no_more"

SERVER_PAGE: Mutants = {
    "page: a stop ends the streams": mutant(
        "server/serving.py",
        "        self._service.watching.end()\n",
        "",
        f"{OF_EVENTS}::test_a_stop_ends_the_stream_at_once",
    ),
    "page: a stream ends with its client": mutant(
        ROUTES,
        "                async with service.under_way.watched(receive):\n                    await",
        "                if True:\n                    await",
        GOES,
    ),
    "page: a stream that has ended counts no more": mutant(
        WATCHING,
        "        finally:\n            del self._open[stream]\n",
        "        finally:\n            pass\n",
        GOES,
    ),
    "page: what is asked for by several is made once": mutant(
        TIMELINE, "        async with self._making:\n", "        if True:\n", AT_A_TIME
    ),
    "cold: a recording ends with the first token": mutant(
        COLD,
        "        self.trace.stop()\n",
        "",
        f"{OF_COLD}::test_the_first_request_is_cold_and_the_second_is_not",
    ),
    "cold: its span ends": mutant(
        COLD,
        "        self._recorder.end(self._span, outcome=outcome)\n",
        "",
        f"{OF_COLD}::test_the_first_request_is_cold_and_the_second_is_not",
    ),
    "cold: a recording ends when nobody reads on": mutant(
        COLD,
        '        self._end("cancelled")\n        self._tokens.cancel()\n',
        "        self._tokens.cancel()\n",
        f"{OF_COLD}::test_one_that_nobody_reads",
    ),
    "cold: a recording ends with a refusal": mutant(
        COLD,
        '            recording.stop("refused")\n',
        "",
        f"{OF_COLD}::test_a_refused_one_is_none",
    ),
    "cold: who has ended may be recorded again": mutant(
        COLD,
        "        self._recorded.discard(as_ref(adapter))\n",
        "",
        f"{OF_COLD}::test_it_is_cold_again_once_it_has_left",
    ),
}
