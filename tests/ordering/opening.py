"""Mutants of how an adapter from elsewhere is found: versions, turns, and room."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

OPENING = "io/remote/opening.py"
RESOLVING = "io/remote/resolving.py"
KNOWN = "io/remote/known.py"
BEGINNING = "io/remote/beginning.py"
ELSEWHERE = "io/remote/elsewhere.py"

OF_WORKERS = "io/remote/test_remote_workers.py"
OF_SOURCE = "io/remote/test_remote_source.py::TestConformance"
AT_ANY_AWAIT = f"{OF_SOURCE}::test_cancelled_at_any_await"
WAITS = "io/remote/test_remote_waits.py"
CHECKED = "io/remote/test_remote_checked.py"
MADE_ONCE = "io/remote/test_made_once.py"
LOADS = "io/remote/test_remote_loads.py"
SIZES = "io/remote/test_fault_sizes.py"
CALLERS = "io/remote/test_remote_callers.py"
VERSIONS = "io/remote/test_remote_versions.py"

OPENINGS: Mutants = {
    "opening: an entry is let go where no thread opens it": mutant(
        OPENING,
        "            entry.close()  # it may be that no thread has begun\n",
        "",
        f"{OF_WORKERS}::test_who_is_cancelled_before_a_thread_opens_holds_no_entry",
    ),
    "opening: a reader that came too late is closed": mutant(
        OPENING,
        "partial(opened, entry, cache_key(key), self._limits), _close_reader\n",
        "partial(opened, entry, cache_key(key), self._limits)\n",
        f"{WAITS}::test_opening_what_is_here_is_cancelled_at_any_await",
    ),
    "opening: a download has ended when that is told": mutant(
        OPENING,
        "            await self._workers.finish(partial(_end, found, error))\n",
        "            self._workers.submit(partial(_end, found, error))\n",
        f"{WAITS}::test_a_download_has_ended_when_its_failure_is_told",
    ),
    "opening: first bytes are used once": mutant(
        OPENING,
        "            self._known.used(key)  # of what was refused, too: a stranger says how much it is\n",
        "            pass\n",
        f"{VERSIONS}::test_first_bytes_of_what_was_refused_are_let_go",
    ),
    "opening: what was found too late is closed": mutant(
        OPENING,
        "await self._workers.run(attempt, close)",
        "await self._workers.run(attempt)",
        AT_ANY_AWAIT,
    ),
    "opening: what was looked for too late is closed": mutant(
        OPENING,
        "await self._workers.run(look, close)",
        "await self._workers.run(look)",
        f"{WAITS}::test_opening_what_is_here_is_cancelled_at_any_await",
    ),
    "opening: who downloads is waited for": mutant(
        OPENING,
        "partial(self._attempt, key, scope, alone=alone)",
        "partial(self._attempt, key, scope, alone=True)",
        f"{LOADS}::test_two_processes_download_once",
    ),
    "opening: waiting for a download ends with the demand": mutant(
        OPENING,
        """\
        while not demand.ended:
            attempt""",
        """\
        while True:
            attempt""",
        f"{WAITS}::test_who_waits_for_others_ends_with_the_demand",
    ),
    "opening: who has room and ends is waited for": mutant(
        OPENING,
        "            except CrowdedError:\n",
        "            except ZeroDivisionError:\n",
        f"{SIZES}::test_of_two_that_do_not_fit_beside_each_other_both_come",
    ),
    "opening: waiting for room ends with the demand": mutant(
        OPENING,
        """\
        while not demand.ended:
            try""",
        """\
        while True:
            try""",
        f"{WAITS}::test_who_waits_for_others_ends_with_the_demand",
    ),
    "opening: small files are checked before they are used": mutant(
        OPENING,
        "            _check(content, file.role, expected)  # it is used before all is published\n",
        "",
        f"{CHECKED}::test_small_files_are_checked_before_they_are_used",
    ),
    "opening: who is let have it is noted": mutant(
        OPENING,
        "                found.grant(scope)\n",
        "                pass\n",
        f"{CHECKED}::test_who_was_let_have_it_has_it_while_the_source_is_down",
    ),
    "resolving: who asks is known before it is recalled": mutant(
        RESOLVING,
        """\
        await locator.scope(ref)  # from then on it is known who asks
        pinned = locator.recalled(ref)
""",
        """\
        pinned = locator.recalled(ref)
        await locator.scope(ref)
""",
        "io/remote/test_user_loads_hub.py::test_a_load_finds_what_it_has_stored",
    ),
    "resolving: what was answered is noted": mutant(
        RESOLVING,
        "        await self._note(ref, located)\n",
        "",
        "io/remote/test_fault_sources.py::test_while_the_origin_is_down",
    ),
    "resolving: it is noted again when it is another": mutant(
        RESOLVING,
        "        if self._noted.get(question) == located.version:\n",
        "        if question in self._noted:\n",
        f"{CHECKED}::test_the_last_version_is_what_is_stale",
    ),
    "resolving: another version is not taken for the one": mutant(
        RESOLVING,
        "        if found != key:\n",
        "        if False:\n",
        f"{CHECKED}::test_another_version_is_not_stored_under_the_name_of_the_one",
    ),
    "known: who asked last is in whose name it is fetched": mutant(
        KNOWN,
        "        self._asked(ref, key)\n        return key\n",
        "        return key\n",
        f"{CALLERS}::test_a_digest_is_its_callers_own",
    ),
    "beginning: what changed between two answers is noticed": mutant(
        BEGINNING,
        "            if again.known != start.known:\n",
        "            if False:\n",
        f"{CHECKED}::test_what_changes_between_two_answers_is_noticed",
    ),
    "beginning: what is too large is not asked for": mutant(
        BEGINNING,
        """\
        for file in located.files:
            self._require_size(file, file.nbytes)
""",
        "",
        f"{SIZES}::test_what_is_too_large_is_not_fetched",
    ),
    "elsewhere: all is made once": mutant(
        ELSEWHERE,
        "        with self._making:\n            if self._closed:\n",
        "        if self._making:\n            if self._closed:\n",
        f"{MADE_ONCE}::test_all_that_it_takes_is_made_once",
    ),
    "elsewhere: nothing is made after its end": mutant(
        ELSEWHERE,
        "            if self._closed:\n",
        "            if False:\n",
        f"{MADE_ONCE}::test_all_that_it_takes_is_made_once",
    ),
}
