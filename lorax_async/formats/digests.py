"""Digests of files, computed while bytes arrive or sent by a server."""

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
"""The source's SHA-256, its git blob SHA-1, or `transport`: a SHA-256 that no source confirms."""

_SHAPES = {"sha256": "[0-9a-f]{64}", "git-sha1": "[0-9a-f]{40}", "transport": "[0-9a-f]{64}"}


# RFC 8941 dictionaries of bare items (an inner list is not a digest).
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
    """A digest in lower-case hexadecimal digits. Raises `UsageError` for any other form."""

    kind: DigestKind
    value: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(DigestKind):
            raise UsageError(f"a digest is one of {', '.join(_SHAPES)}, not {self.kind!r}")
        if not isinstance(self.value, str) or not re.fullmatch(_SHAPES[self.kind], self.value):
            raise UsageError(
                f"{self.value!r} is not a {self.kind} digest in lower-case hexadecimal digits"
            )


class FileHash:
    """An incremental hash of a file of `nbytes`."""

    __slots__ = ("_hash", "_kind", "done")

    def __init__(self, kind: DigestKind, nbytes: int) -> None:
        self._kind: DigestKind = kind
        self._hash = hashlib.sha1(usedforsecurity=False) if kind == "git-sha1" else hashlib.sha256()
        if kind == "git-sha1":
            # git hashes a header before the content of a blob.
            self._hash.update(b"blob %d\0" % nbytes)
        self.done = 0

    def feed(self, content: memoryview) -> None:
        """Hash the next bytes."""
        self._hash.update(content)
        self.done += content.nbytes

    def digest(self) -> Digest:
        return Digest(self._kind, self._hash.hexdigest())


def sent_sha256(fields: Mapping[str, str]) -> Digest | None:
    """Return the SHA-256 of the whole file from response fields (names in lower case), or None.

    Read `Repr-Digest` (RFC 9530), or else an S3 object's checksum. Ignore malformed fields.
    """
    text = _parse_members(fields.get("repr-digest", "")).get("sha-256", "")
    if len(text) > 1 and text[0] == text[-1] == ":":
        digest = _decode_sha256(text[1:-1])
        if digest is not None:
            return digest
    # The checksum of a multipart upload is a checksum of checksums ("…-3"). For a range, a store
    # may send the checksum of one part; only its type tells.
    kind = fields.get("x-amz-checksum-type")
    whole = "content-range" not in fields if kind is None else kind == "FULL_OBJECT"
    return _decode_sha256(fields.get("x-amz-checksum-sha256", "")) if whole else None


def _parse_members(text: str) -> dict[str, str]:
    """Parse a dictionary; the last of equal keys wins. Return {} if any part is malformed."""
    members: dict[str, str] = {}
    at, more = 0, bool(text)
    while more:
        match = _MEMBER.match(text, at)
        if match is None:
            return {}
        members[match["key"]] = match["item"] or ""
        at, more = match.end(), match["next"] != ""
    return members


def _decode_sha256(text: str) -> Digest | None:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(raw) != 32 or base64.b64encode(raw).decode() != text:
        return None
    return Digest("sha256", raw.hex())
