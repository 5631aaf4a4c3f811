"""Mutants of how an adapter from elsewhere is found: versions, turns, and the hub's cache."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

_NAMES = ("opening", "resolving", "known", "beginning", "elsewhere")
OPENING, RESOLVING, KNOWN, BEGINNING, ELSEWHERE = (f"io/remote/{name}.py" for name in _NAMES)
_HUBS = ("hub", "hub_first", "hub_cache", "hub_download", "hub_writing")
HUB, HUB_FIRST, HUB_CACHE, HUB_DOWNLOAD, HUB_WRITING = (f"io/remote/{name}.py" for name in _HUBS)

OF_WORKERS = "io/remote/test_remote_workers.py"
OF_SOURCE = "io/remote/test_remote_source.py::TestConformance"
AT_ANY_AWAIT = f"{OF_SOURCE}::test_cancelled_at_any_await"
LOADS = "io/remote/test_remote_loads.py"
SIZES = "io/remote/test_fault_sizes.py"
BYTES = "io/remote/test_fault_bytes.py"
CALLERS = "io/remote/test_remote_callers.py"
VERSIONS = "io/remote/test_remote_versions.py"
SHARING = "io/remote/test_hub_cache_sharing.py"
WRITING = "io/remote/test_hub_cache_writing.py"
READING = "io/remote/test_hub_cache_reading.py"
FIRST = "io/remote/test_hub_first.py"
LOCATOR = "io/remote/test_hub_locator.py"
NETWORK = "io/remote/test_hub_network.py"
OTHERS_WAIT = f"{SHARING}::test_one_downloads_and_others_wait"

OF_OPENING: Mutants = {
    "opening: an entry is let go where no thread opens it": mutant(
        OPENING,
        "                found.close()  # it may be that no thread has begun\n",
        "",
        f"{OF_WORKERS}::test_who_is_cancelled_before_a_thread_opens_holds_no_entry",
    ),
    "opening: a reader that came too late is closed": mutant(
        OPENING,
        "partial(opened, found, cache_key(key), self._limits), _close_reader\n",
        "partial(opened, found, cache_key(key), self._limits)\n",
        AT_ANY_AWAIT,
        OF_WORKERS,
    ),
    "opening: a download has ended when that is told": mutant(
        OPENING,
        "            await self._workers.finish(partial(_end, found, error))\n",
        "            self._workers.submit(partial(_end, found, error))\n",
        AT_ANY_AWAIT,
        OF_SOURCE,
    ),
    "opening: first bytes are used once": mutant(
        OPENING,
        "            self._known.used(key)  # of what was refused, too: a stranger says how much it is\n",
        "            pass\n",
        VERSIONS,
        "io/remote/test_fault_sizes.py",
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
        AT_ANY_AWAIT,
        "io/remote/test_fault_sweep.py",
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
        OF_SOURCE,
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
        SIZES,
    ),
    "opening: small files are checked before they are used": mutant(
        OPENING,
        "                _check(content, file.role, expected)  # it is used before all is published\n",
        "",
        OF_SOURCE,
        BYTES,
    ),
    "opening: who is let have it is noted": mutant(
        OPENING,
        "                found.grant(scope)\n",
        "                pass\n",
        CALLERS,
        LOADS,
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
        "io/remote/test_user_loads_hub.py",
        "io/remote/test_cache_troubles.py",
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
        "io/remote/test_fault_sources.py",
        LOADS,
    ),
    "resolving: another version is not taken for the one": mutant(
        RESOLVING,
        "        if found != key:\n",
        "        if False:\n",
        OF_SOURCE,
        VERSIONS,
    ),
    "known: who asked last is in whose name it is fetched": mutant(
        KNOWN,
        "        self._asked(ref, key)\n        return key\n",
        "        return key\n",
        CALLERS,
    ),
    "beginning: what changed between two answers is noticed": mutant(
        BEGINNING,
        "            if again.known != start.known:\n",
        "            if False:\n",
        BYTES,
        OF_SOURCE,
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
        "io/remote/test_loads_from_everywhere.py",
    ),
    "elsewhere: nothing is made after its end": mutant(
        ELSEWHERE,
        "            if self._closed:\n",
        "            if False:\n",
        "io/remote/test_loads_from_everywhere.py",
    ),
}

OF_HUB: Mutants = {
    "hub: both files are of one commit": mutant(
        HUB,
        "        if weights.commit != config.commit:  # a branch moved between the two answers\n",
        "        if False:\n",
        f"{LOCATOR}::test_a_branch_that_moves_between_two_answers",
    ),
    "hub: questions are given up with who asked": mutant(
        HUB,
        "                each.cancel()\n",
        "                pass\n",
        f"{NETWORK}::test_who_does_not_wait_any_more",
    ),
    "hub: what passes is asked again after a while": mutant(
        HUB,
        "            await asyncio.sleep(wait)\n",
        "            pass\n",
        f"{NETWORK}::test_waiting_between_attempts_can_be_ended",
        "io/remote/test_hub_refusals.py::test_how_long_the_hub_wants_to_be_left_alone",
    ),
    "hub: an answer about another commit is none": mutant(
        HUB,
        "    if is_commit(question.revision) and told.commit not in {None, question.revision}:\n",
        "    if False:\n",
        "io/remote/test_hub_refusals.py::test_an_answer_about_another_commit",
    ),
    "hub first: who downloads is waited for": mutant(
        HUB_FIRST,
        "            turn.wait(begun)\n        return begun\n",
        "            turn.alone = True\n        return begun\n",
        f"{FIRST}::test_others_wait_whichever_it_goes_to",
    ),
    "hub first: what either has is not downloaded": mutant(
        HUB_FIRST,
        """\
        entry = self.open(key)
        if entry is not None:
            return entry
        cache""",
        "        cache",
        f"{FIRST}::test_what_the_hub_cache_has_is_not_downloaded",
    ),
    "hub cache: who downloads is waited for": mutant(
        HUB_CACHE,
        "            turn.wait(begun)\n        return begun\n",
        "            turn.alone = True\n        return begun\n",
        OTHERS_WAIT,
    ),
    "hub cache: a revision means a commit when that is here": mutant(
        HUB_CACHE,
        "        if self.open(key) is not None:\n            self._write_refs(key)\n",
        "        self._write_refs(key)\n",
        f"{SHARING}::test_refs_are_noted_when_the_commit_is_here",
    ),
    "hub cache: a revision means a commit once that is published": mutant(
        HUB_CACHE,
        "        self._write_refs(key)\n        return self.open(key)\n",
        "        return self.open(key)\n",
        f"{SHARING}::test_refs_are_noted_when_the_commit_is_here",
        f"{WRITING}::test_other_tools_find_it",
    ),
    "hub cache: who it was published for may have it": mutant(
        HUB_CACHE,
        "        self.scopes.grant(key.name, scope)\n        self._write_refs(key)\n",
        "        self._write_refs(key)\n",
        f"{SHARING}::test_who_may_have_it",
    ),
    "hub cache: wrong bytes are remembered": mutant(
        HUB_CACHE,
        "        self._wrong.update(wrong)\n",
        "",
        f"{READING}::test_altered_bytes_are_noticed_and_remembered",
    ),
    "hub download: digests are checked before blobs are there": mutant(
        HUB_DOWNLOAD,
        "{role: file.checked_digest() for role, file in self._files.items()}",
        '{role: Digest("sha256", "0" * 64) for role in self._files}',
        f"{WRITING}::test_wrong_bytes_leave_nothing",
    ),
    "hub download: wrong bytes are discarded": mutant(
        HUB_DOWNLOAD,
        "        with self._discarded_if_wrong():\n            digests |=",
        "        if True:\n            digests |=",
        f"{WRITING}::test_wrong_bytes_leave_nothing",
    ),
    "hub download: its bytes are on the disk before they are blobs": mutant(
        HUB_DOWNLOAD,
        "                file.settled(digests[role])\n",
        "                pass\n",
        WRITING,
    ),
    "hub download: a partial has gone when it is published": mutant(
        HUB_DOWNLOAD,
        "        self.discard()\n        entry = self._published()\n",
        "        entry = self._published()\n",
        WRITING,
    ),
    "hub writing: blobs are on the disk before links": mutant(
        HUB_WRITING,
        "            blobs.sync()\n",
        "",
        WRITING,
    ),
    "hub writing: the config is linked last": mutant(
        HUB_WRITING,
        "sorted(digests.items(), reverse=True)",
        "sorted(digests.items())",
        WRITING,
        "io/remote/test_hub_cache_failures.py",
    ),
    "hub writing: links are on the disk when it is published": mutant(
        HUB_WRITING,
        "            snapshot.sync()\n",
        "",
        WRITING,
    ),
    "hub writing: a blob that came meanwhile stays": mutant(
        HUB_WRITING,
        "                if self.blob(role, digest) is None:\n",
        "                if True:\n",
        f"{SHARING}::test_somebody_who_does_not_heed_the_lock",
    ),
}
