"""Mutants of the disk cache: what is on the disk before what, and who waits."""

from __future__ import annotations

from ordering.mutant import Mutants, mutant

DOWNLOAD = "io/cache/download.py"
FILE = "io/cache/partial_file.py"
PARTIAL = "io/cache/partial_download.py"
PARTIALS = "io/cache/partials.py"
FOLDERS = "io/cache/folders.py"
DISK = "io/disk_cache.py"

OF_DISK = "io/test_disk_cache.py"
SHARED = "io/test_disk_cache_shared.py"
LEFT = "io/test_disk_cache_left.py"
MOVES = "io/test_disk_cache_moves.py"
FAILURES = "io/test_disk_cache_failures.py"
CONFORMANCE = f"{OF_DISK}::TestConformance"
SHARING = f"{OF_DISK}::TestSharing"
IN_ROOM = f"{OF_DISK}::TestRoom"
ON_DISK = f"{SHARED}::test_all_is_on_the_disk_before_it_is_published"
LEFT_ON_DISK = f"{SHARED}::test_what_is_left_is_on_the_disk_before_it_is_trusted"
NOBODY_THERE = f"{MOVES}::test_no_room_is_found_where_somebody_is"

CACHES: Mutants = {
    "cache: digests are checked before anybody has it": mutant(
        FILE,
        "        if self.expected not in {None, found}:\n",
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
        f"{SHARED}::test_what_one_holds_the_other_does_not_evict",
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
        "                if name:\n",
        NOBODY_THERE,
    ),
    "cache: who lists a folder sees all of it": mutant(
        FOLDERS,
        """\
        with self.subfolder(".") as own:  # of two who list by one descriptor, each sees a part
            return os.listdir(own.fd)
""",
        "        return os.listdir(self.fd)\n",
        f"{MOVES}::test_what_was_left_is_found_while_somebody_counts",
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
        f"{FAILURES}::test_bytes_that_could_not_be_written_are_missing",
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
        f"{LEFT}::test_a_map_goes_before_the_bytes_that_it_tells_of",
    ),
    "cache: room is claimed before bytes are written": mutant(
        FILE,
        "with self._reserve(more), self._file.held() as fd:",
        "with self._file.held() as fd:",
        f"{IN_ROOM}::test_the_least_recently_used_goes",
    ),
    "cache: who had the lock before may have published it": mutant(
        PARTIAL,
        "            found = opened(key)  # whoever had the lock before may have published it\n",
        "            found = None\n",
        f"{SHARED}::test_what_is_published_just_before_one_may_begin_is_taken",
    ),
    "cache: who finds it has no lock": mutant(
        PARTIAL,
        "        lock.release()\n        return found\n",
        "        return found\n",
        f"{SHARED}::test_what_is_published_just_before_one_may_begin_is_taken",
    ),
    "cache: a download that ends is locked no more": mutant(
        PARTIAL,
        "                self._lock.release()\n",
        "                pass\n",
        f"{SHARING}::test_others_wait_and_have_what_was_published",
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
        f"{SHARED}::test_who_waits_ends_with_the_demand",
    ),
}
