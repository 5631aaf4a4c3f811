"""The disk cache: what is on the disk before what, and what excludes whom."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lorax_async.io import disk_cache
from lorax_async.io.cache import (
    download,
    entries,
    folders,
    locks,
    partial_download,
    partial_file,
    partials,
)
from lorax_async.io.cache import place as places
from lorax_async.io.cache.entries import Entries
from lorax_async.io.cache.folders import Folder
from lorax_async.io.cache.locks import NamedLock
from lorax_async.io.cache.partial_file import PartialFile
from lorax_async.io.cache.partials import Partials
from lorax_async.io.cache.room import Room
from mutants.mutation import (
    Mutants,
    mutant,
    nothing,
    seen_by,
    skipped,
    without_context,
)

DISK = "io/test_disk_cache.py"
FAILURES = "io/test_disk_cache_failures.py"

PUBLISHED = f"{FAILURES}::test_all_is_on_the_disk_before_it_is_published"
RESUMABLE = f"{FAILURES}::test_what_is_left_is_on_the_disk_before_it_is_trusted"
HELD = f"{FAILURES}::test_what_one_holds_the_other_does_not_evict"
UNLOCKED = f"{FAILURES}::test_without_locks_a_process_still_knows_what_it_holds"
ROOM = f"{DISK}::TestRoom::test_is_reserved_by_one_at_a_time"
WAITED_FOR = f"{DISK}::TestSharing::test_others_wait_and_have_what_was_published"

_checked_digest, _write = PartialFile.checked_digest, PartialFile.write
_resume = PartialFile.resume
_one_at_a_time = partial_download.one_at_a_time


def _unchecked(self: PartialFile) -> Any:
    self.expected = None
    return _checked_digest(self)


def _mapped_before_written(self: PartialFile, buffers: Sequence[memoryview], offset: int) -> None:
    stop = offset + sum(buffer.nbytes for buffer in buffers)
    self._make_room(stop)
    self._remember(offset, stop)
    _write(self, buffers, offset)


def _cut_before_the_map_goes(self: PartialFile, nbytes: int | None) -> None:
    with self._file.held() as fd:
        os.ftruncate(fd, 0)
    _resume(self, nbytes)


def _without_waiting(*given: Any, alone: bool) -> Any:
    return _one_at_a_time(*given, alone=True)


def _locked_only(self: Entries, _: str, folder: Folder) -> bool:
    return locks.granted_shared(folder.fd)


CACHES: Mutants = {
    "cache: bytes are on the disk before publication": mutant(
        PUBLISHED, seen_by(partial_file, "os", fsync=nothing)
    ),
    "cache: the record is on the disk before publication": mutant(
        PUBLISHED, seen_by(folders, "os", fsync=nothing)
    ),
    "cache: names are on the disk before publication": mutant(PUBLISHED, skipped(Folder, "sync")),
    "cache: digests are checked before publication": mutant(
        f"{DISK}::TestContents::test_wrong_bytes_leave_nothing",
        (PartialFile, "checked_digest", _unchecked),
    ),
    "cache: all bytes are here before publication": mutant(
        f"{DISK}::TestContents::test_what_is_not_whole_is_not_published",
        skipped(PartialFile, "missing", ()),
    ),
    "cache: what is resumed is compared": mutant(
        f"{DISK}::TestContents::test_what_was_left_is_compared_with_what_comes_again",
        skipped(PartialFile, "_compare"),
    ),
    "cache: the chunk map follows the bytes": mutant(
        f"{FAILURES}::test_bytes_that_could_not_be_written_are_missing",
        (PartialFile, "write", _mapped_before_written),
    ),
    "cache: the chunk map is removed before the bytes": mutant(
        f"{FAILURES}::test_a_map_goes_before_the_bytes_that_it_tells_of",
        (PartialFile, "resume", _cut_before_the_map_goes),
    ),
    "cache: bytes and maps are on the disk before they are left": mutant(
        RESUMABLE, skipped(PartialFile, "sync")
    ),
    "cache: bytes of another boot are not trusted": mutant(
        f"{FAILURES}::test_bytes_of_a_killed_process_are_trusted_unless_the_machine_crashed",
        (partials, "can_be_trusted", lambda *_: True),
    ),
    "cache: what is being written is not dropped": mutant(
        UNLOCKED, skipped(Partials, "_is_written", False)
    ),
    "cache: room is reserved before it is written to": mutant(
        f"{DISK}::TestRoom::test_the_least_recently_used_goes", without_context(Room, "claimed")
    ),
    "cache: room is reserved by one process at a time": mutant(
        ROOM, without_context(places, "short_lock")
    ),
    "cache: what another process holds is not evicted": mutant(
        HELD, (entries, "granted_alone", lambda _: True)
    ),
    "cache: what was just published is held": mutant(
        HELD, (download, "granted_shared", lambda _: True)
    ),
    "cache: what is opened is held": mutant(
        f"{FAILURES}::test_what_one_has_opened_the_other_does_not_remove",
        (entries, "granted_shared", lambda _: True),
    ),
    "cache: an entry that was replaced is not held": mutant(
        f"{FAILURES}::test_what_is_replaced_just_before_one_holds_it_stays",
        (Entries, "_is_still", _locked_only),
    ),
    "cache: a lock's file is still there when it is taken": mutant(
        f"{FAILURES}::test_of_two_that_begin_at_the_same_moment_one_downloads",
        seen_by(locks, "os", path=seen_by(os, "path", samestat=lambda *_: True)[2]),
        skipped(Folder, "status", True),
    ),
    "cache: a download that ends is unlocked": mutant(WAITED_FOR, skipped(NamedLock, "release")),
    "cache: a download of another process is waited for": mutant(
        WAITED_FOR, (disk_cache, "one_at_a_time", _without_waiting)
    ),
}
