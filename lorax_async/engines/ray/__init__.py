"""Adapters on replicas of Ray Serve: requests go where their adapter is.

- `router`: `AdapterRouter`, for a deployment's `request_router_config`;
- `routing`: its policy, without Ray;
- `replicas`: what a replica publishes;
- `ray_llm`: the adapters of Ray LLM from an `AdapterStore`.

`server.ray_serve` serves our own server. `router` imports Ray, the others do when it is used.
docs/fleet.md is for users.
"""
