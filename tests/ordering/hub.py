"""Mutants of the hub: what it is asked, and its standard cache."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

HUB = "io/remote/hub.py"
HUB_FILES = "adapters/loading/hub_files.py"
HUB_FIRST = "io/remote/hub_first.py"
HUB_CACHE = "io/remote/hub_cache.py"
HUB_DOWNLOAD = "io/remote/hub_download.py"
HUB_WRITING = "io/remote/hub_writing.py"

SHARING = "io/remote/test_hub_cache_sharing.py"
WRITING = "io/remote/test_hub_cache_writing.py"
READING = "io/remote/test_hub_cache_reading.py"
FIRST = "io/remote/test_hub_first.py"
LOCATOR = "io/remote/test_hub_locator.py"
NETWORK = "io/remote/test_hub_network.py"
OF_HUB_FILES = "adapters/test_hub_files.py"
OTHERS_WAIT = f"{SHARING}::test_one_downloads_and_others_wait"

HUBS: Mutants = {
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
        "        await asyncio.sleep(wait)\n",
        "        pass\n",
        f"{NETWORK}::test_waiting_between_attempts_can_be_ended",
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
        f"{WRITING}::test_all_is_on_the_disk_before_it_is_linked",
    ),
    "hub download: a partial has gone when it is published": mutant(
        HUB_DOWNLOAD,
        "        self.discard()\n        entry = self._published()\n",
        "        entry = self._published()\n",
        f"{WRITING}::test_readers_of_a_download_go_on_after_it",
    ),
    "hub writing: blobs are on the disk before links": mutant(
        HUB_WRITING,
        "            blobs.sync()\n",
        "",
        f"{WRITING}::test_all_is_on_the_disk_before_it_is_linked",
    ),
    "hub writing: the config is linked last": mutant(
        HUB_WRITING,
        "sorted(digests.items(), reverse=True)",
        "sorted(digests.items())",
        f"{WRITING}::test_all_is_on_the_disk_before_it_is_linked",
    ),
    "hub writing: links are on the disk when it is published": mutant(
        HUB_WRITING,
        "            snapshot.sync()\n",
        "",
        f"{WRITING}::test_all_is_on_the_disk_before_it_is_linked",
    ),
    "hub writing: a blob that came meanwhile stays": mutant(
        HUB_WRITING,
        "                if self.blob(role, digest) is None:\n",
        "                if True:\n",
        f"{SHARING}::test_somebody_who_does_not_heed_the_lock",
    ),
    "hub files: what is here is not asked for": mutant(
        HUB_FILES,
        "        path = cached_file(self.id, name) or self._fetched(name, max_bytes)\n",
        "        path = self._fetched(name, max_bytes)\n",
        f"{OF_HUB_FILES}::test_what_was_fetched_is_not_asked_for_again",
    ),
    "hub files: whether weights are in one file is not asked again": mutant(
        HUB_FILES,
        "        if one is not None or index is not None:",
        "        if False:",
        f"{OF_HUB_FILES}::test_weights_in_several_files",
    ),
    "hub files: weights are of the config's commit": mutant(
        HUB_FILES,
        "        revision = self._commit() or self.id.revision or _MAIN\n",
        "        revision = self.id.revision or _MAIN\n",
        f"{OF_HUB_FILES}::test_config_and_weights_are_of_one_commit",
    ),
    "hub files: a size is asked for before the file": mutant(
        HUB_FILES,
        "        if told.nbytes is not None and told.nbytes > max_bytes:\n",
        "        if False:\n",
        f"{OF_HUB_FILES}::test_a_file_over_the_limit_is_not_fetched",
    ),
    "hub files: what came before counts": mutant(
        HUB_FILES,
        "                room = max(0, room - _size_of(self._found(name, room), name))\n",
        "                self._found(name, room)\n",
        f"{OF_HUB_FILES}::test_files_that_are_over_the_limit_together",
    ),
    "hub files: a hub that does not answer is not waited for": mutant(
        HUB_FILES,
        "            timeout=_SECONDS,\n",
        "            timeout=20.0,\n",
        f"{OF_HUB_FILES}::test_a_hub_that_refuses",
    ),
}
