"""The grammar of ids: hub names, URLs of folders, prefixes in buckets.

All functions raise `InvalidAdapterIdError` for text that does not match.
"""

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
_MAX_URL = 2_048
_MAX_HOST = 253

# A server that decodes twice, or cuts at ';', reads these as another path.
_AMBIGUOUS = frozenset("/\\%;")


class FolderUrl(NamedTuple):
    """The URL of a folder, in canonical spelling.

    `host` has no brackets, `port` is None for the scheme's default, and `path` begins and ends with
    "/".
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
    """Parse an http or https URL of a folder."""
    match = _URL.fullmatch(text)
    if match is None or len(text) > _MAX_URL:
        raise InvalidAdapterIdError(
            "a URL is http(s)://host[:port]/folder/, of at most"
            f" {_MAX_URL:,} characters, without user name, query and fragment"
        )
    scheme = match["scheme"].lower()
    port = checked_port(scheme, int(match["port"] or DEFAULT_PORTS[scheme]))
    return FolderUrl(scheme, checked_host(match["host"]), port, folder_path(match["path"] or "/"))


def checked_port(scheme: str, port: int) -> int | None:
    """Return `port`, or None for the scheme's default."""
    if not 0 < port < 65_536:
        raise InvalidAdapterIdError("a port is from 1 to 65535")
    return None if port == DEFAULT_PORTS[scheme] else port


def checked_host(text: str) -> str:
    """Normalize a host name, or an address without brackets.

    Numbers that only some programs read as addresses are refused.
    """
    if text.startswith("[") and text.endswith("]"):
        return _checked_ipv6(text[1:-1])
    host = text.lower()
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _checked_ipv4(host)
    if (
        not text.isascii()
        or len(host) > _MAX_HOST
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
        raise InvalidAdapterIdError("the host in brackets is no IPv6 address (without a zone)")
    if address.ipv4_mapped is not None:
        raise InvalidAdapterIdError(
            "an IPv4 address is written as such, not within an IPv6 address"
        )
    return str(address)


def folder_path(path: str) -> str:
    """Normalize a path: "/" at both ends, and only necessary percent-encoding."""
    if not _PATH.fullmatch(path):
        raise InvalidAdapterIdError(
            "the path of a URL is in ASCII, with all but letters, digits and -._~!$&'()*+,=:@"
            " percent-encoded"
        )
    inner = path[1:].removesuffix("/")
    if inner or len(path) > 1:
        for part in inner.split("/"):
            _check_part(part)
    return _ENCODED.sub(_normalize_escape, f"/{inner}/" if inner else "/")


def _check_part(part: str) -> None:
    try:
        plain = unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise InvalidAdapterIdError("the path of a URL does not decode to UTF-8") from None
    if plain in {"", ".", ".."}:
        raise InvalidAdapterIdError("the path of a URL has no part that is '', '.' or '..'")
    if not plain.isprintable() or _AMBIGUOUS & set(plain):
        raise InvalidAdapterIdError(
            "a part of a URL's path contains no / \\ % ; and no unprintable character, encoded or"
            " not"
        )


def _normalize_escape(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if _UNRESERVED.fullmatch(character) else escape[0].upper()


_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_OTHER_KINDS = frozenset({"datasets", "spaces", "kernels", "models", "api"})
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
_REVISION = re.compile(rf"{_WORD}(?:/{_WORD})*")
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]{0,8}")
_LIKE_PULL_REQUEST = re.compile(r"(?:refs/)?pr/", re.IGNORECASE)
_MAX_REVISION = 200


class HubId(NamedTuple):
    """A model repository, `org/name`, and its revision."""

    repo: str
    revision: str | None


def parse_hub_id(text: str) -> HubId:
    """Parse `org/name` or `org/name@revision`."""
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
    """Return whether a name is valid by `huggingface_hub.utils.validate_repo_id`."""
    return _NAME.fullmatch(text) is not None and "--" not in text and ".." not in text


def checked_revision(text: str) -> str:
    """Check a branch, tag, commit or `refs/pr/N`, and return it."""
    words = text.split("/")
    plain = (
        len(text) <= _MAX_REVISION
        and _REVISION.fullmatch(text) is not None
        and ".." not in text
        and not any(word.endswith((".", ".lock")) for word in words)
    )
    if not plain or (words[0].lower() == "refs" and not _PULL_REQUEST.fullmatch(text)):
        raise InvalidAdapterIdError(
            "a revision on the hub is a branch or a tag of letters, digits, '_', '-', '.', '+' and"
            " '/', a commit, or refs/pr/N; where a name has other characters, use the commit"
        )
    return text


def names_pull_request(revision: str | None) -> bool:
    """Return whether a revision may be a pull request, which git also finds as `pr/1`."""
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

_MAX_PREFIX = 900
"""In bytes: a key has at most 1,024, and includes a file name."""

_AVOIDED = frozenset('\\{}^%`[]"<>#|?')


class StorePlace(NamedTuple):
    """A folder in a bucket (Azure: a container).

    `scheme` is one of `STORES`; `prefix` is "" or ends with "/".
    """

    scheme: str
    bucket: str
    prefix: str

    @property
    def text(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


def parse_store(scheme: str, rest: str) -> StorePlace:
    """Parse the part of a URL after `scheme://`."""
    bucket, _, key = rest.partition("/")
    return StorePlace(scheme, checked_bucket(scheme, bucket), checked_prefix(key))


def checked_bucket(scheme: str, name: str) -> str:
    """Check the name of a bucket or container, and return it."""
    rule = {"s3": _S3, "gs": _GS, "az": _AZ}[scheme]
    labels = name.split(".")
    lengths_fit = scheme != "gs" or max(map(len, labels)) <= _GS_LABEL
    if not rule.fullmatch(name) or not all(labels) or not lengths_fit or _is_address(name):
        word = "container" if scheme == "az" else "bucket"
        raise InvalidAdapterIdError(
            f"it is {scheme}://{word}/folder, where the {word}'s name has {_RULES[scheme]}"
        )
    return name


def checked_prefix(key: str) -> str:
    """Normalize the prefix of a folder's keys: "" or with a "/" at its end."""
    if not key:
        return ""
    path = key.removesuffix("/")
    parts = path.split("/")
    if not all(parts) or "." in parts or ".." in parts:
        raise InvalidAdapterIdError("the folder in the bucket has no part that is '', '.' or '..'")
    if not path.isprintable() or _AVOIDED & set(path):
        raise InvalidAdapterIdError(
            "the folder in the bucket is written like its keys, without encoding, and contains none"
            f" of {' '.join(sorted(_AVOIDED))} and no unprintable character"
        )
    if len(path.encode()) > _MAX_PREFIX:
        raise InvalidAdapterIdError(f"the folder has more than {_MAX_PREFIX} bytes")
    return f"{path}/"


def _is_address(name: str) -> bool:
    try:
        IPv4Address(name)
    except ValueError:
        return False
    return True
