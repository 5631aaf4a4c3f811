"""Decide what happens to each adapter: two tables of moves, nine rules, queues and budgets.

`Lifecycle` takes one outcome or one change of interest and returns commands, in the order in which
the driver must execute them. docs/lifecycle.md explains the rules.

- `adapter_state`: the tables of a file's and a slot's states, the state of one adapter, its waiters
- `lifecycle`: the public methods, one per outcome or change of interest
- `rules`: rules 1 to 7, which look at one adapter, and 8 and 9 with their queues
- `residency`: the budgets of device memory, file pages and pinned images
- `policies`: eviction by LRU, LFU or GDSF
- `arena`: allocation of extents
- `commands`: what the driver is asked to do

The package is pure: it never waits, reads a clock or touches a device. It may know `types`,
`events`, `errors` and `config`.
"""
