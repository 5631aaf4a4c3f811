"""The sha256 of a whole file, where the fields of a response tell it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

from lorax_async.core.file_digest import Digest

# RFC 8941's dictionaries, of members that are bare items (a list within is nobody's digest).
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


def sent_sha256(fields: Mapping[str, str]) -> Digest | None:
    """What the file comes to by the word of whoever sent these fields (names in lower case).

    `Repr-Digest` (RFC 9530), or else the checksum of an S3 object. What is malformed tells nothing.
    """
    text = _members(fields.get("repr-digest", "")).get("sha-256", "")
    if len(text) > 1 and text[0] == text[-1] == ":":
        told = _sha256(text[1:-1])
        if told is not None:
            return told
    return _sha256(fields.get("x-amz-checksum-sha256", "")) if _of_the_object(fields) else None


def _members(text: str) -> dict[str, str]:
    """Of a dictionary, the last of equal keys; nothing of what is malformed anywhere."""
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
    # The checksum of an upload in parts is one of checksums ("…-3"). A store may tell that of one
    # part, when this is the range that is asked for: then its type is the only word on it.
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
