"""Rules of host memory broken on purpose."""

from __future__ import annotations

from core.lifecycle_broken import Mutant, nothing
from lorax_async.adapter import AdapterKey
from lorax_async.core import host_tier
from lorax_async.core.commands import Release
from lorax_async.core.decisions import Decisions
from lorax_async.core.host_tier import HostQueue, Images
from lorax_async.core.life import HostState, Life
from lorax_async.core.residency import HostBudget, ImageBudget
from lorax_async.core.settling import Settling
from lorax_async.core.transitions import FileState
from lorax_async.core.waiters import Tier

_evicted = Decisions._evicted


def _released_at_once(self: Decisions, life: Life, *, evicted: bool = False) -> None:
    self.host.pick(life.key, evicted=evicted)
    self.host.release(life.key)
    life.host = HostState.NONE
    self.command(Release(life.key, life.attempt))


def _not_demoted(life: Life) -> bool:
    ready = life.file is FileState.PRESENT and life.host is HostState.NONE and not life.unloads
    return ready and life.waiters.has_tier(Tier.HOST)


def _demotes_the_held(self: Decisions, life: Life) -> bool:
    evicted = _evicted(self, life)
    if evicted and not (life.unloads or self.closing) and life.needs is not None:
        life.demoted = life.needs.holdable
    return evicted


def _several_at_once(self: HostQueue) -> Life | None:
    self._budget.populating = None
    return _settle_head(self)


def _uses_what_leaves(self: HostBudget, key: AdapterKey) -> None:
    if key in self.held:
        self.policy.use(key)


def _no_end_of_host(self: Decisions, life: Life) -> bool:
    return not self.closing and _host_unwanted(self, life)


def _never_forgets_what_was_read_ahead(self: Life) -> bool:
    return _is_idle.__get__(self) and self.host is HostState.NONE


def _all_lies_there(self: Images, life: Life) -> None:
    _claim_image(self, life)
    if life.image is not None:
        life.imaged = life.all_groups


def _outlives_its_file(self: ImageBudget, life: Life, *, evicted: bool = False) -> None:
    if evicted:
        _drop_image(self, life, evicted=True)


def _losers_unsettled(self: Settling) -> Life | None:
    self.decisions.touched.clear()
    return self.slots.settle_head() or self.host_queue.settle_head()


_settle_head = HostQueue.settle_head
_host_unwanted = Decisions._host_unwanted
_is_idle = Life.is_idle
_claim_image = Images.claim
_drop_image = ImageBudget.drop

HOST_MEMORY: dict[str, Mutant] = {
    "held bytes are not counted": ("host memory for one of two", HostBudget, "claim", nothing),
    "held bytes are counted for ever": (
        *("host memory for one of two", HostBudget, "release"),
        nothing,
    ),
    "several are populated at once": (
        *("some can be held", HostQueue, "settle_head"),
        _several_at_once,
    ),
    "released is not awaited": (
        *("host memory for one of two", Decisions, "release_host"),
        _released_at_once,
    ),
    "nothing is released for others": (
        *("host memory for one of two", HostQueue, "_make_room"),
        nothing,
    ),
    "demotion is never served": (
        *("host memory for one of two", Life, "wants_host"),
        property(_not_demoted),
    ),
    "what is held is demoted": (
        *("host memory for one of two", Decisions, "_evicted"),
        _demotes_the_held,
    ),
    "what is released is used": (
        *("host memory for one of two", HostBudget, "use"),
        _uses_what_leaves,
    ),
    "what cannot be held waits": ("no host memory", HostQueue, "_refuse", nothing),
    "close keeps what is held": (
        *("host memory and unload", Decisions, "_host_unwanted"),
        _no_end_of_host,
    ),
    "what was read ahead is never forgotten": (
        *("populated and forgotten", Life, "is_idle"),
        property(_never_forgets_what_was_read_ahead),
    ),
    "an image is given away under a copy": (
        *("an image between two slots", host_tier, "_is_idle"),
        lambda _: True,
    ),
    "warm without the bytes": ("images for one of two", Images, "claim", _all_lies_there),
    "an image outlives its file": (
        *("images, unload and failures", ImageBudget, "drop"),
        _outlives_its_file,
    ),
    "who lost an image is never forgotten": (
        *("images for one of two", Settling, "_next_touched"),
        _losers_unsettled,
    ),
}
