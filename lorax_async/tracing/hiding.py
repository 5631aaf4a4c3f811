"""A trace for people who may not know of every adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lorax_async.tracing.recorder import Record

ANOTHER = "another adapter"


def hide_others(records: Iterable[Record], called: Mapping[str, str]) -> Iterator[Record]:
    """Records in which adapters have the names of `called`, and those not in it have none."""
    for record in records:
        yield _renamed(record, called)


def _renamed(record: Record, called: Mapping[str, str]) -> Record:
    if record.row == "files":
        return record._replace(lane=called.get(str(record.lane), ANOTHER))
    args = record.args or {}
    adapter = args.get("adapter")
    if not isinstance(adapter, str):
        return record
    given = called.get(adapter, ANOTHER)
    said = record.name.removesuffix(adapter)  # "load pirate"
    name = record.name if said == record.name else said + given
    return record._replace(name=name, args={**args, "adapter": given})
