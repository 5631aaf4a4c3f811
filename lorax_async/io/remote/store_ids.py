"""Which folder of which bucket an id means, and what its version is called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lorax_async.adapter import AdapterRef
from lorax_async.errors import InvalidAdapterIdError, UsageError

Scheme = Literal["s3", "gs", "az"]

_ID = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[^/]*)(?:/(?P<prefix>.*))?", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9](?:[._-]?[A-Za-z0-9]){2,221}")
_VERSION = re.compile(r"(?:versions|etags)-[0-9a-f]{32}(?:-[0-9a-f]{32})?")
_MOST_BYTES = 900
"""Of a prefix; keys have 1,024 at most, and the file's name comes behind."""


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
    text = ref.text if "://" in ref.text else f"{ref.source}://{ref.text}"
    found = _ID.fullmatch(text)
    if found is None or found["scheme"] not in get_args(Scheme):
        raise InvalidAdapterIdError("it is not s3://, gs:// or az:// with a bucket and a prefix")
    if not _BUCKET.fullmatch(found["bucket"]):
        raise InvalidAdapterIdError(
            "a bucket's name has 3 to 222 letters and digits, with dots, - and _ between them"
        )
    if ref.token is not None:
        raise UsageError(
            "object stores are asked with the credentials of the environment; leave token out"
        )
    scheme = cast("Scheme", found["scheme"])
    return Folder(scheme, found["bucket"], _prefix(found["prefix"] or ""))


def _prefix(text: str) -> str:
    path = text.removesuffix("/")
    if not path:
        if text:
            raise InvalidAdapterIdError("there is an empty name in the prefix")
        return ""
    if not path.isprintable() or len(path.encode()) > _MOST_BYTES:
        raise InvalidAdapterIdError(
            f"a prefix is {_MOST_BYTES} bytes of printable text at most, in UTF-8"
        )
    if not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise InvalidAdapterIdError("there is an empty name, or one of dots alone, in the prefix")
    return f"{path}/"


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
