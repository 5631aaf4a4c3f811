"""Takes every decision that is due: rules 1 to 6 for each adapter, 7 to 9 for those who queue."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Command, Drop, Forget
from lorax_async.core.decisions import Decisions
from lorax_async.core.host_tier import HostQueue, Images
from lorax_async.core.idle import Idle
from lorax_async.core.life import HostState, Life
from lorax_async.core.queues import CopyQueue, SlotQueue
from lorax_async.core.residency import HostBudget, ImageBudget, Residency
from lorax_async.core.transitions import FileMove, FileState, next_file_state


@dataclass(frozen=True, slots=True)
class Budgets:
    """Of the device, of held file pages, and of page-locked images."""

    device: Residency
    host: HostBudget
    images: ImageBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long what is decided may stand in the way of others.

    Attributes
    ----------
    starvation_age
        Seconds after which a waiting foreground wish stops new leases on a resident adapter, and
        what one level of priority is worth.
    min_residency
        Seconds for which a resident adapter is not evicted, unless somebody starves.
    max_idle
        Adapters without slot and interest that are remembered.
    """

    starvation_age: float = 5.0
    min_residency: float = 0.0
    max_idle: int = 16_384


class Settling:
    """All adapters of one loader, and the queues in which they stand."""

    def __init__(self, budgets: Budgets, pace: Pace) -> None:
        self.lives: dict[AdapterKey, Life] = {}
        self.decisions = Decisions(budgets.device, budgets.host, budgets.images)
        self.slots = SlotQueue(
            self.decisions,
            self.lives,
            Images(self.decisions, self.lives),
            starvation_age=pace.starvation_age,
            min_residency=pace.min_residency,
        )
        self.host_queue = HostQueue(self.decisions, self.lives, level=pace.starvation_age)
        self.copies = CopyQueue(self.decisions)
        self.idle = Idle(pace.max_idle)

    def life(self, key: AdapterKey) -> Life:
        """What is known of an adapter, from here on."""
        life = self.lives.get(key)
        if life is None:
            life = self.lives[key] = Life(key)
        return life

    def settle(self, *lives: Life) -> list[Command]:
        """Take every decision that is due, for these adapters, then for the heads of the queues."""
        for life in lives:
            self._settle_life(life)
        while touched := self._next_touched():
            self._settle_life(touched)
        self.copies.submit()
        self._forget_oldest()
        return self.decisions.take_commands()

    def _next_touched(self) -> Life | None:
        if self.decisions.touched:
            return self.decisions.touched.pop()
        return self.slots.settle_head() or self.host_queue.settle_head()

    def next_copies(self) -> list[Command]:
        """What is due when nothing but a place for a copy came free, as it often does."""
        self.copies.submit()
        return self.decisions.take_commands()

    def _settle_life(self, life: Life) -> None:
        self.decisions.settle(life)
        self.slots.update(life)
        self.host_queue.update(life)
        self.copies.update(life)
        if life.is_idle:
            self.idle.add(life.key, life.needs)
        else:
            self.idle.discard(life.key)

    def _forget_oldest(self) -> None:
        while (key := self.idle.one_too_many) is not None:
            self._forget(key)

    def forget(self, key: AdapterKey) -> list[Command]:
        """Forget an adapter now, if it is idle."""
        life = self.lives.get(key)
        if life is not None and life.is_idle:
            self._forget(key)
        return self.decisions.take_commands()

    def _forget(self, key: AdapterKey) -> None:
        self.idle.discard(key)
        life = self.lives.pop(key)
        if life.file is FileState.PRESENT:
            life.host = HostState.NONE
            life.file = next_file_state(life.file, FileMove.DROPPED)
            self.decisions.command(Drop(key))
            self.decisions.file_quiesced(life)
        life.file = next_file_state(life.file, FileMove.DROPPED)
        self.decisions.command(Forget(key))
