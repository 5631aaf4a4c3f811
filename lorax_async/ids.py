"""Adapter ids: their grammar, parsing, and the operator's allow list. No file, no network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from urllib.parse import unquote_to_bytes

from lorax_async import urls
from lorax_async.errors import (
    AccessDeniedError,
    ConfigError,
    InvalidAdapterIdError,
    LoraxError,
    shorten,
)
from lorax_async.types import (
    AdapterRef,
    Merge,
    MergedKey,
    Ref,
    RemoteKey,
    require_bool,
    require_id_text,
    require_one_of,
    require_printable,
)
from lorax_async.urls import (
    DEFAULT_PORTS,
    InvalidUrlError,
    Url,
    folder_path,
    is_address,
    parse_host,
)


def parse_folder_url(text: str) -> Url:
    """Parse an http or https URL of a folder into its canonical spelling."""
    try:
        return urls.parse_folder_url(text)
    except InvalidUrlError as error:
        raise InvalidAdapterIdError(str(error)) from None


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
    return HubId(repo, parse_revision(revision) if at else None)


def is_hub_name(text: str) -> bool:
    """Return whether a name is valid by `huggingface_hub.utils.validate_repo_id`."""
    return _NAME.fullmatch(text) is not None and "--" not in text and ".." not in text


def parse_revision(text: str) -> str:
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
    return StorePlace(scheme, parse_bucket(scheme, bucket), parse_prefix(key))


def parse_bucket(scheme: str, name: str) -> str:
    """Check the name of a bucket or container, and return it."""
    rule = {"s3": _S3, "gs": _GS, "az": _AZ}[scheme]
    labels = name.split(".")
    lengths_fit = scheme != "gs" or max(map(len, labels)) <= _GS_LABEL
    if not rule.fullmatch(name) or not all(labels) or not lengths_fit or is_address(name):
        word = "container" if scheme == "az" else "bucket"
        raise InvalidAdapterIdError(
            f"it is {scheme}://{word}/folder, where the {word}'s name has {_RULES[scheme]}"
        )
    return name


def parse_prefix(key: str) -> str:
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


Scheme = Literal["hub", "s3", "gs", "az", "https", "http"]
"""The kinds of remote places."""


class OriginPlace(NamedTuple):
    """A remote place, in the terms of an `Allow`.

    `path` is the folder below host or bucket, or "org/name/" on the hub; it ends with "/" and does
    not begin with one. `host` is "" on the hub; `port` is None for the scheme's default.
    """

    scheme: str
    host: str
    port: int | None
    path: str


@dataclass(frozen=True, slots=True)
class Allow:
    """A place from which adapters may be loaded, with everything below it.

    Parameters
    ----------
    scheme
        "hub", "s3", "gs", "az", "https" or "http".
    host
        The full name of the host, bucket or container; an IPv6 address with or without brackets.
        "" for the hub.
    port
        The port of "https" and "http"; None is the scheme's default.
    prefix
        The folder below it, ending with "/"; on the hub "org/" or "org/name/". "" is all.
    pull_requests
        Hub only: allow `refs/pr/N`, which anyone may have proposed.
    use_token
        Hub only: use this machine's own token (`HF_TOKEN`, `hf auth login`) for ids below `prefix`
        without a token. Everyone who may name an id then reads what that token reads there; ids
        that the hub redirects elsewhere are refused.
    private
        "https" and "http" with a name as host only: allow private addresses (RFC 1918, 6598, 4193).
        An address or "localhost" as host needs no permission.

    Raises
    ------
    ConfigError
        The entry contradicts itself, or cannot match anything.
    """

    scheme: Scheme
    host: str = ""
    port: int | None = None
    prefix: str = ""
    pull_requests: bool = field(default=False, kw_only=True)
    use_token: bool = field(default=False, kw_only=True)
    private: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        require_one_of("the scheme of Allow", self.scheme, get_args(Scheme))
        for name in ("host", "prefix"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} of Allow must be a str, not {getattr(self, name)!r}")
        for name in ("pull_requests", "use_token", "private"):
            require_bool(f"{name} of Allow", getattr(self, name))
        try:
            self._normalize()
        except InvalidAdapterIdError as error:
            raise ConfigError(f"Allow({self.scheme!r}, …): {error.problem}") from None
        except InvalidUrlError as error:
            raise ConfigError(f"Allow({self.scheme!r}, …): {error}") from None

    def _normalize(self) -> None:
        """Check the fields for this scheme and bring them into canonical spelling."""
        if self.prefix and (self.prefix[0] == "/" or self.prefix[-1] != "/"):
            raise ConfigError(
                f"prefix {shorten(self.prefix, 200)!r} of Allow must end with '/', because it"
                " is a folder, and must not begin with it"
            )
        self._require_applicable()
        if self.scheme == "hub":
            self._check_hub()
        elif self.scheme in DEFAULT_PORTS:
            self._normalize_web()
        else:
            parse_bucket(self.scheme, self.host)
            parse_prefix(self.prefix)

    def _require_applicable(self) -> None:
        web = self.scheme in DEFAULT_PORTS
        for name, value, applicable in (
            ("host", self.host, self.scheme != "hub"),
            ("port", self.port is not None, web),
            ("private", self.private, web),
            ("pull_requests", self.pull_requests, self.scheme == "hub"),
            ("use_token", self.use_token, self.scheme == "hub"),
        ):
            if value and not applicable:
                raise ConfigError(f"Allow({self.scheme!r}, …) has no {name}")
        if not self.host and self.scheme != "hub":
            word = {"az": "container"}.get(
                self.scheme, "bucket" if self.scheme in STORES else "host"
            )
            raise ConfigError(f"Allow({self.scheme!r}, …) must name the {word}")

    def _check_hub(self) -> None:
        names = self.prefix.split("/")[:-1]
        if len(names) > 2 or not all(map(is_hub_name, names)):
            raise ConfigError(
                f"prefix {shorten(self.prefix, 200)!r} of Allow('hub') is neither 'org/' nor"
                " 'org/name/'"
            )

    def _normalize_web(self) -> None:
        bare = self.host.count(":") > 1 and not self.host.startswith("[")
        host = parse_host(f"[{self.host}]" if bare else self.host)
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "prefix", folder_path(f"/{self.prefix}")[1:])
        if self.port is not None:
            if not isinstance(self.port, int) or isinstance(self.port, bool):
                raise ConfigError(f"port of Allow must be an integer or None, not {self.port!r}")
            if not 0 < self.port < 65_536:
                raise ConfigError("port of Allow must be from 1 to 65535")
            is_default = self.port == DEFAULT_PORTS[self.scheme]
            object.__setattr__(self, "port", None if is_default else self.port)
        if self.private and (host == "localhost" or is_address(host)):
            raise ConfigError("private of Allow is for names: an address and 'localhost' need none")

    def covers(self, place: OriginPlace) -> bool:
        """Return whether `place` is this place or below it."""
        return place[:3] == (self.scheme, self.host, self.port) and place.path.startswith(
            self.prefix
        )


def as_allow(entries: object, name: str = "allow") -> tuple[Allow, ...]:
    """Check a tuple or list of `Allow` entries. Raises `ConfigError`."""
    if not isinstance(entries, tuple | list) or not all(
        isinstance(entry, Allow) for entry in entries
    ):
        raise ConfigError(f"{name} must be a tuple of Allow(scheme, host, port, prefix)")
    return tuple(entries)


_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def is_local_text(text: str) -> bool:
    """Return whether a text names a local folder without `source="local"`."""
    return text.startswith(("/", "./", "../")) or text[:5].lower() == "file:"


def parse_local(text: str) -> str:
    """Normalize a path or file: URL to one that begins with "/", "./" or "../".

    Raises `InvalidAdapterIdError`. ".." stays, for a link may precede it.
    """
    path = require_printable(_path_of_url(text)) if text[:5].lower() == "file:" else text
    parts = [part for part in path.split("/") if part not in {"", "."}]
    inner = "/".join(parts)
    if path.startswith("/"):
        return f"/{inner}"
    if parts[:1] == [".."]:
        return inner if len(parts) > 1 else "../"
    return f"./{inner}"


def _path_of_url(url: str) -> str:
    """Return the path of file:/path, file:///path or file://localhost/path (RFC 8089)."""
    path = url[5:]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host.lower() not in {"", "localhost"}:
            raise InvalidAdapterIdError("a file: URL names no other host; use file:///path")
        path = slash + path
    if not path.startswith("/") or "?" in path or "#" in path or _BARE_PERCENT.search(path):
        raise InvalidAdapterIdError(
            "a file: URL is file:///path, with '?', '#' and '%' in it written as %3F, %23 and %25"
        )
    try:
        return unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise InvalidAdapterIdError("the file: URL does not decode to UTF-8") from None


SOURCES = ("hub", *STORES, "http", "https", "local")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_VERSION = re.compile(r"[\x21-\x7e]{1,1024}")


def parse_adapter_id(text: str, allow: Sequence[Allow] = ()) -> AdapterRef:
    """Parse an id into a reference with `source` set and the id in canonical spelling.

    `org/name[@revision]` is always on the hub; docs/sources.md has the other forms and the meaning
    of `allow`: without entries, the hub only. No request is made.

    Raises
    ------
    InvalidAdapterIdError
        The text is no id.
    AccessDeniedError
        No entry allows it.
    """
    return parse_allowed_ref(AdapterRef(text), allow)


def parse_allowed_ref(ref: AdapterRef, allow: Sequence[Allow]) -> AdapterRef:
    """Parse a reference and check it against `allow`.

    Raises `InvalidAdapterIdError` and `AccessDeniedError`.
    """
    ref = parse_ref(ref)
    require_allowed(ref, allow)
    return ref


def parse_ref(ref: AdapterRef) -> AdapterRef:
    """Return `ref` with its source set and its id in canonical spelling. Check no allow list.

    A `Path` stays a `Path`, and is local. For an id without a source, `ref.source` decides: "s3"
    reads it as `bucket/folder`, "local" as a path below a root. A hub id's revision moves to
    `revision`. Idempotent. Raises `InvalidAdapterIdError`, also for contradictions.
    """
    if isinstance(ref.id, Path):
        _require_agreement(ref.source, "local")
        require_id_text(os.fspath(ref.id), os.fsencode)
        return _at(ref, "local", ref.id)
    source, rest = _read(require_printable(require_id_text(ref.id, str.encode)), ref.source)
    if source == "hub":
        return _on_hub(ref, rest)
    if source == "local":
        return _at(ref, source, require_id_text(parse_local(rest), str.encode))
    if source in DEFAULT_PORTS:
        return _at(ref, source, parse_folder_url(f"{source}://{rest}").text)
    if source in STORES:
        return _at(ref, source, parse_store(source, rest).text)
    raise InvalidAdapterIdError(
        "there is no such source; it is one of "
        + ", ".join(SOURCES)
        + ", or a URL that begins with"
        " s3://, gs://, az://, https://, http:// or file:"
    )


def _read(text: str, source: str | None) -> tuple[str, str]:
    """Split an id into its source and the rest."""
    if is_local_text(text):
        _require_agreement(source, "local")
        return "local", text
    match = _SCHEME.match(text)
    if match is None:
        return "hub" if source is None else source, text
    scheme = match[1].lower()
    _require_agreement(source, scheme)
    # "hub" and "local" are sources, not schemes: "hub://…" is no id.
    return ("", text) if scheme in {"hub", "local"} else (scheme, match[2])


def _require_agreement(source: str | None, actual: str) -> None:
    if source not in {None, actual}:
        what = "a local folder" if actual == "local" else "a URL of another source"
        raise InvalidAdapterIdError(
            f"the id names {what}, which contradicts source=; leave the source out"
        )


def _on_hub(ref: AdapterRef, text: str) -> AdapterRef:
    repo, revision = parse_hub_id(text)
    if ref.revision is not None and revision not in {None, ref.revision}:
        raise InvalidAdapterIdError("the id has one revision and revision= another; pass one")
    if revision is None and ref.revision is not None:
        revision = parse_revision(ref.revision)
    return replace(ref, id=repo, source="hub", revision=revision)


def _at(ref: AdapterRef, source: str, id: str | Path) -> AdapterRef:
    if ref.use_token:
        raise InvalidAdapterIdError(
            "use_token is for the hub, the only source for which this machine has a token"
        )
    if ref.revision is not None:
        if source == "local":
            raise InvalidAdapterIdError("a local folder has no revisions; leave the revision out")
        if not _VERSION.fullmatch(ref.revision):
            raise InvalidAdapterIdError(
                "a revision here is a versionId or a strong ETag: up to 1,024 printable characters"
                " of ASCII without spaces"
            )
    return replace(ref, id=id, source=source)


def require_allowed(ref: AdapterRef, allow: Sequence[Allow]) -> None:
    """Raise `AccessDeniedError`, with the missing entry, unless a parsed reference is allowed.

    Local folders are checked against `local_roots` elsewhere.
    """
    if ref.source == "local":
        return
    pull_request = ref.source == "hub" and names_pull_request(ref.revision)
    narrowed = pull_request or any(entry.scheme == "hub" for entry in allow)
    if not is_covered(ref, allow) and (ref.source != "hub" or narrowed):
        raise _refusal(place_of(ref), pull_request=pull_request)


def is_covered(ref: AdapterRef, allow: Sequence[Allow]) -> bool:
    """Return whether an entry covers the place of a parsed remote reference."""
    place = place_of(ref)
    entries = [entry for entry in allow if entry.covers(place)]
    if ref.source == "hub" and names_pull_request(ref.revision):
        return any(entry.pull_requests for entry in entries)
    return bool(entries)


def place_of(ref: AdapterRef) -> OriginPlace:
    """Return the place of a parsed remote reference."""
    if ref.source == "hub":
        return OriginPlace("hub", "", None, f"{ref.id}/")
    scheme, _, rest = str(ref.id).partition("://")
    if scheme in STORES:
        place = parse_store(scheme, rest)
        return OriginPlace(scheme, place.bucket, None, place.prefix)
    return place_of_url(parse_folder_url(str(ref.id)))


def place_of_url(url: Url) -> OriginPlace:
    """Return the place of a folder's URL."""
    origin = url.origin
    return OriginPlace(origin.scheme, origin.host, origin.explicit_port, url.target[1:])


def origin_of(ref: AdapterRef) -> str:
    """Return "hub", "s3://bucket" or "https://host:port"; "" for a local or an invalid id."""
    try:
        ref = parse_ref(ref)
        if ref.source == "local":
            return ""
        place = place_of(ref)
    except LoraxError:
        return ""  # resolving it raises
    port = "" if place.port is None else f":{place.port}"
    return "hub" if place.scheme == "hub" else f"{place.scheme}://{place.host}{port}"


def _refusal(place: OriginPlace, *, pull_request: bool) -> AccessDeniedError:
    arguments = [repr(place.scheme)]
    arguments += [repr(place.host)] if place.host else []
    arguments += [f"port={place.port}"] if place.port is not None else []
    arguments += [f"prefix={place.path!r}"] if 0 < len(place.path) <= 300 else []
    arguments += ["pull_requests=True"] if pull_request else []
    what = "pull requests of this adapter are" if pull_request else "this adapter is"
    return AccessDeniedError(
        f"{what} not allowed here; the operator can allow it by"
        f" LoaderConfig(allow=(Allow({', '.join(arguments)}), …))",
        stage="resolve",
    )


class LocalPlace(NamedTuple):
    """The paths to try, in order. `trusted` paths may be anywhere and follow any link."""

    paths: tuple[str, ...]
    trusted: bool


def parse_place(ref: AdapterRef, roots: Sequence[str]) -> LocalPlace:
    """Return the local paths of `ref`; a relative `str` is tried below each of the roots.

    Raises `InvalidAdapterIdError` for a text that is no id, or names no local folder.
    """
    ref = parse_ref(ref)
    if ref.source != "local":
        raise InvalidAdapterIdError(
            "only local folders are accepted here: a pathlib.Path, or a path inside"
            " LoaderConfig.local_roots, which begins with './', '../' or '/'"
        )
    if isinstance(ref.id, Path):
        return LocalPlace((os.fspath(ref.id),), trusted=True)
    if ref.id.startswith("/"):
        return LocalPlace((ref.id,), trusted=False)
    return LocalPlace(tuple(os.path.join(root, ref.id) for root in roots), trusted=False)


def origins_of(ref: Ref) -> frozenset[str]:
    """Return the origins (`origin_of`) of an adapter or a merge's parts; local ones have none."""
    if isinstance(ref, Merge | MergedKey):
        parts = ref.parts if isinstance(ref, Merge) else ref.merge.parts
        return frozenset[str]().union(*map(origins_of, parts))
    if isinstance(ref, RemoteKey):
        ref = AdapterRef(ref.location)
    origin = origin_of(ref) if isinstance(ref, AdapterRef) else ""
    return frozenset({origin} - {""})
