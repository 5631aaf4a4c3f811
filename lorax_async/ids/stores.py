"""Buckets and prefixes: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.

Of the providers' rules for names those are kept that tell what can be one; reserved words are
theirs to judge. A key is written as it is, without percent-encoding.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from typing import NamedTuple

from lorax_async.errors import InvalidAdapterIdError

STORES = ("s3", "gs", "az")

_S3 = re.compile(r"(?!xn--)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_GS = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_AZ = re.compile(r"(?=.{3,63}\Z)[a-z0-9]+(?:-[a-z0-9]+)*")
_GS_LABEL = 63
_RULES = {
    "s3": "3 to 63 of a-z, 0-9, '-' and '.', a letter or digit at both ends, no '..', no address",
    "gs": "3 to 63 of a-z, 0-9, '-', '_' and '.', a letter or digit at both ends, no '..', no"
    " address (with dots 222, of 63 between them)",
    "az": "3 to 63 of a-z, 0-9 and '-', a letter or digit at both ends, no '--'",
}

_LONGEST_PREFIX = 900
"""In bytes: a key has 1,024 at most, and a file's name follows."""

_AVOIDED = frozenset('\\{}^%`[]"<>#|?')


class StorePlace(NamedTuple):
    """A folder in a bucket (Azure: a container).

    `scheme` is one of `STORES`, `prefix` is "" or ends with "/".
    """

    scheme: str
    bucket: str
    prefix: str

    @property
    def text(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


def parse_store(scheme: str, rest: str) -> StorePlace:
    """Of what follows `scheme://`. Raises `InvalidAdapterIdError`."""
    bucket, _, key = rest.partition("/")
    return StorePlace(scheme, checked_bucket(scheme, bucket), checked_prefix(key))


def checked_bucket(scheme: str, name: str) -> str:
    """Raises `InvalidAdapterIdError` for what cannot be a bucket's name."""
    rule = {"s3": _S3, "gs": _GS, "az": _AZ}[scheme]
    labels = name.split(".")
    lengths = scheme != "gs" or max(map(len, labels)) <= _GS_LABEL
    if not rule.fullmatch(name) or not all(labels) or not lengths or _is_address(name):
        word = "container" if scheme == "az" else "bucket"
        raise InvalidAdapterIdError(
            f"it is {scheme}://{word}/folder, where the {word}'s name has {_RULES[scheme]}"
        )
    return name


def checked_prefix(key: str) -> str:
    """With a "/" at its end, unless it is "". Raises `InvalidAdapterIdError`."""
    path = key.removesuffix("/")
    if not path:
        return _root(key)
    parts = path.split("/")
    if not all(parts) or "." in parts or ".." in parts:
        raise InvalidAdapterIdError("the folder in the bucket has no part that is '', '.' or '..'")
    if not path.isprintable() or _AVOIDED & set(path):
        raise InvalidAdapterIdError(
            "the folder in the bucket is written as its keys are, without any encoding, and none of"
            f" {' '.join(sorted(_AVOIDED))} or what cannot be printed"
        )
    if len(path.encode()) > _LONGEST_PREFIX:
        raise InvalidAdapterIdError(f"the folder has more than {_LONGEST_PREFIX} bytes")
    return f"{path}/"


def _root(key: str) -> str:
    if key:
        raise InvalidAdapterIdError("the folder in the bucket has no part that is '', '.' or '..'")
    return ""


def _is_address(name: str) -> bool:
    try:
        IPv4Address(name)
    except ValueError:
        return False
    return True
