"""What all requests of one server share."""

from __future__ import annotations

from lorax_async.errors import CapacityError
from lorax_async.loader import AdapterLoader
from lorax_async.server.calls.clients import Clients
from lorax_async.server.calls.metrics import ServerMetrics
from lorax_async.server.calls.names import Names
from lorax_async.server.calls.page.dashboard import ColdTrace, Dashboard, DashboardFeeds
from lorax_async.server.calls.prompts import ChatTokenizer, Prompts
from lorax_async.server.calls.under_way import UnderWay
from lorax_async.server.cold_requests import ColdRequests
from lorax_async.server.generation import Generating
from lorax_async.server.settings import ServerSettings


class Service:
    """A model that answers, behind the names and the limits of its operator.

    Parameters
    ----------
    settings
        What the operator decided.
    engine
        Computes; with adapters of `loader`.
    loader
        Open. The service is made on its event loop, and closes neither of the two.
    tokenizer
        The base's, a fast one of transformers.
    stop_tokens
        Token ids with which the model ends an answer.
    """

    def __init__(
        self,
        settings: ServerSettings,
        engine: Generating,
        loader: AdapterLoader,
        tokenizer: ChatTokenizer,
        stop_tokens: frozenset[int],
    ) -> None:
        self.settings = settings
        self.names = Names(settings.base, settings.adapters, settings.sources)
        cold = ColdRequests(engine, loader, self.names)
        self.engine: Generating = cold
        self.loader = loader
        self.prompts = Prompts(tokenizer)
        self.stop_tokens = stop_tokens
        self.clients = Clients(settings.max_adapters_per_client)
        self.under_way = UnderWay()
        self.metrics = ServerMetrics(loader, self.names)
        self.feeds = DashboardFeeds(Dashboard(loader, self.names, cold))
        self.cold_trace = ColdTrace(cold, self.names)

    @property
    def max_prompt_tokens(self) -> int:
        """Of one prompt, so that there is room for one new token."""
        room = self.engine.max_length - 1
        most = self.settings.max_prompt_tokens
        return room if most is None else min(most, room)

    @property
    def healthy(self) -> bool:
        """Whether new requests are taken and computed."""
        return self.engine.alive and not self.under_way.closing

    def require_room(self, sequences: int) -> None:
        """Raise `CapacityError` if so many more are not let into the queue."""
        if self.engine.waiting + sequences > self.settings.max_waiting:
            raise CapacityError(
                f"{self.engine.waiting} sequences wait already, and {self.settings.max_waiting}"
                " may; ask again later"
            )
