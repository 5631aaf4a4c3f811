"""What the loader's events say of the device's slots."""

from __future__ import annotations

from lorax_async.core.arrival_estimate import Arrival, Courses
from lorax_async.core.batch_plan import Tenant
from lorax_async.events import Event, LayerReady, Leaving, Resident, SlotGranted, SlotId
from lorax_async.handle import AdapterHandle
from lorax_async.scheduling.clock import Clock


class Slots:
    """Every slot, whoever has it; what streams into one teaches how loads go.

    Attributes
    ----------
    tenants
        Who has which slot now; the rank of those only that were adopted.
    """

    def __init__(self, clock: Clock) -> None:
        self.tenants: dict[int, Tenant] = {}
        self._clock = clock
        self._courses = Courses()
        self._arrivals: dict[int, Arrival] = {}
        self._leaving: set[SlotId] = set()

    def heard(self, event: Event, slot: SlotId) -> None:
        match event:
            case SlotGranted():
                course = self._courses.of(type(event.key).__name__)
                arrival = Arrival(event.layers, event.nbytes, self._clock.time(), course)
                self._arrivals[slot.index] = arrival
                self._leaving = {each for each in self._leaving if each.index != slot.index}
                self.tenants[slot.index] = Tenant(slot.generation, 0)
            case LayerReady():
                if slot.index in self._arrivals:
                    self._arrivals[slot.index].note(event.layer, self._clock.time())
            case Resident():
                self._arrivals.pop(slot.index, None)
                self._leaving.discard(slot)
            case Leaving():
                self._leaving.add(slot)

    def is_leaving(self, slot: SlotId) -> bool:
        return slot in self._leaving

    def adopt(self, handle: AdapterHandle) -> Arrival | None:
        """Somebody has it from now on. How it arrives, if it is not there.

        Of a load that began before anybody listened, less is known.
        """
        slot = handle.slot
        self.tenants[slot.index] = Tenant(slot.generation, handle.rank)
        if handle.resident:
            return None
        if slot.index not in self._arrivals:
            course = self._courses.of(type(handle.key).__name__)
            arrival = Arrival(handle.layers, handle.nbytes, self._clock.time(), course)
            arrival.missed(sum(handle.is_ready(layer) for layer in handle.layers))
            self._arrivals[slot.index] = arrival
        return self._arrivals[slot.index]
