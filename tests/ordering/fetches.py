"""Mutants of adapters from elsewhere on their way: who brings, reads and holds them."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

FETCH = "io/remote/fetch.py"
CACHED = "io/remote/cached.py"
SOURCE = "io/remote/source.py"

THREADS = "io/remote/test_remote_fetch.py"
OF_WORKERS = "io/remote/test_remote_workers.py"
OF_SOURCE = "io/remote/test_remote_source.py"
LOADS = "io/remote/test_remote_loads.py"
WAITS = "io/remote/test_remote_waits.py"
EVICTED = "io/remote/test_remote_evicted.py"
BYTES = "io/remote/test_fault_bytes.py"
TWICE = f"{OF_WORKERS}::test_a_load_that_is_cancelled_twice_leaves_nothing_locked"
NOBODY_WAITS = f"{LOADS}::test_what_nobody_waits_for_ends_and_is_gone_on_with"

FETCHES: Mutants = {
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
        f"{WAITS}::test_bringing_is_cancelled_at_any_await",
    ),
    "fetch: it is left before that is told": mutant(
        FETCH,
        "            await self._workers.finish(partial(self._leave, demand.refused or error))\n",
        "            self._workers.submit(partial(self._leave, demand.refused or error))\n",
        TWICE,
        NOBODY_WAITS,
    ),
    "fetch: groups are told of on the loop": mutant(
        FETCH,
        "        loop.call_soon_threadsafe(arrived, group)\n",
        "        arrived(group)\n",
        f"{WAITS}::test_groups_are_told_of_on_the_loop",
    ),
    "fetch: a group is told of when it is here": mutant(
        FETCH,
        "                    for group in arrivals.landed(number + 1, n):\n",
        "                    for group in arrivals.landed(number + 1, n + 1):\n",
        f"{OF_SOURCE}::TestConformance::test_rows_come_one_after_the_other",
    ),
    "fetch: what nobody has brought is left when its reader is closed": mutant(
        CACHED,
        "            self.taken().leave()\n",
        "            pass\n",
        f"{OF_SOURCE}::TestConformance::test_an_opened_adapter_has_config_and_header",
    ),
    "fetch: an entry goes with the reader that was closed meanwhile": mutant(
        CACHED,
        """\
        if self._closed:
            entry.close()
""",
        "",
        f"{WAITS}::test_a_reader_that_is_closed_while_it_is_brought_keeps_nothing",
    ),
    "fetch: a reader keeps its entry": mutant(
        SOURCE,
        "            reader.adopt(entry)\n",
        "            entry.close()\n            reader.entry = None\n",
        f"{WAITS}::test_an_entry_stays_for_as_long_as_it_is_read",
    ),
    "fetch: groups of several files are told of in their order": mutant(
        FETCH,
        "                with self._lock:\n                    for group in arrivals",
        "                if self._lock:\n                    for group in arrivals",
        f"{THREADS}::test_groups_of_two_files_are_told_of_in_their_order",
    ),
    "fetch: one thread hashes a file": mutant(
        FETCH,
        "        if before is None or before.done():\n",
        "        if True:\n",
        f"{THREADS}::test_one_thread_hashes_a_file",
    ),
    "fetch: a file is hashed on": mutant(
        FETCH,
        "        if before is None or before.done():\n",
        "        if before is None:\n",
        f"{THREADS}::test_one_thread_hashes_a_file",
    ),
    "fetch: who hashes is waited for": mutant(
        FETCH,
        "                hashing.exception()\n",
        "                pass\n",
        f"{THREADS}::test_nothing_reads_a_download_that_has_ended",
    ),
    "fetch: who has not begun to hash does not": mutant(
        FETCH,
        "            if not hashing.cancel():\n",
        "            if hashing.running():\n",
        f"{THREADS}::test_nothing_reads_a_download_that_has_ended",
    ),
    "cached: one read opens": mutant(
        CACHED,
        "        with self._opening:\n",
        "        if self._opening:\n",
        f"{EVICTED}::test_many_first_reads_open_it_once",
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
        f"{OF_SOURCE}::TestConformance::test_rows_come_one_after_the_other",
    ),
    "source: what is here is checked before that is told": mutant(
        SOURCE,
        "        await self._check(reader)\n",
        "",
        f"{BYTES}::test_what_nobody_promised_is_taken_and_named_so",
    ),
    "source: a hold is told of when all pieces are here": mutant(
        SOURCE,
        "                        await self._workers.run(partial(hold.populate, start))\n",
        "                        self._workers.submit(partial(hold.populate, start))\n",
        f"{WAITS}::test_a_hold_is_settled_when_all_of_it_is_here",
    ),
    "source: a hold is settled": mutant(
        SOURCE,
        "                    await self._workers.run(hold.settle)\n",
        "",
        f"{WAITS}::test_a_hold_is_settled_when_all_of_it_is_here",
    ),
    "source: a hold that nobody wants any more is closed": mutant(
        SOURCE,
        "                await self._workers.finish(hold.close)\n",
        "",
        f"{OF_SOURCE}::TestCached::test_cancelled_at_any_await_of_populate",
    ),
    "source: a hold that came too late is closed": mutant(
        SOURCE,
        "partial(held, entry), _close_hold)",
        "partial(held, entry))",
        f"{OF_SOURCE}::TestCached::test_cancelled_at_any_await_of_populate",
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
        "io/remote/test_cache_troubles.py::test_nobody_makes_room_of_what_is_being_held",
    ),
}
