"""What a trace calls adapters: enough to know them, and nothing that is nobody's business."""

from __future__ import annotations

import re

from lorax_async.adapter import AdapterKey, Merge, MergedKey, Ref, TensorsKey

LONGEST = 64
_UNSAFE = re.compile(r"[^\w.@:+ -]")


def name_of(ref: Ref) -> str:
    """The last part of an id or a location: no folder above it, no host, no query, no token."""
    if isinstance(ref, Merge | MergedKey):
        return "merge"
    if isinstance(ref, TensorsKey):
        return f"tensors {ref.digest[:8]}"
    return last_part(ref.location if isinstance(ref, AdapterKey) else ref.text)


def last_part(text: str) -> str:
    """Of a path, a URL or an id."""
    plain = re.split("[?#]", text, maxsplit=1)[0].rstrip("/")
    part = plain.rpartition("/")[2].rpartition("\\")[2]
    return _UNSAFE.sub("_", part)[:LONGEST] or "adapter"
