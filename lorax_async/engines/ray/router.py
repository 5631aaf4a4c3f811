"""`AdapterRouter`: Ray Serve's request router on the policy of `routing`."""

from __future__ import annotations

import asyncio
from random import sample
from typing import Any
from weakref import WeakKeyDictionary

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lorax_async.engines.ray.routing import STATS, ReplicaResidency, RoutingPolicy

CHOICES = 3
"""Replicas of one request, in order: Ray asks the next if one is full or does not answer."""


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Ray is not installed everywhere
    """Send a request to a replica that has its adapter, as `RoutingPolicy` chooses.

    A request names its adapter as its multiplexed model id: `handle.options(multiplexed_model_id=
    "org/sql")`, or the HTTP header `serve_multiplexed_model_id`. Without one, it goes to the
    shorter of two queues. Replicas publish their adapters by `record_routing_stats`
    (`replicas.PublishedAdapters`); of others, the router knows what it sent them.

        @serve.deployment(request_router_config=RequestRouterConfig(
            request_router_class="lorax_async.engines.ray.router:AdapterRouter"))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy = RoutingPolicy(self._queue_of)
        self._ids: dict[str, ReplicaID] = {}
        self._stats: dict[str, Any] = {}
        # A request's first choice is counted at once: the next may come before it was sent.
        self._counted: WeakKeyDictionary[asyncio.Future[Any], str] = WeakKeyDictionary()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the fleet, and what its replicas published."""
        super().update_replicas(replicas)
        self._set_fleet([replica.replica_id for replica in replicas])
        for replica in replicas:
            name, stats = replica.replica_id.unique_id, replica.routing_stats.get(STATS)
            if stats is not None and stats != self._stats.get(name):
                self._stats[name] = stats
                self._policy.publish(name, ReplicaResidency(**stats))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Take the replica out of the fleet before the controller does."""
        super().on_replica_actor_died(replica_id)
        self._set_fleet([other for other in self._ids.values() if other != replica_id])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return a group for each choice, the best first."""
        adapter = pending_request and pending_request.metadata.multiplexed_model_id
        if not pending_request or not adapter:
            return [sample(candidate_replicas, min(2, len(candidate_replicas)))]
        pending_request.routing_context.should_backoff = True
        chosen = self._policy.choose(adapter, CHOICES)
        if chosen and pending_request.future not in self._counted:
            self._counted[pending_request.future] = chosen[0]
            self._policy.sent(adapter, chosen[0])
        found = (self.curr_replicas.get(self._ids[name]) for name in chosen)
        return [[replica] for replica in found if replica is not None]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Count a request where it went, if that was not the first choice."""
        super().on_request_routed(pending_request, replica_id, result)
        adapter, replica = pending_request.metadata.multiplexed_model_id, replica_id.unique_id
        counted = self._counted.pop(pending_request.future, None)
        if counted != replica:
            if counted is not None:
                self._policy.take_back(adapter, counted)
            self._policy.sent(adapter, replica)

    def _set_fleet(self, ids: list[ReplicaID]) -> None:
        fleet = {replica_id.unique_id: replica_id for replica_id in ids}
        if fleet.keys() != self._ids.keys():
            self._policy.set_replicas(fleet)
            self._stats = {name: self._stats[name] for name in fleet if name in self._stats}
        self._ids = fleet

    def _queue_of(self, name: str) -> int | None:
        queue: int | None = self.replica_queue_len_cache.get(self._ids[name])
        return queue
