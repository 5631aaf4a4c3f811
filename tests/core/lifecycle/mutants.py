"""Rules broken on purpose, one at a time, each with the world in which that is noticed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from lorax_async.adapter import AdapterKey
from lorax_async.core import holders, host_tier
from lorax_async.core.commands import Command, Fetch, Release, Serve, TellUnloaded
from lorax_async.core.decisions import Decisions
from lorax_async.core.holders import Holders
from lorax_async.core.host_tier import HostQueue, Images
from lorax_async.core.life import HostState, Life
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.queues import CopyQueue, SlotQueue
from lorax_async.core.residency import HostBudget, ImageBudget, Residency
from lorax_async.core.settling import Settling
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.core.waiters import Tier
from lorax_async.errors import LoraxError

Mutant = tuple[type | ModuleType, str, object]
"""What is replaced by what."""

_claim_image = Images.claim
_close = Lifecycle.close
_drop_image = ImageBudget.drop
_evicted = Decisions._evicted
_fits_beside = Residency.fits_beside
_host_unwanted = Decisions._host_unwanted
_is_idle = Life.is_idle
_note = Holders.note
_settle_head = HostQueue.settle_head
_slot_quiesced = Decisions._slot_quiesced
_submit = CopyQueue.submit
_tell_stays = Decisions.tell_stays
_unloaded = Decisions._unloaded


def no_commands(*_: object) -> list[object]:
    return []


def always(value: object) -> Callable[..., object]:
    return lambda *_: value


# -- slots, files and copies ----------------------------------------------------------------------


def _without(*counters: str) -> Callable[[Decisions, Life], bool]:
    """Rule 4 for slots, blind to some of what must be over first."""
    original = Decisions._slot_quiesced

    def blind(self: Decisions, life: Life) -> bool:
        kept = {name: getattr(life, name) for name in counters}
        for name in counters:
            setattr(life, name, 0)
        try:
            return original(self, life)
        finally:
            for name, value in kept.items():
                setattr(life, name, value)

    return blind


def _unsettled_withdraw(self: Lifecycle, key: AdapterKey, waiter: int) -> list[object]:
    self.lives[key].waiters.remove(waiter)
    return []


def _notes_in_silence(self: Holders, life: Life) -> bool:
    _note(self, life)
    return False


def _file_gone_under_fetch(_: Decisions, life: Life) -> bool:
    if life.file is not FileState.ENDING:
        return False
    life.file = FileState.ABSENT
    life.fetched = 0
    return True


def _early(self: Decisions, life: Life, _: Tier) -> bool:
    return life.slot in (SlotState.FILLING, SlotState.RESIDENT) and not self.closing


def _blind_to_leaving(self: Decisions, life: Life, tier: Tier) -> bool:
    if life.slot is SlotState.RESIDENT:
        return not self.closing
    return tier is Tier.STREAM and life.slot is SlotState.FILLING


def _evicts_the_leased(_: Decisions, life: Life) -> bool:
    if life.slot is not SlotState.RESIDENT or not life.leaving:
        return False
    life.slot = SlotState.DRAINING
    life.leases = 0
    return True


def _column_not_cleared(self: Decisions, life: Life) -> bool:
    ready = life.slot is SlotState.DRAINING and not (life.copying or life.uses or life.leases)
    if not ready or life.grant is None:
        return False
    life.slot = SlotState.NONE
    self.residency.release(life.key, life.grant, evicted=False)
    life.vacate()
    return True


def _not_zeroed(self: Decisions, life: Life) -> bool:
    life.broken = False
    return _slot_quiesced(self, life)


def _zeroing_is_not_waited_for(self: Decisions, life: Life) -> bool:
    quiesced = _slot_quiesced(self, life)
    life.broken = life.broken and not life.wiping
    life.wiping = False
    return quiesced or _slot_quiesced(self, life)


def _distrusts_what_is_held(self: Decisions, life: Life, error: LoraxError) -> None:
    self.fail(life, error)
    self.break_slot(life, error, (SlotState.FILLING, SlotState.RESIDENT))


def _copies_unread(self: CopyQueue) -> None:
    for life in list(self._queue.values()):
        life.fetched = life.all_groups
    _submit(self)


def _forgets_the_place(_: CopyQueue, life: Life) -> None:
    life.copying -= 1


def _prefetch_is_foreground(self: Life) -> bool:
    ready = self.needs is not None and self.file in (FileState.FETCHING, FileState.PRESENT)
    return ready and any(waiter.tier >= Tier.STREAM for waiter in self.waiters)


def _fetch_twice(self: Decisions, life: Life) -> bool:
    if not life.waiters or life.file not in (FileState.ABSENT, FileState.ENDING):
        return False
    life.file = FileState.FETCHING
    life.attempt += 1
    life.fetch_running = True
    self.command(Fetch(life.key, life.attempt))
    return True


def _leases_for_all(self: Decisions, life: Life) -> bool:
    tiers = {tier for tier, _ in life.waiters.kinds if self.reached(life, tier)}
    served = life.waiters.of_tiers(tiers)
    for waiter in served:
        life.waiters.remove(waiter.id)
        leases = waiter.tier >= Tier.STREAM
        life.leases += leases
        self.command(Serve(life.key, waiter.id, life.grant if leases else None))
    return bool(served)


# -- pins and unload ------------------------------------------------------------------------------


def _pins_may_go(life: Life) -> bool:
    return life.slot is SlotState.RESIDENT and not life.departing


def _blind_to_pins(self: Residency, _: object, sizes: tuple[int, ...]) -> bool:
    return _fits_beside(self, (), sizes)


def _drains_pinned(self: Decisions, life: Life, state: SlotState) -> None:
    self.tell_leaving(life)
    life.slot = state


def _forget_anything(self: Settling, key: AdapterKey) -> list[Command]:
    if key in self.lives:
        self._forget(key)
    return self.decisions.take_commands()


def _pin_anything(self: Lifecycle, key: AdapterKey) -> bool:
    self.lives[key].pins += 1
    return True


def _pin_after_close(self: Lifecycle, key: AdapterKey) -> bool:
    life = self.lives[key]
    if life.departing or life.slot is not SlotState.RESIDENT:
        return False
    life.pins += 1
    return True


def _unload_keeps_pins(self: Lifecycle, key: AdapterKey) -> list[object]:
    life = self._settling.life(key)
    life.unloads += 1
    self._decisions.tell_leaving(life)
    return [*self._settling.settle(life)]


def _unload_untold(self: Lifecycle, key: AdapterKey) -> list[object]:
    life = self._settling.life(key)
    life.unloads += 1
    life.pins = 0
    return [*self._settling.settle(life)]


def _close_keeps_pins(self: Lifecycle, error: Exception) -> list[object]:
    pins = {key: life.pins for key, life in self.lives.items()}
    answer = _close(self, error)  # type: ignore[arg-type]
    for key, life in self.lives.items():
        life.pins = pins[key]
    return [*answer]


def _unloaded_unless(*kept: str) -> Callable[[Decisions, Life], bool]:
    """Tells that it is unloaded without a look at some of what it may hold."""

    def unloaded(self: Decisions, life: Life) -> bool:
        held = {
            "slot": life.slot is not SlotState.NONE,
            "host": life.host is not HostState.NONE,
            "image": life.image is not None,
        }
        if not life.unloads or any(held[name] for name in held if name not in kept):
            return False
        life.unloads = 0
        self.command(TellUnloaded(life.key))
        return True

    return unloaded


def _unload_never_over(self: Decisions, life: Life) -> bool:
    """The caller is told, and yet nobody may claim it again."""
    over = _unloaded(self, life)
    if over:
        life.unloads = 1
        life.told = True
    return False


def _unload_not_lifted(self: Lifecycle, key: AdapterKey) -> list[object]:
    return [*self._settling.settle(self.lives[key])] if key in self.lives else []


def _unsettled_lift(self: Lifecycle, key: AdapterKey) -> list[object]:
    life = self.lives.get(key)
    if life is not None and life.unloads:
        life.unloads -= 1
        if not life.departing:
            self._decisions.tell_stays(life)
    return [*self._decisions.take_commands()]


def _stays_if_resident(self: Decisions, life: Life) -> None:
    if life.slot is SlotState.RESIDENT:
        _tell_stays(self, life)


# -- host memory ----------------------------------------------------------------------------------


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


BROKEN: dict[str, dict[str, Mutant]] = {
    "two adapters, one slot": {
        "slot freed under a copy": (Decisions, "_slot_quiesced", _without("copying")),
        "slot freed under a lease": (Decisions, "_slot_quiesced", _without("leases")),
        "slot freed under a kernel": (Decisions, "_slot_quiesced", _without("uses")),
        "column not cleared": (Decisions, "_slot_quiesced", _column_not_cleared),
        "what broke is not zeroed": (Decisions, "_slot_quiesced", _not_zeroed),
        "zeroing is not waited for": (Decisions, "_slot_quiesced", _zeroing_is_not_waited_for),
        "what drains is trusted": (Decisions, "distrust", _distrusts_what_is_held),
        "slot never freed": (Decisions, "_slot_quiesced", always(False)),
        "file gone while it is fetched": (Decisions, "file_quiesced", _file_gone_under_fetch),
        "file never ends": (Decisions, "file_quiesced", always(False)),
        "served before the last byte": (Decisions, "reached", _early),
        "nobody is served": (Decisions, "_serve", always(False)),
        "nobody is evicted": (Decisions, "_evicted", always(False)),
        "no room is made": (SlotQueue, "_make_room", always(None)),
        "no change of a holder is noticed": (Holders, "note", _notes_in_silence),
        "failed fetches fail nobody": (Decisions, "fail", always(None)),
        "copies of bytes not here": (CopyQueue, "submit", _copies_unread),
        "fetched while ending": (Decisions, "_fetch", _fetch_twice),
        "fetched never": (Decisions, "_fetch", always(False)),
        "close fails nobody": (Lifecycle, "close", no_commands),
        "a withdrawal decides nothing": (Lifecycle, "withdraw", _unsettled_withdraw),
        "an unwanted slot stays": (Decisions, "_slot_unwanted", always(False)),
        "turns of copies never come": (CopyQueue, "update", always(None)),
    },
    "lookups and ageing": {
        "leased while leaving": (Decisions, "reached", _blind_to_leaving),
        "the leased are evicted": (Decisions, "_evicted", _evicts_the_leased),
        "the leased leave for nobody": (SlotQueue, "_starves_at", always(0.0)),
        "the starving wait on": (SlotQueue, "_starves_at", always(float("inf"))),
    },
    "one copy at a time": {
        "a copy's place is not given back": (CopyQueue, "copied", _forgets_the_place)
    },
    "prefetch beside foreground": {
        "a prefetch takes a slot early": (Life, "wants_slot", property(_prefetch_is_foreground)),
        "a prefetch gets a lease": (Decisions, "_serve", _leases_for_all),
    },
    "too large": {"any slot fits": (Residency, "fits_beside", always(True))},
    "minimum residency": {
        "minimum residency ignored": (SlotQueue, "_evictable_at", always(0.0)),
        "minimum residency has no end": (SlotQueue, "_evictable_at", always(float("inf"))),
    },
    "pins of one of three": {"the pinned are picked": (holders, "may_go", _pins_may_go)},
    "pins": {
        "the pinned-out wait": (Residency, "fits_beside", _blind_to_pins),
        "pinned after close": (Lifecycle, "pin", _pin_after_close),
        "pins survive close": (Lifecycle, "close", _close_keeps_pins),
        "unpin decides nothing": (Lifecycle, "unpin", no_commands),
    },
    "pins and streams": {"pins survive a drain": (Decisions, "drain", _drains_pinned)},
    "pins and ageing": {"what leaves is pinned": (Lifecycle, "pin", _pin_anything)},
    "pins and unload": {"pins survive unload": (Lifecycle, "unload", _unload_keeps_pins)},
    "unload beside loads": {
        "unload is told to nobody": (Lifecycle, "unload", _unload_untold),
        "leased while it is unloaded": (Life, "departing", property(lambda life: life.leaving)),
        "unloaded under a lease": (Decisions, "_unloaded", _unloaded_unless("slot")),
        "unload has no end": (Decisions, "_unloaded", always(False)),
        "unload strands those who wait": (Decisions, "_unloaded", _unload_never_over),
        "unload cannot be given up": (Lifecycle, "withdraw_unload", _unload_not_lifted),
        "who stays is not told": (Decisions, "tell_stays", always(None)),
    },
    "host memory and unload": {
        "unloaded before its pages": (Decisions, "_unloaded", _unloaded_unless("host")),
        "close keeps what is held": (Decisions, "_host_unwanted", _no_end_of_host),
    },
    "images, unload and failures": {
        "unloaded before its image": (Decisions, "_host_unwanted", always(False)),
        "an image outlives its file": (ImageBudget, "drop", _outlives_its_file),
    },
    "forgotten on demand": {"forgets whatever it is": (Settling, "forget", _forget_anything)},
    "unload beside streams": {
        "giving up unload decides nothing": (Lifecycle, "withdraw_unload", _unsettled_lift),
        "who fills and stays is not told": (Decisions, "tell_stays", _stays_if_resident),
    },
    "host memory for one of two": {
        "held bytes are not counted": (HostBudget, "claim", always(None)),
        "held bytes are counted for ever": (HostBudget, "release", always(None)),
        "released is not awaited": (Decisions, "release_host", _released_at_once),
        "nothing is released for others": (HostQueue, "_make_room", always(None)),
        "demotion is never served": (Life, "wants_host", property(_not_demoted)),
        "what is held is demoted": (Decisions, "_evicted", _demotes_the_held),
        "what is released is used": (HostBudget, "use", _uses_what_leaves),
    },
    "some can be held": {
        "several are populated at once": (HostQueue, "settle_head", _several_at_once)
    },
    "no host memory": {"what cannot be held waits": (HostQueue, "_refuse", always(None))},
    "populated and forgotten": {
        "what was read ahead is never forgotten": (
            Life,
            "is_idle",
            property(_never_forgets_what_was_read_ahead),
        ),
    },
    "an image between two slots": {
        "an image is given away under a copy": (host_tier, "_is_idle", always(True))
    },
    "images for one of two": {
        "warm without the bytes": (Images, "claim", _all_lies_there),
        "who lost an image is never forgotten": (Settling, "_next_touched", _losers_unsettled),
    },
}
MUTANTS = {
    name: (world, *mutant) for world, all_ in BROKEN.items() for name, mutant in all_.items()
}
