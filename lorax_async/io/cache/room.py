"""Room in a disk cache: claimed before it is written to, by whichever process. Blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from lorax_async.core.cache_names import is_entry_name, is_partial_name
from lorax_async.core.disk_budget import DiskBudget, Stored
from lorax_async.core.policies import Policy
from lorax_async.errors import CapacityError
from lorax_async.io.cache.entries import Entries
from lorax_async.io.cache.failures import CrowdedError, translated_errors
from lorax_async.io.cache.partials import Partials
from lorax_async.io.cache.place import Place
from lorax_async.io.cache.sizes import Sizes

_LOOKING = "make room"


class Room:
    """The budget of a cache folder, which all processes that use the folder have to keep.

    Nobody trusts an old total: each claim looks at the folder afresh and allocates its bytes there
    under one lock. Where locks do nothing, two processes may see the same room; then the folder
    holds too much by what the others claimed in that moment, until the next claim of anybody.
    """

    def __init__(
        self, place: Place, entries: Entries, partials: Partials, nbytes: int, policy: Policy
    ) -> None:
        self._place = place
        self._entries = entries
        self._partials = partials
        self._budget = DiskBudget(nbytes, policy)
        self._stored = Sizes(place.entries, is_entry_name)
        self._lock = Lock()
        self._observed = False

    @contextmanager
    def claimed(self, nbytes: int) -> Iterator[None]:
        """Room for so many bytes more; they are to be allocated before this is left.

        Raises `CapacityError` if there is not so much beside what is in use.
        """
        with self._lock, translated_errors(_LOOKING), self._place.undisturbed():
            self._observe()
            self._make(nbytes)
            yield

    def trim(self) -> None:
        """Drop what is over the budget, as far as it is not in use."""
        with self._lock, translated_errors(_LOOKING), self._place.undisturbed():
            self._observe()
            self._evict(0)

    def used(self) -> int:
        """Bytes of adapters' files that the folder holds now."""
        with self._lock, translated_errors(_LOOKING), self._place.undisturbed():
            self._observe()
            return self._budget.used

    @property
    def last_used(self) -> int | None:
        """As the folder was when it was looked at last, and what was used or dropped since."""
        return self._budget.used if self._observed else None

    def note_use(self, name: str, stored: Stored) -> None:
        with self._lock:
            self._budget.use(name, stored)

    def _observe(self) -> None:
        # Its bytes count nowhere; there are none but after a kill or a failure.
        self._place.empty_trash()
        # What partials take changes, so each look is a first one; there are few.
        partials = Sizes(self._place.partials, is_partial_name)
        self._budget.observe(self._stored.look(), partials.look())
        self._observed = True

    def _make(self, nbytes: int) -> None:
        budget = self._budget
        if budget.fits_beside(nbytes, self._staying()):
            self._evict(nbytes)
        if budget.free < nbytes:
            ever = nbytes <= budget.nbytes
            raise (CrowdedError if ever else CapacityError)(
                f"{nbytes:,} bytes do not fit into the disk cache's {budget.nbytes:,}"
                " beside what is in use; raise its budget",
                stage="fetch",
                retryable=ever,
            )

    def _evict(self, nbytes: int) -> None:
        """Drop who goes first until so much is free, or nobody can go."""
        if self._budget.free >= nbytes:
            return
        for name in self._budget.victims():
            if self._drop(name):
                self._budget.forget(name, evicted=True)
                if self._budget.free >= nbytes:
                    return

    def _staying(self) -> set[str]:
        """What this process uses; what others use shows when it is to be dropped."""
        return self._entries.held() | self._partials.own()

    def _drop(self, name: str) -> bool:
        if is_entry_name(name):
            return self._entries.drop(name)
        return self._partials.drop(name)
