"""Sources: readers, tensors in memory, remote fetches."""

from typing import Any

from lorax_async import concurrency
from lorax_async.adapters import merging
from lorax_async.cache.disk_cache import DiskCache
from lorax_async.concurrency import SharedResource, WorkerThreads
from lorax_async.remote import base, opening, readers
from lorax_async.remote.opening import VersionResolver
from lorax_async.remote.readers import FetchReader
from lorax_async.remote.remote_source import RemoteSource
from lorax_async.runtime import host_tier
from lorax_async.sources.tensors import HostCopies, HostCopy, TensorSnapshot
from lorax_async.types import AdapterKey
from mutants.mutation import Mutants, NoLock, mutant, nothing, nothing_awaited, skipped

LOCAL = "sources/test_local.py"
MEMORY = "sources/test_memory_source.py"
REMOTE = "remote/test_remote_source.py"
LOADS = "remote/test_remote_loads.py"

_try_begin = DiskCache.try_begin


def _closed_under_readers(self: SharedResource[Any]) -> None:
    if not self.closed:
        self.closed = True
        self._users = -1_000_000
        self._end()


async def _free_of_charge(self: HostCopies, *_: object) -> HostCopy:
    return HostCopy(0, self)


def _freed_while_read(self: HostCopies, key: AdapterKey) -> None:
    copy = self._copies.pop(key, None)
    if copy is not None:
        self.give_back(copy)


async def _abandoned(self: WorkerThreads, work: Any, undo: object = None) -> Any:
    return await concurrency.outcome(self.submit(work))


class _AtOnce:
    def __init__(self, _: object, handle: Any) -> None:
        self.put = handle


def _kept_when_closed(self: FetchReader, entry: Any) -> None:
    self.entry = entry


SOURCES: Mutants = {
    "reader: a descriptor outlives the read it serves": mutant(
        f"{LOCAL}::test_a_descriptor_outlives_its_read",
        (SharedResource, "close", _closed_under_readers)),
    "opened once: one read opens": mutant(
        f"{LOCAL}::test_many_first_reads", (concurrency, "Lock", NoLock)),
    "hold: what is held is what was opened": mutant(
        "runtime/test_host_tier.py::test_a_file_that_changes_is_not_held",
        (host_tier, "_require_unchanged", nothing)),
    "tensors: writes during the copy are noticed": mutant(
        f"{MEMORY}::test_a_write_at_any_time_is_noticed",
        skipped(TensorSnapshot, "_require_unchanged")),
    "tensors: room is claimed before they are copied": mutant(
        f"{MEMORY}::test_the_budget_counts_what_is_being_copied",
        (HostCopies, "reserve", _free_of_charge)),
    "tensors: bytes keep their room while they are read": mutant(
        f"{MEMORY}::test_bytes_keep_their_room_while_they_are_read",
        (HostCopies, "drop", _freed_while_read)),
    "merge: it draws no number of the process's generator": mutant(
        "engines/test_merge_equality.py::test_a_seed_decides_what_drops_and_no_global_number_is_drawn",
        (merging, "partial", lambda draw, **_: draw)),
    "workers: a cancelled caller's result is undone": mutant(
        f"{REMOTE}::test_a_cancelled_caller_waits_for_its_thread_and_undoes_the_result",
        (WorkerThreads, "run", _abandoned)),
    "workers: letting go is waited for": mutant(
        f"{REMOTE}::test_a_release_is_done_though_it_was_cancelled_before_it_began",
        (WorkerThreads, "finish", _abandoned)),
    "fetch: it is published when all of it is here": mutant(
        "remote/test_fetch_folders.py::test_a_folder_that_peft_loads",
        (readers, "outcome", nothing_awaited)),
    "fetch: groups are reported on the loop": mutant(
        f"{REMOTE}::test_groups_are_reported_on_the_loop", (readers, "Inbox", _AtOnce)),
    "fetch: nothing reads a download that has ended": mutant(
        f"{REMOTE}::test_nothing_reads_a_download_that_has_ended",
        (FetchReader, "_leave", lambda self, _: self._download.close())),
    "fetch: its jobs have ended when that is reported": mutant(
        f"{REMOTE}::test_jobs_end_with_whoever_follows_them", (base, "wait_for_end", nothing_awaited)),
    "fetch: a closed reader keeps no entry": mutant(
        f"{REMOTE}::test_a_reader_closed_meanwhile_keeps_nothing",
        (FetchReader, "_adopt", _kept_when_closed)),
    "fetch: a reader keeps its entry": mutant(
        f"{REMOTE}::test_an_entry_stays_for_as_long_as_it_is_read",
        (FetchReader, "_adopt", lambda _, entry: entry.close())),
    "fetch: two processes download once": mutant(
        f"{LOADS}::test_two_processes_download_once",
        (DiskCache, "try_begin", lambda *given, **_: _try_begin(*given, alone=True))),
    "fetch: small files are checked before they are used": mutant(
        "remote/test_faults.py::test_a_lasting_fault_is_one_typed_error[asyncio-config wrong]",
        (opening, "_check", nothing)),
    "fetch: what is in the cache is checked": mutant(
        "remote/test_faults.py::test_an_unpromised_digest_is_marked_as_such",
        skipped(RemoteSource, "_check")),
    "resolving: the cache serves whom it was granted to": mutant(
        f"{REMOTE}::test_known_callers_while_the_source_is_down",
        skipped(VersionResolver, "_access_age", 0.0)),
    "resolving: a fetch is in the last caller's name": mutant(
        f"{LOADS}::test_a_digest_is_its_callers_own", skipped(VersionResolver, "_set_requester", True)),
}  # fmt: skip
