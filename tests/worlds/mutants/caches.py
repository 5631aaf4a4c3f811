"""The disk cache: the order of writes to disk, and mutual exclusion."""

import os
from typing import Any

from lorax_async.cache import directory, entries, partials
from lorax_async.cache.base import EntryRecord
from lorax_async.cache.directory import CacheDirectory, Folder
from lorax_async.cache.entries import DiskBudget
from lorax_async.cache.partials import OpenPartial, PartialFile, Partials
from lorax_async.errors import IntegrityError
from lorax_async.types import FileIdentity
from mutants.mutation import Mutants, mutant, nothing, seen_by, skipped, without_context

DISK = "cache/test_disk_cache.py"

PUBLISHED = f"{DISK}::test_bytes_are_on_the_disk_before_they_are_published"
VERIFIED = f"{DISK}::TestDamage::test_what_was_hashed_is_verified_until_it_is_touched_or_the_machine_restarts"
ODD = f"{DISK}::TestDamage::test_odd_things_are_dropped"
HELD = f"{DISK}::test_what_one_holds_the_other_does_not_evict"
DOWNLOADED = f"{DISK}::test_what_one_downloads_the_other_does_not_drop"
WAITED_FOR = f"{DISK}::TestSharing::test_others_wait_and_have_what_was_published"

_complete, _write = PartialFile.complete, PartialFile.write
_resume, _claim = PartialFile._resume, Partials.claim
_require_whole = entries.require_whole


def _unchecked(self: PartialFile) -> Any:
    self.expected = None
    return _complete(self)


def _mapped_before_written(self: PartialFile, offset: int, data: memoryview) -> None:
    self._here.add(offset, offset + data.nbytes)
    _write(self, offset, data)


def _whole_without_a_file(folder: Folder, record: EntryRecord, *, check: bool) -> Any:
    try:
        return _require_whole(folder, record, check=check)
    except IntegrityError:
        return dict.fromkeys((file.name for file in record.files), FileIdentity(0, 0, 0, 0, 0))


def _cut_before_the_map_goes(self: PartialFile) -> Any:
    with self._file as fd:
        os.ftruncate(fd, 0)
    return _resume(self)


CACHES: Mutants = {
    "cache: bytes are on the disk before publication": mutant(
        PUBLISHED, seen_by(partials, "os", fsync=nothing)),
    "cache: an entry that a crash left without its record is removed": mutant(
        ODD, skipped(CacheDirectory, "discard")),
    "cache: an entry that a crash left without a file is none": mutant(
        ODD, (entries, "require_whole", _whole_without_a_file)),
    "cache: digests are checked before publication": mutant(
        f"{DISK}::TestContents::test_wrong_bytes_leave_nothing",
        (PartialFile, "complete", _unchecked)),
    "cache: all bytes are here before publication": mutant(
        f"{DISK}::TestContents::test_what_is_not_whole_is_not_published",
        skipped(PartialFile, "missing", ())),
    "cache: what is resumed is compared": mutant(
        f"{DISK}::TestContents::test_what_was_left_is_compared_with_what_comes_again",
        skipped(PartialFile, "_compare")),
    "cache: bytes count once they are written": mutant(
        f"{DISK}::test_bytes_that_could_not_be_written_are_missing",
        (PartialFile, "write", _mapped_before_written)),
    "cache: the chunk map is removed before the bytes": mutant(
        f"{DISK}::test_a_map_goes_before_the_bytes_that_it_tells_of",
        (PartialFile, "_resume", _cut_before_the_map_goes)),
    "cache: bytes of another boot are not trusted": mutant(
        f"{DISK}::test_a_crash_of_the_machine", (partials, "this_boot", str)),
    "cache: what was hashed before another boot is hashed again": mutant(
        VERIFIED, (entries, "this_boot", bytes)),
    "cache: what was touched since it was hashed is hashed again": mutant(
        VERIFIED, (entries, "_stamp_of", lambda record, _: bytes(64))),
    "cache: what may be written to within the same tick is hashed again": mutant(
        VERIFIED, (entries, "is_settled", lambda *_: True)),
    "cache: what is being written is not dropped": mutant(
        DOWNLOADED, (partials, "try_lock", lambda _: True)),
    "cache: what another process writes is not dropped": mutant(
        DOWNLOADED, (directory, "try_lock", lambda _: True)),
    "cache: nothing is evicted in vain": mutant(
        f"{DISK}::test_nothing_is_evicted_in_vain",
        skipped(CacheDirectory, "is_busy", False)),
    "cache: room is reserved before it is written to": mutant(
        f"{DISK}::TestRoom::test_the_least_recently_used_goes",
        without_context(DiskBudget, "reserve")),
    "cache: room is reserved by one process at a time": mutant(
        f"{DISK}::TestRoom::test_is_reserved_by_one_only",
        without_context(CacheDirectory, "locked")),
    "cache: what another process holds is not evicted": mutant(
        HELD, (directory, "try_lock", lambda _: True)),
    "cache: an entry that was replaced is not held": mutant(
        f"{DISK}::test_what_is_replaced_just_before_one_leases_it_stays",
        skipped(Folder, "is_named", True)),
    "cache: what is published or opened is held": mutant(
        HELD, (entries, "try_lock", lambda _, **__: True)),
    "cache: a tokenizer is whole, and as it was fetched": mutant(
        f"{DISK}::test_a_tokenizer_that_is_written_in_part_is_none",
        skipped(entries, "_hash_tokenizer", 802)),
    "cache: a download that ends is unlocked": mutant(
        WAITED_FOR, skipped(OpenPartial, "close")),
    "cache: a download of another process is waited for": mutant(
        WAITED_FOR, (Partials, "claim", lambda self, entry, **_: _claim(self, entry, alone=True))),
}  # fmt: skip
