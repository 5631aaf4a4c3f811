"""The life of an adapter: two tables of moves, nine rules, queues and budgets. Pure.

`Lifecycle` takes one outcome or one change of interest and returns commands, in the order in which
they must be carried out. It never waits, reads a clock or touches a device. `transitions` has the
tables, `rules` the rules 1 to 6, `queues` the rules 7 to 9; docs/lifecycle.md explains them.
"""
