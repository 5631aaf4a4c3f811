"""Mutants of the range engine: its threads, and the one that keeps the time."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

CREW = "io/http/crew.py"
ENGINE = "io/http/engine.py"

OF_CREW = "io/http/test_http_crew.py"
ENDS = "io/http/test_http_ends.py"
NO_THREADS = f"{ENDS}::test_no_more_threads"
RESTS = f"{OF_CREW}::test_an_end_waits_for_nobody_who_rests"
BEING_STARTED = f"{OF_CREW}::test_an_end_waits_for_a_thread_that_is_being_started"
IDLE = f"{ENDS}::test_idle_threads_and_connections_end"

HTTP_CREW: Mutants = {
    "crew: who is idle is woken by what begins": mutant(
        CREW,
        "            self._desk.jobs.append(job)\n            self._desk.changed.notify_all()\n",
        "            self._desk.jobs.append(job)\n",
        f"{OF_CREW}::test_who_is_idle_begins_at_once",
    ),
    "crew: the clock is woken by what begins": mutant(
        CREW,
        "        self._woken.set()\n        self._desk.finish(job)\n",
        "        self._desk.finish(job)\n",
        f"{OF_CREW}::test_threads_for_more_work_begin_at_once",
    ),
    "crew: who is idle is woken by the end": mutant(
        CREW,
        "            jobs = list(self._desk.jobs)\n            self._desk.changed.notify_all()\n",
        "            jobs = list(self._desk.jobs)\n",
        RESTS,
    ),
    "crew: the clock is woken by the end": mutant(
        CREW,
        "        self._woken.set()\n        for job in jobs:\n",
        "        for job in jobs:\n",
        RESTS,
    ),
    "crew: who waits for another attempt is woken": mutant(
        CREW,
        "                self._desk.changed.notify_all()\n                return _TICK\n",
        "                return _TICK\n",
        f"{OF_CREW}::test_who_waits_for_another_attempt_is_woken",
    ),
    "crew: who may come back is woken": mutant(
        CREW,
        "                self._desk.changed.notify()\n",
        "                pass\n",
        f"{OF_CREW}::test_who_may_come_back_is_woken",
    ),
    "crew: an end waits for who is being started": mutant(
        CREW,
        "        with self._hiring, self._desk.changed:\n",
        "        with self._desk.changed:\n",
        BEING_STARTED,
    ),
    "crew: an end does not wait for who makes it": mutant(
        CREW,
        "        return next((thread for thread in threads if thread not in {None, current_thread()}), None)\n",
        "        return next((thread for thread in threads if thread), None)\n",
        f"{OF_CREW}::test_a_thread_of_its_own_may_end_it",
    ),
    "crew: a thread is begun by one who may be waited for": mutant(
        CREW,
        "            with self._hiring:\n                with self._desk.changed:\n                    if len",
        "            if self._hiring:\n                with self._desk.changed:\n                    if len",
        BEING_STARTED,
    ),
    "crew: a clock is begun by one who may be waited for": mutant(
        CREW,
        "        with self._hiring:\n            with self._desk.changed:\n                if self._watch",
        "        if self._hiring:\n            with self._desk.changed:\n                if self._watch",
        BEING_STARTED,
    ),
    "crew: a thread that could not be started is none": mutant(
        CREW,
        "                    self._threads.discard(thread)\n",
        "                    pass\n",
        NO_THREADS,
    ),
    "crew: a clock that could not be started is none": mutant(
        CREW,
        "                self._watch = None\n                raise FetchError",
        "                raise FetchError",
        NO_THREADS,
    ),
    "crew: a thread that ends is none": mutant(
        CREW,
        "            self._threads.discard(current_thread())\n",
        "",
        IDLE,
    ),
    "clock: there is one": mutant(
        CREW,
        "                if self._watch is not None or self.closed:\n",
        "                if self.closed:\n",
        f"{OF_CREW}::test_there_is_one_clock",
    ),
    "clock: none begins after the end": mutant(
        CREW,
        "                if self._watch is not None or self.closed:\n",
        "                if self._watch is not None:\n",
        f"{OF_CREW}::test_nothing_is_started_for_who_came_before_the_end",
    ),
    "clock: another one begins when it has ended": mutant(
        CREW,
        "                self._watch = None\n                return None\n",
        "                return None\n",
        IDLE,
    ),
    "clock: it ends when nothing is left to be given back": mutant(
        CREW,
        "        kept = self._pool.expire() or busy\n",
        "        kept = self._pool.expire()\n",
        f"{OF_CREW}::test_the_clock_sees_what_is_given_back_after_it_looked",
    ),
    "clock: it rests": mutant(
        CREW,
        "            self._woken.clear()\n",
        "            pass\n",
        f"{OF_CREW}::test_the_clock_rests_when_it_was_woken",
    ),
    "clock: it goes on while there is something to be closed": mutant(
        CREW,
        "            if self.closed or not kept:\n",
        "            if True:\n",
        IDLE,
    ),
    "engine: what is there already is told": mutant(
        ENGINE,
        "        for n in arrivals.take():\n            arrived(n)\n",
        "",
        "io/http/test_http_servers.py::test_all_is_there_already",
    ),
}
