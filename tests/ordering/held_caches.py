"""Mutants of the disk cache: who keeps what from whom."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

PARTIALS = "io/cache/partials.py"
DESCRIPTORS = "io/cache/descriptors.py"
ENTRIES = "io/cache/entries.py"
LOCKS = "io/cache/locks.py"
ROOM = "io/cache/room.py"
PLACE = "io/cache/place.py"
ANSWERS = "io/cache/answers.py"
OWN = "io/own_cache.py"

SHARED = "io/test_disk_cache_shared.py"
LEFT = "io/test_disk_cache_left.py"
MOVES = "io/test_disk_cache_moves.py"
OWNERS = "io/test_cache_owners.py"
NOBODY_THERE = f"{MOVES}::test_no_room_is_found_where_somebody_is"
NO_LOCKS = f"{SHARED}::test_without_locks_a_process_still_knows_what_it_holds"
LAST_USER = f"{OWNERS}::test_a_descriptor_is_closed_when_its_last_user_is_through"

HELD_CACHES: Mutants = {
    "cache: a descriptor outlives its users": mutant(
        DESCRIPTORS,
        "            unused = not self._closed and not self._users\n",
        "            unused = not self._closed\n",
        LAST_USER,
    ),
    "cache: the last user closes a descriptor": mutant(
        DESCRIPTORS,
        "            last = self._closed and not self._users\n",
        "            last = False\n",
        LAST_USER,
    ),
    "cache: what this process holds stays": mutant(
        ENTRIES,
        "            removed = None if name in self._held else self._claimed(name)\n",
        "            removed = self._claimed(name)\n",
        NO_LOCKS,
    ),
    "cache: what another process holds stays": mutant(
        ENTRIES,
        "                    free = granted_alone(folder.fd)\n",
        "                    free = True\n",
        f"{SHARED}::test_what_one_holds_the_other_does_not_evict",
    ),
    "cache: what is opened is held": mutant(
        ENTRIES,
        "        if not granted_shared(folder.fd):\n            return False\n",
        "",
        f"{SHARED}::test_what_one_has_opened_the_other_does_not_remove",
    ),
    "cache: what was removed before it was held is not there": mutant(
        ENTRIES,
        "        return status is not None and os.path.samestat(status, os.fstat(folder.fd))\n",
        "        return True\n",
        f"{SHARED}::test_what_is_replaced_just_before_one_holds_it_stays",
    ),
    "cache: what somebody downloads stays": mutant(
        PARTIALS,
        "        if found is None or self._is_written(found):\n",
        "        if found is None:\n",
        f"{SHARED}::test_what_one_downloads_the_other_does_not_drop",
        NO_LOCKS,
    ),
    "cache: what somebody is about to take over stays": mutant(
        PARTIALS,
        "        if lock is None:\n            return False\n",
        "        if lock is None:\n            return self._removed(name)\n",
        f"{LEFT}::test_what_somebody_is_about_to_take_over_stays",
    ),
    "cache: what somebody writes to is not taken over": mutant(
        PARTIALS,
        "            if self._is_written(left):\n                continue\n",
        "",
        f"{SHARED}::test_a_file_system_without_locks",
    ),
    "cache: what may not be on the disk is not trusted": mutant(
        PARTIALS,
        "            if taken is None and can_be_trusted(left, self._place.here):\n",
        "            if taken is None:\n",
        f"{LEFT}::test_whose_bytes_are_trusted",
    ),
    "cache: a lock's file is still there when it is taken": mutant(
        LOCKS,
        "            taken = status is not None and os.path.samestat(status, os.fstat(fd))\n",
        "            taken = True\n",
        f"{SHARED}::test_a_lock_whose_file_was_removed_is_taken_anew",
    ),
    "cache: who hangs with the short lock is not waited for": mutant(
        LOCKS,
        " is None and monotonic() < until:\n",
        " is None:\n",
        f"{SHARED}::test_who_hangs_with_the_budgets_lock_is_not_waited_for",
    ),
    "cache: room is claimed by one at a time": mutant(
        ROOM,
        """\
        with self._lock, translated_errors(_LOOKING), self._place.undisturbed():
            self._observe()
            self._make(nbytes)
            yield
""",
        """\
        with self._lock, translated_errors(_LOOKING):
            self._observe()
            self._make(nbytes)
            yield
""",
        f"{OWNERS}::test_room_is_claimed_by_one_process_at_a_time",
    ),
    "cache: the short lock is between processes": mutant(
        PLACE,
        "        with self._counting, short_lock(self.locks, BUDGET_LOCK):\n",
        "        with self._counting:\n",
        f"{OWNERS}::test_room_is_claimed_by_one_process_at_a_time",
    ),
    "cache: the short lock is between threads": mutant(
        PLACE,
        "        with self._counting, short_lock(self.locks, BUDGET_LOCK):\n",
        "        with short_lock(self.locks, BUDGET_LOCK):\n",
        NOBODY_THERE,
    ),
    "cache: an answer is whole when it is there": mutant(
        ANSWERS,
        """\
            folder.write(new, content)
            os.rename(new, _name(question), src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
""",
        """\
            folder.unlink(_name(question))
            folder.write(_name(question), content)
""",
        "io/test_disk_cache_answers.py::test_an_answer_that_is_not_on_the_disk_leaves_the_one_before",
    ),
    "own cache: it is made once": mutant(
        OWN,
        """\
        with self._lock:
            if self._closed:
""",
        """\
        if self._lock:
            if self._closed:
""",
        "io/remote/test_made_once.py::test_a_loaders_own_cache_is_made_once",
    ),
    "own cache: none is made after its end": mutant(
        OWN,
        "            if self._closed:\n",
        "            if False:\n",
        "io/remote/test_made_once.py::test_a_loaders_own_cache_is_made_once",
    ),
}
