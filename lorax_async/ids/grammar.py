"""The grammar of ids: names on the hub, folders behind URLs, prefixes in buckets."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from lorax_async.errors import InvalidAdapterIdError

DEFAULT_PORTS = {"http": 80, "https": 443}

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[^\]/]*\]|[^:/\[\]]*)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/.*)?",
    re.IGNORECASE | re.ASCII,
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PATH = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,=:@/-]|%[0-9A-Fa-f]{2})*")
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_LONGEST = 2_048
_LONGEST_HOST = 253

# A server that unwraps twice, or cuts at ';', reads these as another path.
_TWO_FACED = frozenset("/\\%;")


class FolderUrl(NamedTuple):
    """A folder behind a URL, in its one spelling.

    `host` has no brackets, `port` is None where it is the scheme's own, and `path` begins and ends
    with "/".
    """

    scheme: str
    host: str
    port: int | None
    path: str

    @property
    def text(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def parse_folder_url(text: str) -> FolderUrl:
    """Raises `InvalidAdapterIdError`."""
    found = _URL.fullmatch(text)
    if found is None or len(text) > _LONGEST:
        raise InvalidAdapterIdError(
            "a URL is http(s)://host[:port]/folder/, of at most"
            f" {_LONGEST:,} characters, without user name, query and fragment"
        )
    scheme = found["scheme"].lower()
    port = checked_port(scheme, int(found["port"] or DEFAULT_PORTS[scheme]))
    return FolderUrl(scheme, checked_host(found["host"]), port, folder_path(found["path"] or "/"))


def checked_port(scheme: str, port: int) -> int | None:
    """None for the scheme's own. Raises `InvalidAdapterIdError`."""
    if not 0 < port < 65_536:
        raise InvalidAdapterIdError("a port is from 1 to 65535")
    return None if port == DEFAULT_PORTS[scheme] else port


def checked_host(text: str) -> str:
    """A name, or an address in its usual spelling, without brackets.

    Raises `InvalidAdapterIdError`, also for numbers that only some programs read as addresses.
    """
    if text.startswith("[") and text.endswith("]"):
        return _checked_ipv6(text[1:-1])
    host = text.lower()
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _checked_ipv4(host)
    if (
        not text.isascii()
        or len(host) > _LONGEST_HOST
        or not all(_LABEL.fullmatch(label) for label in labels)
    ):
        raise InvalidAdapterIdError(
            "the URL's host is a name of letters, digits, '-' and '_' between dots (others in their"
            " xn-- form), an IPv4 address, or an IPv6 address in brackets"
        )
    return host


def _checked_ipv4(host: str) -> str:
    try:
        return str(IPv4Address(host))
    except ValueError:
        raise InvalidAdapterIdError(
            "an IPv4 address is written as four decimal numbers from 0 to 255"
        ) from None


def _checked_ipv6(host: str) -> str:
    try:
        address = IPv6Address(host)
    except ValueError:
        address = None
    if address is None or "%" in host:
        raise InvalidAdapterIdError("what is in brackets is no IPv6 address (without a zone)")
    if address.ipv4_mapped is not None:
        raise InvalidAdapterIdError("an IPv4 address is written as such, not within an IPv6 one")
    return str(address)


def folder_path(path: str) -> str:
    """With a "/" at both ends, encoded no more than needed. Raises `InvalidAdapterIdError`."""
    if not _PATH.fullmatch(path):
        raise InvalidAdapterIdError(
            "the path of a URL is in ASCII, with all but letters, digits and -._~!$&'()*+,=:@"
            " percent-encoded"
        )
    inner = path[1:].removesuffix("/")
    if inner or len(path) > 1:
        for part in inner.split("/"):
            _check_part(part)
    return _ENCODED.sub(_encoded, f"/{inner}/" if inner else "/")


def _check_part(part: str) -> None:
    try:
        plain = unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise InvalidAdapterIdError("the path of a URL does not decode to UTF-8") from None
    if plain in {"", ".", ".."}:
        raise InvalidAdapterIdError("the path of a URL has no part that is '', '.' or '..'")
    if not plain.isprintable() or _TWO_FACED & set(plain):
        raise InvalidAdapterIdError(
            "the path of a URL has none of / \\ % ; in a part of it, and nothing that cannot be"
            " printed, encoded or not"
        )


def _encoded(found: re.Match[str]) -> str:
    character = chr(int(found[1], 16))
    return character if _UNRESERVED.fullmatch(character) else found[0].upper()


_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_OTHER_KINDS = frozenset({"datasets", "spaces", "kernels", "models", "api"})
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
_REVISION = re.compile(rf"{_WORD}(?:/{_WORD})*")
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]{0,8}")
_LIKE_PULL_REQUEST = re.compile(r"(?:refs/)?pr/", re.IGNORECASE)
_LONGEST_REVISION = 200


class HubId(NamedTuple):
    """A model repository, `org/name`, and what of it was asked for."""

    repo: str
    revision: str | None


def parse_hub_id(text: str) -> HubId:
    """Of `org/name` or `org/name@revision`. Raises `InvalidAdapterIdError`."""
    repo, at, revision = text.partition("@")
    org, slash, name = repo.partition("/")
    if not slash:
        raise InvalidAdapterIdError(
            "it is neither org/name[@revision], which is an adapter on the hub, nor a URL, nor a"
            " path; a local folder is written ./name"
        )
    if not (is_hub_name(org) and is_hub_name(name)) or name.endswith(".git"):
        raise InvalidAdapterIdError(
            "on the hub it is org/name[@revision], each name of 1 to 96 letters, digits, '_', '-'"
            " and '.', with no '-' or '.' at its ends, no '--', no '..', and no '.git' at the end;"
            " a local folder begins with './', '../' or '/', all else is a URL"
        )
    if org in _OTHER_KINDS:
        raise InvalidAdapterIdError(
            f"'{org}/…' is no model repository of the hub; write the organisation and the name"
        )
    return HubId(repo, checked_revision(revision) if at else None)


def is_hub_name(text: str) -> bool:
    """As `huggingface_hub.utils.validate_repo_id` has it, for one of the two."""
    return _NAME.fullmatch(text) is not None and "--" not in text and ".." not in text


def checked_revision(text: str) -> str:
    """A branch, a tag, a commit or `refs/pr/N`. Raises `InvalidAdapterIdError`."""
    words = text.split("/")
    plain = (
        len(text) <= _LONGEST_REVISION
        and _REVISION.fullmatch(text) is not None
        and ".." not in text
        and not any(word.endswith((".", ".lock")) for word in words)
    )
    if not plain or (words[0].lower() == "refs" and not _PULL_REQUEST.fullmatch(text)):
        raise InvalidAdapterIdError(
            "a revision on the hub is a branch or a tag of letters, digits, '_', '-', '.', '+' and"
            " '/', a commit, or refs/pr/N; where a name has other characters, give the commit"
        )
    return text


def names_pull_request(revision: str | None) -> bool:
    """Whether it may lead to what anybody has proposed; git also finds `refs/pr/1` as `pr/1`."""
    return revision is not None and _LIKE_PULL_REQUEST.match(revision) is not None


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
