"""Mutants of what brings adapters from elsewhere: threads, jobs, downloads, and who reads them."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

_NAMES = ("workers", "jobs", "inquiry", "fetch", "cached", "source")
WORKERS, JOBS, INQUIRY, FETCH, CACHED, SOURCE = (f"io/remote/{name}.py" for name in _NAMES)

OF_WORKERS = "io/remote/test_remote_workers.py"
OF_SOURCE = "io/remote/test_remote_source.py"
LOADS = "io/remote/test_remote_loads.py"
URGENCY = "io/remote/test_fault_urgency.py"
EVICTED = "io/remote/test_remote_evicted.py"
BYTES = "io/remote/test_fault_bytes.py"
LETS_GO = f"{OF_WORKERS}::test_what_lets_go_is_done_though_it_was_cancelled_before_it_began"
AT_ANY_AWAIT = f"{OF_SOURCE}::TestConformance::test_cancelled_at_any_await"
TWICE = f"{OF_WORKERS}::test_a_load_that_is_cancelled_twice_leaves_nothing_locked"
NOBODY_WAITS = f"{LOADS}::test_what_nobody_waits_for_ends_and_is_gone_on_with"

OF_THREADS: Mutants = {
    "workers: what came too late is undone": mutant(
        WORKERS,
        "                    undo(future.result())\n",
        "                    pass\n",
        AT_ANY_AWAIT,
    ),
    "workers: who is cancelled waits for the thread": mutant(
        WORKERS,
        """\
                await ended(future)
                if undo""",
        """\
                if not future.done():
                    raise
                if undo""",
        AT_ANY_AWAIT,
    ),
    "workers: what lets go is waited for": mutant(
        WORKERS,
        """\
        await ended(future)
        future.result()
""",
        "        await outcome(future)\n",
        LETS_GO,
    ),
    "workers: it is waited for however often that is cancelled": mutant(
        WORKERS,
        "    while not future.done():\n",
        "    if not future.done():\n",
        LETS_GO,
    ),
    "workers: the loop is woken": mutant(
        WORKERS,
        "            loop.call_soon_threadsafe(tell)\n",
        "            loop.call_soon(tell)\n",
        LETS_GO,
    ),
    "workers: close waits for what was submitted": mutant(
        WORKERS,
        "        self.threads.shutdown()\n",
        "        self.threads.shutdown(wait=False)\n",
        NOBODY_WAITS,
        AT_ANY_AWAIT,
    ),
    "jobs: they end with the demand": mutant(
        JOBS,
        "            if demand.ended:\n",
        "            if False:\n",
        NOBODY_WAITS,
    ),
    "jobs: they are as urgent as the demand": mutant(
        JOBS,
        "                job.hasten(FOREGROUND)\n",
        "                pass\n",
        f"{URGENCY}::test_a_load_of_what_is_hinted_at_hastens_it",
    ),
    "jobs: changes of the demand are heard": mutant(
        JOBS,
        """\
        with demand.watched(follow):
            yield
""",
        """\
        follow()
        yield
""",
        NOBODY_WAITS,
        f"{URGENCY}::test_a_load_of_what_is_hinted_at_hastens_it",
    ),
    "jobs: they end when one of them fails": mutant(
        JOBS,
        """\
        for job in jobs:
            job.cancel(nobody_waits())
        for job""",
        "        for job",
        f"{OF_SOURCE}::TestConformance",
        NOBODY_WAITS,
    ),
    "jobs: their threads have left when that is told": mutant(
        JOBS,
        "            await ended(job.done)\n",
        "            pass\n",
        AT_ANY_AWAIT,
        NOBODY_WAITS,
    ),
    "inquiry: what was not answered is given up": mutant(
        INQUIRY,
        """\
                job.cancel(FetchError("nobody waits for the answer any more"))
""",
        "                pass\n",
        "io/remote/test_web_given_up.py",
    ),
}

OF_FETCHES: Mutants = {
    "fetch: it is published when all of it is here": mutant(
        FETCH,
        "                    await outcome(job.done)\n",
        "                    pass\n",
        f"{LOADS}::test_an_adapter_comes_once",
    ),
    "fetch: what was published too late is closed": mutant(
        FETCH,
        "self._download.publish, lambda entry: entry.close())",
        "self._download.publish)",
        AT_ANY_AWAIT,
    ),
    "fetch: it is left before that is told": mutant(
        FETCH,
        "            await self._workers.finish(partial(self._leave, error))\n",
        "            self._workers.submit(partial(self._leave, error))\n",
        TWICE,
        NOBODY_WAITS,
    ),
    "fetch: groups are told of on the loop": mutant(
        FETCH,
        "        loop.call_soon_threadsafe(arrived, group)\n",
        "        loop.call_soon(arrived, group)\n",
        f"{LOADS}::test_the_first_layer_does_not_wait_for_the_last",
    ),
    "fetch: a group is told of when it is here": mutant(
        FETCH,
        "                    for group in arrivals.landed(number + 1, n):\n",
        "                    for group in arrivals.landed(number + 1, n + 1):\n",
        f"{OF_SOURCE}::TestConformance",
        LOADS,
    ),
    "fetch: what nobody has brought is left when its reader is closed": mutant(
        CACHED,
        "            self.taken().leave()\n",
        "            pass\n",
        f"{OF_SOURCE}::TestConformance",
    ),
    "fetch: an entry goes with the reader that was closed meanwhile": mutant(
        CACHED,
        """\
        if self._closed:
            entry.close()
""",
        "",
        AT_ANY_AWAIT,
        LOADS,
    ),
    "fetch: a reader keeps its entry": mutant(
        SOURCE,
        "            reader.adopt(entry)\n",
        "            entry.close()\n            reader.entry = None\n",
        f"{OF_SOURCE}::TestConformance",
        LOADS,
    ),
    "cached: one read opens": mutant(
        CACHED,
        "        with self._opening:\n",
        "        if self._opening:\n",
        EVICTED,
    ),
    "cached: who was closed while it was opened keeps nothing": mutant(
        CACHED,
        """\
                opened.close()
                raise gone()
""",
        "                raise gone()\n",
        f"{OF_WORKERS}::test_closing_waits_for_nobody_who_opens",
    ),
    "cached: closing does not wait for who opens": mutant(
        CACHED,
        """\
        with self._lock:
            self._closed = True
            opened = self._opened
""",
        """\
        with self._opening:
            self._closed = True
            opened = self._opened
""",
        f"{OF_WORKERS}::test_closing_waits_for_nobody_who_opens",
    ),
    "cached: what was gone stays gone": mutant(
        CACHED,
        """\
            except EvictedError:
                self._closed = True
""",
        "            except EvictedError:\n",
        f"{EVICTED}::test_what_was_gone_once_stays_gone",
    ),
    "cached: an entry is let go with its reader": mutant(
        CACHED,
        """\
        self._reader.close()
        self.entry.close()
""",
        "        self._reader.close()\n",
        f"{OF_SOURCE}::TestConformance",
        f"{OF_WORKERS}",
    ),
    "source: what is here is checked before that is told": mutant(
        SOURCE,
        "        await self._check(reader)\n",
        "",
        BYTES,
    ),
    "source: a hold is told of when all pieces are here": mutant(
        SOURCE,
        "                        await self._workers.run(partial(hold.populate, start))\n",
        "                        self._workers.submit(partial(hold.populate, start))\n",
        f"{OF_SOURCE}::TestCached",
    ),
    "source: a hold is settled": mutant(
        SOURCE,
        "                    await self._workers.run(hold.settle)\n",
        "",
        f"{OF_SOURCE}::TestCached",
    ),
    "source: a hold that nobody wants any more is closed": mutant(
        SOURCE,
        "                await self._workers.finish(hold.close)\n",
        "",
        f"{OF_SOURCE}::TestCached",
    ),
    "source: a hold that came too late is closed": mutant(
        SOURCE,
        "partial(held, entry), _close_hold)",
        "partial(held, entry))",
        f"{OF_SOURCE}::TestCached",
    ),
    "source: an entry stays until it is held": mutant(
        SOURCE,
        """\
        try:  # who is removed meanwhile looks as if he was replaced
""",
        """\
        entry.close()
        try:
""",
        f"{OF_SOURCE}::TestCached",
        "io/remote/test_cache_troubles.py::test_nobody_makes_room_of_what_is_being_held",
    ),
}

REMOTE: Mutants = {**OF_THREADS, **OF_FETCHES}
