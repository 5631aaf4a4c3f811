"""The standard hub cache: what other tools have stored there is used, and stored there for them.

Its layout is that of huggingface_hub (see `hub_layout`). What is whole in there is everybody's: it
is never removed here, counts in no budget, and is never mapped, for others may change it.

A download goes into a folder of this user's own first, which other tools overlook (below `.locks`,
so that it is on the same disk), with partials, locks and scopes as in our own cache; then its files
become blobs, each by one rename, and its links are made, the config's last. Who is killed in
between leaves blobs that the next download uses.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from lorax_async.adapter import FileIdentity
from lorax_async.core.cache_names import CacheKey, FileRole, is_partial_name
from lorax_async.core.cache_record import record_of
from lorax_async.core.hub_names import is_commit, is_revision, repo_folder
from lorax_async.errors import InternalError
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.locks import NamedLock
from lorax_async.io.cache.partial_download import one_at_a_time
from lorax_async.io.cache.partials import Partials, Taken
from lorax_async.io.cache.place import Place
from lorax_async.io.cache.sizes import Sizes, files_in
from lorax_async.io.disk_cache import Turn
from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_download import HubDownload
from lorax_async.io.remote.hub_layout import HubFile, commit_of, files_of, is_right, open_same
from lorax_async.io.remote.hub_scopes import Scopes
from lorax_async.io.remote.hub_writing import Shelf, write_ref
from lorax_async.io.sources.checked_open import FileReader

MAX_REVISIONS = 4_096


def standard_folder() -> str:
    """Where huggingface_hub has it (`HF_HUB_CACHE`, `HF_HOME`). Slow at first."""
    from huggingface_hub import constants  # noqa: PLC0415 (slow)

    return constants.HF_HUB_CACHE


class HubEntry:
    """The `CacheEntry` of a commit. It keeps nobody from removing it: then readers tell."""

    mappable = False

    def __init__(self, cache: HubCache, key: CacheKey, files: tuple[HubFile, ...]) -> None:
        self.record = record_of(key, tuple(file.record for file in files))
        self._cache = cache
        self._files = {file.role: file for file in files}

    def reader(self, role: FileRole) -> FileReader:
        file = self._files.get(role)
        if file is None:
            raise InternalError(f"the hub cache's entry has no {role.file_name}")
        return FileReader(partial(open_same, self._cache.path, file), file.identity, role.file_name)

    def granted(self, scope: str) -> float | None:
        """What other tools have stored was stored on this machine's own authority.

        Where it has a token, that may be private, and is for nobody who asks without it.
        """
        scopes, name = self._cache.scopes, self.record.name
        since = scopes.granted(name, scope)
        if since is None and not scopes.are_all(name) and scope == self._cache.own_scope():
            newest = max(file.mtime_ns for file in self.record.files)
            return max(0.0, time.time() - newest / 1e9)
        return since

    def grant(self, scope: str) -> None:
        self._cache.scopes.grant(self.record.name, scope)

    def close(self) -> None:
        """Nothing is open."""


class HubCache:
    """The `Cache` in the standard hub cache's folder, whose keys are org/name and a commit.

    Parameters
    ----------
    path
        The folder; it need not be there.
    own_scope
        The scope of this machine's own token, "" if it has none. From any thread; may block.
    write
        Whether downloads are stored there. Else nothing in there is touched.
    private
        Whether also those that took a token, which may be private: every user of the folder can
        read them.

    Raises
    ------
    ConfigError
        It shall be written to, and cannot be, or the folder in it that is to be this user's own is
        not.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        own_scope: Callable[[], str | None],
        *,
        write: bool = False,
        private: bool = False,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.own_scope = own_scope
        self._private = private
        self._wrong: set[FileIdentity] = set()
        self._meant: dict[CacheKey, set[str]] = {}
        self._place: Place | None = None
        self._partials: Partials | None = None
        if write:
            self._place, self._partials = _opened(self.path)
        self.scopes = Scopes(None if self._place is None else self._place.entries)

    def takes(self, scope: str) -> bool:
        """Whether downloads on that authority are stored here."""
        return self._place is not None and (self._private or not scope)

    def open(self, key: CacheKey, *, check: bool = False) -> HubEntry | None:
        """The entry; None if there is none, or not whole, or (by `check`) it has other bytes.

        That is remembered: who found wrong bytes is not given them again.
        """
        repo = _repo_of(key)
        files = () if repo is None else files_of(self.path, repo, key.version)
        if not files or any(file.identity in self._wrong for file in files):
            return None
        wrong = [file.identity for file in files if check and not is_right(self.path, file)]
        self._wrong.update(wrong)
        return None if wrong else HubEntry(self, key, files)

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> HubEntry | HubDownload | int:
        repo, partials = _repo_of(key), self._partials
        if partials is None or self._place is None or repo is None or not self.takes(scope):
            raise InternalError(f"{key.source} was to be stored in the hub cache, which is not so")
        self._place.restore()
        shelf = Shelf(self.path, repo, key.version)

        def download(taken: Taken, lock: NamedLock | None) -> HubDownload:
            published = partial(self._published, key, scope)
            return HubDownload(shelf, published, partials, _without_budget, taken, lock)

        return one_at_a_time(self._place, partials, key, self.open, download, alone=alone)

    def begin(self, key: CacheKey, scope: str, demand: Demand) -> HubEntry | HubDownload:
        turn = Turn(demand)
        while isinstance(begun := self.try_begin(key, scope, alone=turn.alone), int):
            turn.wait(begun)
        return begun

    def note_revision(self, source: str, revision: str, commit: str) -> None:
        """A branch or tag means that commit now: from when it is here, other tools can see it."""
        key = CacheKey(source, commit)
        if self._place is None or _repo_of(key) is None or not is_revision(revision):
            return
        if len(self._meant) >= MAX_REVISIONS:
            self._meant.clear()
        self._meant.setdefault(key, set()).add(revision)
        self._place.restore()
        if self.open(key) is not None:
            self._write_refs(key)

    def commit_of(self, source: str, revision: str) -> str | None:
        """Which commit a branch, tag or commit was when a tool looked last; None if none did."""
        repo = repo_folder(source)
        if repo is None or not is_revision(revision):
            return None
        return revision if is_commit(revision) else commit_of(self.path, repo, revision.split("/"))

    def note_version(self, question: str, source: str, version: str) -> None:
        """Nothing: `note_revision` is what other tools understand."""

    def last_version(self, question: str) -> tuple[str, str] | None:  # noqa: ARG002 - the port's
        """None: `commit_of` knows."""
        return None

    def condemn(self, key: CacheKey) -> None:
        """Nothing: its files have the digests that they are named by; `open(check=True)` judges."""

    def remove(self, key: CacheKey) -> bool:
        """Partial downloads of it; what is whole stays, and then it is False."""
        left = []
        if self._partials is not None:
            with translated_errors("remove a download"):
                of = self._partials.of(key.name)
                left = [name for name in of if not self._partials.drop(name)]
        return not left and self.open(key) is None

    def used(self) -> int:
        """Bytes that are on their way; what is whole is everybody's."""
        if self._place is None:
            return 0
        with translated_errors("look at downloads"):
            there = Sizes(self._place.partials, is_partial_name).look()
        return sum(stored.nbytes for stored in there.values())

    def close(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            place.close()

    def __del__(self) -> None:
        if getattr(self, "_place", None) is not None:
            warnings.warn("unclosed hub cache", ResourceWarning, stacklevel=2)
            self.close()

    def _published(self, key: CacheKey, scope: str) -> HubEntry | None:
        """All its files are here."""
        self.scopes.begin(key.name)
        self.scopes.grant(key.name, scope)
        self._write_refs(key)
        return self.open(key)

    def _write_refs(self, key: CacheKey) -> None:
        repo, place = _repo_of(key), self._place
        assert repo is not None
        assert place is not None
        with translated_errors("note a revision in the hub cache"):
            for revision in self._meant.get(key, set()) - {key.version}:
                write_ref(self.path, repo, revision, key.version, place.trash)
        self._meant.pop(key, None)


def _repo_of(key: CacheKey) -> str | None:
    """Its folder's name; None for the key of another kind of source."""
    return repo_folder(key.source) if is_commit(key.version) else None


def _without_budget(_: int) -> AbstractContextManager[None]:
    return nullcontext()


def _opened(path: str) -> tuple[Place, Partials]:
    place = Place(os.path.join(path, ".locks", f"lorax-async-{os.geteuid()}"))
    try:
        with translated_errors("clean up"):
            place.tidy()
            partials = Partials(place)
            for name in place.partials.names():
                # Of one that was killed when all its files were blobs.
                if not files_in(place.partials, name):
                    partials.drop(name)
    except BaseException:
        place.close()
        raise
    return place, partials
