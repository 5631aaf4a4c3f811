"""A trace for people who may not know of every adapter."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from lorax_async.tracing.recorder import Record

ANOTHER = "another adapter"


def hide_others(records: Iterable[Record], shown: Container[str]) -> Iterator[Record]:
    """Records in which adapters whose names are not `shown` have none."""
    for record in records:
        yield _without_name(record, shown)


def _without_name(record: Record, shown: Container[str]) -> Record:
    if record.row == "files":
        return record if record.lane in shown else record._replace(lane=ANOTHER)
    args = record.args or {}
    adapter = args.get("adapter")
    if not isinstance(adapter, str) or adapter in shown:
        return record
    said = record.name.removesuffix(adapter)  # "load pirate"
    name = record.name if said == record.name else said + ANOTHER
    return record._replace(name=name, args={**args, "adapter": ANOTHER})
