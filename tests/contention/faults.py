"""The loader broken on purpose, a line at a time: what the plays of `test_contention` must notice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from lorax_async.adapter import AdapterKey
from lorax_async.core import commands, host_tier
from lorax_async.core.decisions import Decisions
from lorax_async.core.life import Grant, Life
from lorax_async.core.residency import HostBudget, ImageBudget
from lorax_async.io import transfer
from lorax_async.io.ports import CopyTicket
from lorax_async.io.staging import Buffer, StagingRing
from lorax_async.runtime.actions import Actions
from lorax_async.runtime.files import Files
from lorax_async.runtime.tenancy import Lease
from lorax_async.runtime.tenants import Tenants
from lorax_async.testing import SimulatedDevice

Fault = tuple[object, str, object]
"""Whose attribute, its name, and what stands there instead."""


def _blind_to(counter: str) -> Callable[[Decisions, Life], bool]:
    """Rule 4 for slots, without looking at one of what must be over first."""
    original = Decisions._slot_quiesced

    def blind(self: Decisions, life: Life) -> bool:
        kept = getattr(life, counter)
        setattr(life, counter, 0)
        changed = original(self, life)
        setattr(life, counter, kept)
        return changed

    return blind


def _column_stays(self: Actions, command: commands.ClearColumn) -> None:
    self._tenants.move_out(command.key)
    self.close_idle_reader(command.key)


def _given_back_at_once(self: StagingRing, count: int) -> list[Buffer]:
    taken = self._free[:count]
    self._free = self._free[count:] + taken
    return taken


def _done(*_: object) -> CopyTicket:
    done: CopyTicket = Future()
    done.set_result(None)
    return done


def _first_of(tickets: list[CopyTicket]) -> CopyTicket:
    return tickets[0]


def _image_taken_away(self: ImageBudget, life: Life, *, evicted: bool = False) -> None:
    if life.image is not None:
        self.arena.free(life.image)
        self.policy.remove(life.key, evicted=evicted)
        life.image = None  # what was in it is believed to be there still


def _free_of_charge(self: HostBudget, key: AdapterKey, nbytes: int, cost: float) -> None:
    if nbytes:
        self.held[key] = 0
        self.policy.admit(key, nbytes, cost)


async def _holds_stay(self: Files, key: AdapterKey) -> None:
    self.holds.pop(key, None)


def _use_ends_at_once(self: Lease, why: str = "", *, soon: bool = False) -> None:
    self._uses = 0
    _end(self, why or "the handle was released", soon=soon)


_end = Lease.end
_serve = Tenants.serve


def _prefetches_are_forgotten(
    self: Tenants, key: AdapterKey, waiter: int, grant: Grant | None
) -> None:
    if grant is not None:
        _serve(self, key, waiter, grant)


FAULTS: dict[str, Fault] = {
    "a slot is freed under a copy": (Decisions, "_slot_quiesced", _blind_to("copying")),
    "a slot is freed under a kernel": (Decisions, "_slot_quiesced", _blind_to("uses")),
    "a slot is freed under a lease": (Decisions, "_slot_quiesced", _blind_to("leases")),
    "a column is not cleared": (Actions, "_clear_column", _column_stays),
    "a staging buffer is used too early": (StagingRing, "take", _given_back_at_once),
    "a kernel does not wait for its copy": (SimulatedDevice, "wait_for", lambda *_: None),
    "a use is over at once": (SimulatedDevice, "note_use", _done),
    "a kernel ends with its handle": (Lease, "end", _use_ends_at_once),
    "a layer is ready before its last copy": (transfer, "_all_of", _first_of),
    "an image moves under a copy": (host_tier, "_is_idle", lambda life: True),
    "an image is warm that was given away": (ImageBudget, "drop", _image_taken_away),
    "held files cost nothing": (HostBudget, "claim", _free_of_charge),
    "files stay held": (Files, "_close_hold", _holds_stay),
    "ranks are not padded": (transfer, "zero", lambda *_: None),
    "a prefetch is not told": (Tenants, "serve", _prefetches_are_forgotten),
}
