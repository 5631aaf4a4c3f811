"""Digests of files: computed while bytes arrive, and as servers send them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lorax_async.errors import UsageError

DigestKind = Literal["sha256", "git-sha1", "transport"]
"""The source's sha256, its git blob sha1, or `transport`: our own sha256, promised by nobody."""

_SHAPES = {"sha256": "[0-9a-f]{64}", "git-sha1": "[0-9a-f]{40}", "transport": "[0-9a-f]{64}"}


# RFC 8941's dictionaries of bare items (an inner list is no digest).
_KEY = r"[a-z*][a-z0-9_.*-]*"
_ITEM = (
    r"(?::[A-Za-z0-9+/=]*:"
    r'|"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*"'
    r"|[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*"
    r"|-?[0-9]{1,15}(?:\.[0-9]{1,3})?"
    r"|\?[01])"
)
_MEMBER = re.compile(
    rf"(?P<key>{_KEY})(?:=(?P<item>{_ITEM}))?(?:; *{_KEY}(?:={_ITEM})?)*(?P<next>[ \t]*,[ \t]*|\Z)"
)


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest, in lower-case hexadecimal digits. Raises `UsageError` for anything else."""

    kind: DigestKind
    value: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(DigestKind):
            raise UsageError(f"a digest is one of {', '.join(_SHAPES)}, not {self.kind!r}")
        if not isinstance(self.value, str) or not re.fullmatch(_SHAPES[self.kind], self.value):
            raise UsageError(
                f"{self.value!r} is no {self.kind} digest in lower-case hexadecimal digits"
            )


class FileHash:
    """The digest of a file of `nbytes`, as far as it was fed."""

    __slots__ = ("_hash", "_kind", "done")

    def __init__(self, kind: DigestKind, nbytes: int) -> None:
        self._kind: DigestKind = kind
        self._hash = hashlib.sha1(usedforsecurity=False) if kind == "git-sha1" else hashlib.sha256()
        if kind == "git-sha1":
            # git's name of a blob: its own header comes first.
            self._hash.update(b"blob %d\0" % nbytes)
        self.done = 0

    def feed(self, content: memoryview) -> None:
        """Hash the bytes that follow those fed so far."""
        self._hash.update(content)
        self.done += content.nbytes

    def digest(self) -> Digest:
        return Digest(self._kind, self._hash.hexdigest())


def sent_sha256(fields: Mapping[str, str]) -> Digest | None:
    """Return the whole file's sha256 as these response fields (names in lower case) have it.

    Read `Repr-Digest` (RFC 9530), or else an S3 object's checksum. Ignore malformed fields.
    """
    text = _members(fields.get("repr-digest", "")).get("sha-256", "")
    if len(text) > 1 and text[0] == text[-1] == ":":
        told = _sha256(text[1:-1])
        if told is not None:
            return told
    return _sha256(fields.get("x-amz-checksum-sha256", "")) if _of_the_object(fields) else None


def _members(text: str) -> dict[str, str]:
    """Parse a dictionary, the last of equal keys; return nothing if any of it is malformed."""
    members: dict[str, str] = {}
    at, more = 0, bool(text)
    while more:
        found = _MEMBER.match(text, at)
        if found is None:
            return {}
        members[found["key"]] = found["item"] or ""
        at, more = found.end(), found["next"] != ""
    return members


def _of_the_object(fields: Mapping[str, str]) -> bool:
    # A multipart upload's checksum is one of checksums ("…-3"). For a range, a store may send that
    # of one part: then only the checksum's type tells.
    kind = fields.get("x-amz-checksum-type")
    if kind is None:
        return "content-range" not in fields
    return kind == "FULL_OBJECT"


def _sha256(text: str) -> Digest | None:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(raw) != 32 or base64.b64encode(raw).decode() != text:
        return None
    return Digest("sha256", raw.hex())
