"""What a trace calls adapters: enough to know them, and nothing that is nobody's business."""

from __future__ import annotations

import re

from lorax_async.adapter import AdapterKey, AdapterRef, Merge, MergedKey, Ref, TensorsKey

LONGEST = 64
_REVISED = re.compile(r"(\w[\w.-]*/\w[\w.-]*)@.+")
_UNSAFE = re.compile(r"[^\w.@:+ -]")


def name_of(ref: Ref) -> str:
    """The last part of an id or a location: no folder above it, no host, no query, no token.

    A hub's adapter has no revision, as its key has none: it is of one name in all rows.
    """
    if isinstance(ref, Merge | MergedKey):
        return "merge"
    if isinstance(ref, TensorsKey):
        return f"tensors {ref.digest[:8]}"
    if isinstance(ref, AdapterRef) and isinstance(ref.id, str) and ref.source in {None, "hub"}:
        revised = _REVISED.fullmatch(ref.id)
        if revised is not None:
            return last_part(revised[1])
    return last_part(ref.location if isinstance(ref, AdapterKey) else ref.text)


def last_part(text: str) -> str:
    """Of a path, a URL or an id."""
    plain = re.split("[?#]", text, maxsplit=1)[0]
    _, elsewhere, rest = plain.partition("://")
    if elsewhere:
        plain = rest.partition("/")[2]  # what comes before it is a host, or a bucket
    return _plain(plain.rstrip("/").rpartition("/")[2].rpartition("\\")[2])


def _plain(name: str) -> str:
    return _UNSAFE.sub("_", name)[:LONGEST] or "adapter"
