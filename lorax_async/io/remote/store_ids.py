"""Which folder of which bucket an id means, and what its version is called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from lorax_async.adapter import AdapterRef
from lorax_async.errors import InvalidAdapterIdError, UsageError
from lorax_async.ids.parsing import parsed
from lorax_async.ids.stores import STORES, parse_store

Scheme = Literal["s3", "gs", "az"]

_VERSION = re.compile(r"(?:versions|etags)-[0-9a-f]{32}(?:-[0-9a-f]{32})?")


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of a bucket (az: of a container); `prefix` is empty, or ends with a slash."""

    scheme: Scheme
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


def folder_of(ref: AdapterRef) -> Folder:
    """Raises `InvalidAdapterIdError` for what names none, `UsageError` for one with a token."""
    found = parsed(ref)
    if found.source not in STORES:
        raise InvalidAdapterIdError(f"it is in no object store, but in {found.source}")
    if ref.token is not None:
        raise UsageError(
            "object stores are asked with the credentials of the environment; leave token out"
        )
    place = parse_store(found.source, found.text.partition("://")[2])
    return Folder(cast("Scheme", place.scheme), place.bucket, place.prefix)


def is_version(text: str) -> bool:
    """Whether it is one that `version_of` made, and so says by itself which bytes it is."""
    return _VERSION.fullmatch(text) is not None


def version_of(kind: Literal["versions", "etags"], words: Iterable[str]) -> str:
    """The version of an adapter, of what tells its files apart: the same words, the same bytes."""
    return f"{kind}-{digest_of(words)}"


def digest_of(words: Iterable[str]) -> str:
    """Of the words in this order: 32 hexadecimal digits."""
    found = hashlib.sha256()
    for word in words:
        data = word.encode("utf-8", "surrogatepass")
        # Lengths first: no two lists of words are one string of bytes.
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:32]
