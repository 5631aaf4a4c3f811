"""Which places an id means that names a local folder; touches no file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorax_async.adapter import AdapterRef
from lorax_async.errors import InvalidAdapterIdError
from lorax_async.ids.parsing import parsed


class Place(NamedTuple):
    """Where to look, in this order. `trusted` paths may be anywhere and lead anywhere."""

    paths: tuple[str, ...]
    trusted: bool


def parse_place(ref: AdapterRef, roots: Sequence[str]) -> Place:
    """The places that `ref` means; a relative `str` is looked for in each of the roots.

    Raises `InvalidAdapterIdError` for a text that is no id, or names no local folder.
    """
    found = parsed(ref)
    if found.source != "local":
        raise InvalidAdapterIdError(
            "only local folders are asked for here: a pathlib.Path, or a path inside"
            " LoaderConfig.local_roots, which begins with './', '../' or '/'"
        )
    if isinstance(found.id, Path):
        return Place((os.fspath(found.id),), trusted=True)
    if found.id.startswith("/"):
        return Place((found.id,), trusted=False)
    return Place(tuple(os.path.join(root, found.id) for root in roots), trusted=False)
