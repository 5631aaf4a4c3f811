"""Leases that are used and ended at the same moment, and the copies that their streams wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Grant
from lorax_async.core.moves import GroupPlan
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.errors import LoraxError
from lorax_async.events import SlotId
from lorax_async.io.ports import CopyTicket
from lorax_async.runtime.tenancy import Lease, Tenancy

LAYERS = (-1, 0, 2, 4)
"""Of a model with four layers: 1 and 3 have no tensors, 4 is what comes after them."""


class Stay(Tenancy):
    """`look` is called once, when a lease asks whether all is well."""

    def __init__(self) -> None:
        groups = tuple(GroupPlan(layer, 64, (), (), (), (), ()) for layer in LAYERS)
        plan = TransferPlan(groups, "F32", 4, 256, 300)
        super().__init__(AdapterKey("somewhere", ()), Grant(SlotId(0, 1), ()), plan, 4)
        self.look: Callable[[], None] | None = None

    @property
    def error(self) -> LoraxError | None:
        look, self.look = self.look, None
        if look is not None:
            look()
        return None

    @error.setter
    def error(self, error: LoraxError | None) -> None:
        self.look = None


class Watched(Lease):
    """`look` is called once, when it is asked whether it is closed; `heard` are its ends."""

    def __init__(self, stay: Stay) -> None:
        self.heard: list[object] = []
        self.look: Callable[[], None] | None = None
        super().__init__(
            stay,
            lambda lease, in_use, soon: self.heard.append(("ended", in_use)),
            lambda lease: self.heard.append("quiet"),
        )

    @property
    def closed(self) -> bool:
        look, self.look = self.look, None
        if look is not None:
            look()
        return super().closed


class Ending:
    """Ends a lease from another thread, and leaves it a moment for that."""

    def __init__(self, lease: Lease) -> None:
        self._thread = threading.Thread(target=lease.end)

    def begin(self) -> None:
        self._thread.start()
        self._thread.join(0.05)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_an_end_while_a_use_begins_is_told_of_it() -> None:
    """Else the slot would be given away, and the use goes on."""
    stay = Stay()
    lease = Watched(stay)
    ending = Ending(lease)
    stay.look = ending.begin
    lease.begin_use()
    ending.join()
    assert lease.heard == [("ended", True)]
    lease.end_use()
    assert lease.heard == [("ended", True), "quiet"]


def test_a_use_that_ends_first_is_not_spoken_of() -> None:
    lease = Watched(Stay())
    lease.begin_use()
    ending = Ending(lease)
    lease.look = ending.begin
    lease.end_use()
    ending.join()
    assert lease.heard == [("ended", False)]


def test_a_layer_comes_after_those_before_it() -> None:
    """Tickets of all that may not be done; None while some copy has not been asked for."""
    stay, first, second = Stay(), Future[None](), Future[None]()
    stay.sent(1, second)
    assert stay.tickets(0) is None
    stay.sent(0, first)
    asked: list[CopyTicket] | None = stay.tickets(0)
    assert asked == [first, second]
    assert stay.tickets(-1) == [first]
    assert stay.tickets(1) == []
    assert stay.tickets(2) is None
    stay.advance(1)
    assert stay.tickets(0) == [second]
    stay.advance(2)
    assert stay.tickets(0) == []
