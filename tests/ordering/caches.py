"""Mutants of the disk cache: what is on the disk before what, and who keeps others away."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

_NAMES = ("download", "partial_file", "partial_download", "partials", "folders", "descriptors")
DOWNLOAD, FILE, PARTIAL, PARTIALS, FOLDERS, DESCRIPTORS = (f"io/cache/{n}.py" for n in _NAMES)
_OTHERS = ("entries", "locks", "room", "place", "answers")
ENTRIES, LOCKS, ROOM, PLACE, ANSWERS = (f"io/cache/{n}.py" for n in _OTHERS)
DISK, OWN = "io/disk_cache.py", "io/own_cache.py"

OF_DISK = "io/test_disk_cache.py"
SHARED = "io/test_disk_cache_shared.py"
LEFT = "io/test_disk_cache_left.py"
MOVES = "io/test_disk_cache_moves.py"
OWNERS = "io/test_cache_owners.py"
FAILURES = "io/test_disk_cache_failures.py"
CONFORMANCE, SHARING, IN_ROOM = (f"{OF_DISK}::Test{n}" for n in ("Conformance", "Sharing", "Room"))
ON_DISK = f"{SHARED}::test_all_is_on_the_disk_before_it_is_published"
LEFT_ON_DISK = f"{SHARED}::test_what_is_left_is_on_the_disk_before_it_is_trusted"
NOBODY_THERE = f"{MOVES}::test_no_room_is_found_where_somebody_is"
NO_LOCKS = f"{SHARED}::test_without_locks_a_process_still_knows_what_it_holds"
LAST_USER = f"{OWNERS}::test_a_descriptor_is_closed_when_its_last_user_is_through"

OF_DOWNLOADS: Mutants = {
    "cache: digests are checked before anybody has it": mutant(
        FILE,
        "        if self._expected not in {None, found}:\n",
        "        if False:\n",
        f"{CONFORMANCE}::test_wrong_bytes_leave_nothing",
    ),
    "cache: it is published when all of it is here": mutant(
        FILE,
        "        if self._nbytes is None or self.missing():\n",
        "        if self._nbytes is None:\n",
        f"{CONFORMANCE}::test_what_is_not_whole_is_not_published",
    ),
    "cache: bytes are on the disk before it is published": mutant(
        FILE,
        "            os.fsync(fd)\n            return FileRecord",
        "            return FileRecord",
        ON_DISK,
    ),
    "cache: the record is on the disk before it is published": mutant(
        FOLDERS,
        "            os.fsync(fd)\n        finally:",
        "        finally:",
        ON_DISK,
    ),
    "cache: names are on the disk before it is published": mutant(
        DOWNLOAD,
        "        grant(taken.folder, self._scope)\n        taken.folder.sync()\n",
        "        grant(taken.folder, self._scope)\n",
        ON_DISK,
    ),
    "cache: it is on the disk when that is told": mutant(
        DOWNLOAD,
        "                self._shelves.place.entries.sync()\n",
        "",
        ON_DISK,
    ),
    "cache: the record says what was published": mutant(
        DOWNLOAD,
        "            self._write_record(taken, record)\n            identities",
        "            identities",
        f"{CONFORMANCE}::test_bytes_in_any_order_become_an_entry",
    ),
    "cache: what was just published is held": mutant(
        DOWNLOAD,
        "        granted_shared(taken.folder.fd)  # it must not be evicted as soon as it is there\n",
        "",
        SHARED,
    ),
    "cache: a download gets its name when nobody counts": mutant(
        DOWNLOAD,
        "with self._unless_taken_away(), place.undisturbed():",
        "with self._unless_taken_away():",
        NOBODY_THERE,
    ),
    "cache: a download is left when nobody counts": mutant(
        PARTIALS,
        "            self._place.undisturbed(),\n            suppress",
        "            suppress",
        NOBODY_THERE,
    ),
    "cache: a download is taken over when nobody counts": mutant(
        PARTIALS,
        "                with self._place.undisturbed():\n",
        "                if True:\n",
        NOBODY_THERE,
    ),
    "cache: bytes are on the disk before they are left": mutant(
        FILE,
        """\
        with self._file.held() as fd:
            os.fsync(fd)
        if self._map_file""",
        "        if self._map_file",
        LEFT_ON_DISK,
    ),
    "cache: maps are on the disk before they are left": mutant(
        FILE,
        "            with self._map_file.held() as fd:\n                os.fsync(fd)\n",
        "            pass\n",
        LEFT_ON_DISK,
    ),
    "cache: all is on the disk before it is called left": mutant(
        PARTIAL,
        """\
            try:
                self._bring_to_disk(taken)
            except OSError:
                self._partials.remove(taken)
                raise
            self._partials.leave(taken)
""",
        """\
            name, self._partials.forget = self._partials.forget, lambda _: None
            self._partials.leave(taken)
            self._partials.forget = name
            self._bring_to_disk(taken)
""",
        LEFT_ON_DISK,
    ),
    "cache: bytes are there before they are told of": mutant(
        FILE,
        """\
            write_all(fd, buffers, offset)
            with self._lock:
                self._remember(offset, stop)
""",
        """\
            with self._lock:
                self._remember(offset, stop)
            write_all(fd, buffers, offset)
""",
        FAILURES,
    ),
    "cache: a map goes before its bytes": mutant(
        FILE,
        """\
                self._folder.unlink(self._map_name)
                os.ftruncate(fd, 0)
""",
        """\
                os.ftruncate(fd, 0)
                self._folder.unlink(self._map_name)
""",
        FAILURES,
        f"{LEFT}",
    ),
    "cache: room is claimed before bytes are written": mutant(
        FILE,
        "with self._reserve(more), self._file.held() as fd:",
        "with self._file.held() as fd:",
        f"{IN_ROOM}::test_room_is_there_before_the_bytes",
        IN_ROOM,
    ),
    "cache: who had the lock before may have published it": mutant(
        PARTIAL,
        "            found = opened(key)  # whoever had the lock before may have published it\n",
        "            found = None\n",
        SHARING,
        SHARED,
    ),
    "cache: who finds it has no lock": mutant(
        PARTIAL,
        "        lock.release()\n        return found\n",
        "        return found\n",
        SHARING,
        SHARED,
    ),
    "cache: a download that ends is locked no more": mutant(
        PARTIAL,
        "                self._lock.release()\n",
        "                pass\n",
        f"{SHARING}::test_others_wait_and_have_what_was_published",
        CONFORMANCE,
    ),
    "cache: who downloads is waited for": mutant(
        PARTIAL,
        "            return (\n                download(partials.begin(key.name), None) if alone else",
        "            return (\n                download(partials.begin(key.name), None) if True else",
        f"{SHARING}::test_others_wait_and_have_what_was_published",
    ),
    "cache: who hangs is not waited for": mutant(
        DISK,
        "        self.alone = monotonic() - self._since > PATIENCE_SECONDS\n",
        "",
        f"{LEFT}::test_a_process_that_hangs_is_not_waited_for",
    ),
    "cache: waiting ends with the demand": mutant(
        DISK,
        "        self._demand.wait(POLL_SECONDS)\n        self._require()\n",
        "        self._demand.wait(POLL_SECONDS)\n",
        f"{SHARING}::test_waiting_can_be_cancelled",
    ),
}

OF_HOLDING: Mutants = {
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
        f"{SHARED}",
        SHARING,
    ),
    "cache: what was removed before it was held is not there": mutant(
        ENTRIES,
        "        return status is not None and os.path.samestat(status, os.fstat(folder.fd))\n",
        "        return True\n",
        SHARED,
        OF_DISK,
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
        SHARED,
        LEFT,
    ),
    "cache: what somebody writes to is not taken over": mutant(
        PARTIALS,
        "            if self._is_written(left):\n                continue\n",
        "",
        f"{LEFT}::test_without_its_lock_a_download_is_not_taken_over",
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
        OWNERS,
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
        "io/test_disk_cache_answers.py",
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
        "test_spill.py",
    ),
    "own cache: none is made after its end": mutant(
        OWN,
        "            if self._closed:\n",
        "            if False:\n",
        "test_spill_ends.py",
    ),
}
