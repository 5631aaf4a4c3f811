"""Which adapters have requests, and which of them have slots, as the loader's events tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from math import inf
from operator import attrgetter

from lorax_async.adapter import AdapterKey, Ref, RemoteKey
from lorax_async.core.batch_plan import Place
from lorax_async.core.urgency import LookAhead
from lorax_async.errors import IntegrityError, LoaderClosedError, LoraxError
from lorax_async.events import Event, Failed, LayerReady, Leaving, Resident
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.scheduling.admission import Places
from lorax_async.scheduling.clock import Alarm, Clock
from lorax_async.scheduling.guests import Guest
from lorax_async.scheduling.requests import Ticket
from lorax_async.scheduling.slots import Slots
from lorax_async.scheduling.waiting import Waiting


class Guestbook:
    """All guests.

    `changed` hears when there may be something to compute; `sent_back` of the requests of an
    adapter that has lost its slot; `in_the_way` of a guest in a batch that keeps a slot in vain.

    Attributes
    ----------
    slots
        What is known of the device's slots.
    held
        Guests that have slots, and the base if it has requests.
    places
        The engine's, and the requests that have them.
    dropped
        Requests that the engine has something of that it is to forget.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        clock: Clock,
        ahead: LookAhead,
        patience: float,
        places: Places,
        *,
        changed: Callable[[], None],
        sent_back: Callable[[Ticket], None],
        in_the_way: Callable[[Guest], None],
    ) -> None:
        self.slots = Slots(clock)
        self.held: dict[Guest, None] = {}
        self.places = places
        self.dropped: list[Ticket] = []
        self._loader = loader
        self._clock = clock
        self._patience = patience
        self._changed = changed
        self._sent_back = sent_back
        self._in_the_way = in_the_way
        self._guests: dict[Ref | None, Guest] = {}
        self._by_key: dict[AdapterKey, list[Guest]] = {}
        self._alarm: Alarm | None = None
        self._looked = -inf
        self._waiting = Waiting(
            loader,
            ahead,
            patience,
            clock,
            held=lambda: sum(guest.handle is not None for guest in self.held),
            granted=self._granted,
            failed=self.fail,
        )
        self._unsubscribe = loader.subscribe(self._heard)

    # -- requests ----------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> None:
        """One more request. Raises what `AdapterLoader.try_acquire` raises, and then has none."""
        guest = self._guests.get(ticket.ref)
        if guest is not None:
            ticket.client = self.places.client_of(ticket.request.client)
            guest.add(ticket)
            self._waiting.update(guest)
        else:
            handle = None if ticket.ref is None else self._loader.try_acquire(ticket.ref)
            least = min((other.tokens for other in self._guests.values()), default=0)
            guest = self._guests[ticket.ref] = Guest(ticket.ref, least)
            ticket.client = self.places.client_of(ticket.request.client)
            guest.add(ticket)
            if handle is not None:
                self._adopt(guest, handle)
            elif ticket.ref is None:
                self.held[guest] = None
            else:
                self._waiting.add(guest)
                self._watch()
        self._changed()

    def guest_of(self, ticket: Ticket) -> Guest:
        """Whose it is; it must not be done."""
        return self._guests[ticket.ref]

    def begin(self, guest: Guest, ticket: Ticket) -> None:
        """It is computed: the engine keeps something of it from now on."""
        self.places.take(guest, ticket)

    def begin_again(self, ticket: Ticket) -> None:
        """The engine keeps nothing of it, for its adapter did not come in time."""
        self._guests[ticket.ref].trusted = False
        self.places.vacate(ticket)

    def preempt(self, ticket: Ticket) -> None:
        """Take its place for another one; it waits to be computed from its first token on."""
        ticket.progress.restart()
        self.places.vacate(ticket)
        self._waiting.update(self._guests[ticket.ref])

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Note that so many tokens were computed of it; it must not be done."""
        self._guests[ticket.ref].tokens += tokens
        if ticket.client is not None:
            ticket.client.tokens += tokens

    @property
    def has_ready(self) -> bool:
        """Whether there are rows that wait for nothing but their turn."""
        ready = (guest for guest in self.held if guest.is_ready and not guest.leaving)
        return any(guest.waiting(1, inf) for guest in ready)

    def leave(self, ticket: Ticket) -> None:
        """It is done, for whatever reason; once."""
        guest = self._guests[ticket.ref]
        guest.remove(ticket)
        self.places.leave(ticket)
        if guest.tickets:
            self._waiting.update(guest)
        else:
            self._part(guest)

    def landed(self, guests: Iterable[Guest]) -> None:
        """A batch that they were in was completed."""
        for guest in guests:
            guest.flights -= 1
            if guest.flights:
                continue
            if not guest.tickets:
                self._release(guest)
            elif guest.leaving:
                self._settle(guest)
        self._relieve()

    def fail(self, guest: Guest, error: LoraxError) -> None:
        """What goes wrong with an adapter goes wrong with its requests, and with no other."""
        tickets, guest.tickets = guest.tickets, []
        for ticket in tickets:
            self.places.leave(ticket)
        self._part(guest)
        for ticket in tickets:
            ticket.end(error.located(id=guest.id))
        self._changed()

    def _part(self, guest: Guest) -> None:
        """It has no requests any more; new ones are another guest's."""
        if self._guests.get(guest.ref) is guest:
            del self._guests[guest.ref]
        self._waiting.remove(guest)
        if not guest.flights:
            self._release(guest)

    # -- slots -------------------------------------------------------------------------------------

    def _granted(self, guest: Guest, handle: AdapterHandle) -> None:
        self._waiting.remove(guest)
        self._adopt(guest, handle)
        self._changed()

    def _adopt(self, guest: Guest, handle: AdapterHandle) -> None:
        slot = handle.slot
        guest.handle, guest.place = handle, Place(slot.index, slot.generation)
        guest.trusted = True
        guest.leaving = self.slots.is_leaving(slot)
        guest.arrival = self.slots.adopt(handle)
        self.held[guest] = None
        self._by_key.setdefault(handle.key, []).append(guest)
        self._settle(guest)
        self._watch()

    def _release(self, guest: Guest) -> None:
        """Give its slot back, if it has one. Idempotent."""
        self.held.pop(guest, None)
        handle, guest.handle, guest.arrival = guest.handle, None, None
        if handle is None:
            return
        others = self._by_key[handle.key]
        others.remove(guest)
        if not others:
            del self._by_key[handle.key]
        handle.release()
        self._waiting.look_soon()

    def _send_back(self, guest: Guest, *, resting: bool = False) -> None:
        """Others get its slot; it waits for another one."""
        self._release(guest)
        for ticket in guest.tickets:
            self._sent_back(ticket)
        self._waiting.add(guest, resting=resting)
        self._watch()

    # -- events ------------------------------------------------------------------------------------

    def _heard(self, event: Event) -> None:
        if event.slot is not None:
            self.slots.heard(event, event.slot)
        for guest in tuple(self._by_key.get(event.key, ())):
            self._tell(guest, event)

    def _tell(self, guest: Guest, event: Event) -> None:
        if isinstance(event, LayerReady | Resident):
            guest.leaving = guest.leaving and not isinstance(event, Resident)
            self._changed()
        elif isinstance(event, Failed | Leaving):
            guest.leaving = guest.leaving or isinstance(event, Leaving)
            # A slot breaks, and leaves, after that was told.
            asyncio.get_running_loop().call_soon(self._settle, guest)

    def _settle(self, guest: Guest) -> None:
        """Fail it if its weights are no good; let it go if it is to."""
        self.judge([guest])
        if guest.handle is None:
            return
        if guest.handle.released:
            self.fail(guest, LoaderClosedError("the loader was closed"))
        elif guest.leaving and guest.tickets and not guest.flights:
            self._send_back(guest)

    def check(self) -> None:
        """Settle what no event tells: a digest that is another, a loader that was closed."""
        for guest in tuple(self.held):
            self._settle(guest)

    def judge(self, guests: Iterable[Guest]) -> None:
        """Fail those whose weights turned out to be no good, or load them once more."""
        for guest in guests:
            handle = guest.handle
            if handle is None:
                continue
            try:
                handle.require_sound()
            except LoraxError as error:
                if guest.reloaded or not _may_have_changed(guest, handle, error):
                    self.fail(guest, error)
                else:
                    self._reload(guest, handle.key, error)

    def _reload(self, guest: Guest, key: AdapterKey, error: LoraxError) -> None:
        """Let its requests wait for another version, if there is one, unless they have tokens.

        They are another guest's from now on: nothing counts that is being computed of them.
        """
        tickets, guest.tickets = guest.tickets, []
        again = Guest(guest.ref, guest.tokens)
        again.reloaded = True
        self._part(guest)
        for ticket in tickets:
            if ticket.generated:
                self.places.leave(ticket)
                ticket.end(error.located(id=guest.id))
                continue
            if ticket.begun:
                self.dropped.append(ticket)
            ticket.progress.restart()
            self.places.vacate(ticket)
            again.add(ticket)
            self._sent_back(ticket)
        if again.tickets:
            self._guests[guest.ref] = again
            self._waiting.add(again, broken=(key, error))
            self._watch()
        self._changed()

    def make_way(self) -> None:
        """Nobody may begin. Where all who have begun wait for slots, they get one held in vain.

        Who gave way keeps what it gets next: those who have begun may not be ready to take it.
        """
        held = [guest for guest in self.held if guest.handle is not None]
        since = self._clock.time() - self._patience
        in_vain = [guest for guest in held if guest.gave_way <= since]
        if in_vain and not any(guest.begun for guest in held):
            guest = max(in_vain, key=attrgetter("urgency"))
            guest.gave_way = self._clock.time()
            self._send_back(guest)

    # -- slots in which nothing comes --------------------------------------------------------------

    def _watch(self) -> None:
        """While others wait, a slot is not for who gets nothing in it."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due = min((latest for _, latest in self._streaming()), default=None)
        if due is not None and len(self._waiting):
            when = max(due, self._looked) + self._patience
            self._alarm = self._clock.call_at(when, self._relieve)

    def _relieve(self) -> None:
        now = self._clock.time()
        for guest, latest in self._streaming():
            if now < latest + self._patience or not len(self._waiting):
                continue
            if guest.flights:
                self._looked = now
                self._in_the_way(guest)
            else:
                self._send_back(guest, resting=True)
        self._watch()

    def _streaming(self) -> list[tuple[Guest, float]]:
        """Guests whose layers are to come, and when something of them came last."""
        return [
            (guest, guest.arrival.latest)
            for guest in self.held
            if guest.arrival is not None and not guest.is_ready
        ]

    # -- the end -----------------------------------------------------------------------------------

    async def close(self, error: LoraxError) -> None:
        """Fail all requests and give all slots back, those of batches under way, too."""
        self._unsubscribe()
        if self._alarm is not None:
            self._alarm.cancel()
        for guest in tuple(self._guests.values()):
            self.fail(guest, error)
        for guest in tuple(self.held):
            self._release(guest)
        await self._waiting.close()


def _may_have_changed(guest: Guest, handle: AdapterHandle, error: LoraxError) -> bool:
    """Return whether it is worth asking: its files are local, and what was read is not them.

    A digest that the caller gave is the caller's own word: others are refused.
    """
    local = bool(handle.key.files) and not isinstance(handle.key, RemoteKey)
    own = isinstance(guest.ref, AdapterKey) or getattr(guest.ref, "digest", None) is not None
    return local and not own and isinstance(error, IntegrityError)
