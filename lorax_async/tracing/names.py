"""What a trace calls an adapter: enough to recognise it, and no path, host or token."""

from __future__ import annotations

import re

from lorax_async.adapter import AdapterKey, AdapterRef, Merge, MergedKey, Ref, TensorsKey

LONGEST = 64
_REVISED = re.compile(r"(\w[\w.-]*/\w[\w.-]*)@.+")
_UNSAFE = re.compile(r"[^\w.@:+ -]")


def name_of(ref: Ref) -> str:
    """Return the last part of an id or a location, without folders, host, query and token.

    A hub id loses its revision, as its key does, so that an adapter has one name in all rows.
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
    """Return the last part of a path, a URL or an id."""
    plain = re.split("[?#]", text, maxsplit=1)[0]
    _, elsewhere, rest = plain.partition("://")
    if elsewhere:
        plain = rest.partition("/")[2]  # drops the host or bucket
    return _plain(plain.rstrip("/").rpartition("/")[2].rpartition("\\")[2])


def _plain(name: str) -> str:
    return _UNSAFE.sub("_", name)[:LONGEST] or "adapter"
