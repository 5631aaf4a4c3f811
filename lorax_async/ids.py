"""Adapter ids: their grammar, parsing, and the operator's allow list. No file, no network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote_to_bytes

from lorax_async.errors import (
    AccessDeniedError,
    ConfigError,
    InvalidAdapterIdError,
    LoraxError,
    shorten,
    shorten_repr,
)
from lorax_async.types import (
    AdapterRef,
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
    Origin,
    Url,
    folder_path,
    is_address,
    parse_folder_url,
    parse_host,
    require_path_part,
)

_HOST_WORDS = {"s3": "bucket", "gs": "bucket", "az": "container", "https": "host", "http": "host"}
STORES = ("s3", "gs", "az")
SOURCES = ("hub", *STORES, "http", "https", "local")
Scheme = Literal["hub", "s3", "gs", "az", "https", "http"]
"""The kinds of remote locations."""


@dataclass(frozen=True, slots=True)
class RemoteLocation:
    """Where a remote adapter is, in the terms of an `Allow`.

    `host` is a store's bucket or container, and "" on the hub; `port` is None for the scheme's
    default. `path` is the folder below it, "" or with "/" at its end only; "org/name/" on the hub.
    """

    scheme: str
    host: str
    port: int | None
    path: str


class HubRepository(RemoteLocation):
    """A model repository of the hub. Its `text` is org/name."""

    __slots__ = ()

    @property
    def text(self) -> str:
        return self.path[:-1]


class StoreFolder(RemoteLocation):
    """A folder in a bucket of S3 or Google Cloud Storage, or in a container of Azure."""

    __slots__ = ()

    @property
    def text(self) -> str:
        return f"{self.scheme}://{self.host}/{self.path}"


class WebFolder(RemoteLocation):
    """A folder behind a URL."""

    __slots__ = ()

    @classmethod
    def of(cls, url: Url) -> WebFolder:
        return cls(url.origin.scheme, url.origin.host, url.origin.explicit_port, url.target[1:])

    @property
    def url(self) -> Url:
        port = self.port or DEFAULT_PORTS[self.scheme]
        return Url(Origin(self.scheme, self.host, port), f"/{self.path}")

    @property
    def text(self) -> str:
        return self.url.text


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A path, below a root if relative. A `trusted` one may be anywhere and follow any link."""

    path: str
    trusted: bool


Location = HubRepository | StoreFolder | WebFolder | LocalFolder
"""What the text of an id names; adapters in memory have no text."""


@dataclass(frozen=True, slots=True)
class ParsedRef(AdapterRef):
    """A reference in its one spelling, with its source set, and the location that it names."""

    location: Location = field(kw_only=True, compare=False)

    @property
    def plain(self) -> AdapterRef:
        """As a reference that equals those of other callers."""
        options = (self.token, self.digest, self.allow_stale, self.use_token)
        return AdapterRef(self.id, self.source, self.revision, *options)


@dataclass(frozen=True, slots=True)
class Allow:
    """A location from which adapters may be loaded, with everything below it.

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
                raise ConfigError(
                    f"{name} of Allow must be a str, not {shorten_repr(getattr(self, name))}"
                )
        for name in ("pull_requests", "use_token", "private"):
            require_bool(f"{name} of Allow", getattr(self, name))
        if self.prefix and (self.prefix[0] == "/" or self.prefix[-1] != "/"):
            raise ConfigError(
                f"prefix {shorten(self.prefix, 200)!r} of Allow must end with '/', because it"
                " is a folder, and must not begin with it"
            )
        self._require_applicable()
        try:
            if self.scheme == "hub":
                self._check_hub()
            elif self.scheme in DEFAULT_PORTS:
                self._normalize_web()
            else:
                _parse_bucket(self.scheme, self.host)
                _parse_prefix(self.prefix)
        except InvalidAdapterIdError as error:
            raise ConfigError(f"Allow({self.scheme!r}, …): {error.problem}") from None
        except InvalidUrlError as error:
            raise ConfigError(f"Allow({self.scheme!r}, …): {error}") from None

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
            raise ConfigError(f"Allow({self.scheme!r}, …) must name the {_HOST_WORDS[self.scheme]}")

    def _check_hub(self) -> None:
        names = self.prefix.split("/")[:-1]
        if len(names) > 2 or not all(map(_is_hub_name, names)):
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
                raise ConfigError(
                    f"port of Allow must be an integer or None, not {shorten_repr(self.port)}"
                )
            if not 0 < self.port < 65_536:
                raise ConfigError("port of Allow must be from 1 to 65535")
            is_default = self.port == DEFAULT_PORTS[self.scheme]
            object.__setattr__(self, "port", None if is_default else self.port)
        if self.private and (host == "localhost" or is_address(host)):
            raise ConfigError("private of Allow is for names: an address and 'localhost' need none")

    def covers(self, location: RemoteLocation) -> bool:
        """Return whether `location` is this location or below it."""
        ours = (self.scheme, self.host, self.port)
        theirs = (location.scheme, location.host, location.port)
        return theirs == ours and location.path.startswith(self.prefix)


def as_allow(entries: object, name: str = "allow") -> tuple[Allow, ...]:
    """Check a tuple or list of `Allow` entries. Raises `ConfigError`."""
    if not isinstance(entries, tuple | list) or not all(
        isinstance(entry, Allow) for entry in entries
    ):
        raise ConfigError(f"{name} must be a tuple of Allow(scheme, host, port, prefix)")
    return tuple(entries)


def allow_ref(ref: AdapterRef) -> Allow | None:
    """Return the permission for what the operator named, and everything below it.

    A host name on the web may have a private address. A local folder needs no entry: None.
    """
    ref = parse_ref(ref)
    location = ref.location
    if isinstance(location, LocalFolder):
        return None
    on_hub, on_web = isinstance(location, HubRepository), isinstance(location, WebFolder)
    scheme: Any = location.scheme
    return Allow(
        scheme,
        location.host,
        location.port,
        location.path,
        pull_requests=on_hub and names_pull_request(ref.revision),
        private=on_web and location.host != "localhost" and not is_address(location.host),
    )


def parse_source(text: str) -> Allow | Path:
    """Parse a location with adapters: "hub", "hub:org/", the URL of a folder, or a path, unchecked.

    The operator names it, so the hub gets this machine's own token below "org/". Raise
    `UsageError`, which does not repeat the text: it may hold a secret.
    """
    if text == "hub" or text.startswith("hub:"):
        return Allow("hub", prefix=text[4:], use_token=bool(text[4:]))
    allow = allow_ref(AdapterRef(text)) if "://" in text else None
    return Path(text) if allow is None else allow


def is_covered(ref: ParsedRef, allow: Sequence[Allow]) -> bool:
    """Return whether an entry covers the location of a reference. None covers a local folder."""
    location = ref.location
    if isinstance(location, LocalFolder):
        return False
    entries = [entry for entry in allow if entry.covers(location)]
    if isinstance(location, HubRepository) and names_pull_request(ref.revision):
        return any(entry.pull_requests for entry in entries)
    return bool(entries)


def names_pull_request(revision: str | None) -> bool:
    """Return whether a revision may be a pull request, which git also finds as `pr/1`."""
    return revision is not None and _LIKE_PULL_REQUEST.match(revision) is not None


_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_HUB_PAGE = re.compile(r"(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:tree/.*)?")
"""What a browser shows of a repository; its files are elsewhere."""
_OTHER_KINDS = frozenset({"datasets", "spaces", "kernels", "models", "api"})
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
_REVISION = re.compile(rf"{_WORD}(?:/{_WORD})*")
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]{0,8}")
_LIKE_PULL_REQUEST = re.compile(r"(?:refs/)?pr/", re.IGNORECASE)
_MAX_REVISION = 200


def _parse_repository(text: str) -> HubRepository:
    org, slash, name = text.partition("/")
    if not slash:
        raise InvalidAdapterIdError(
            "it is neither org/name[@revision], which is an adapter on the hub, nor a URL, nor a"
            " path; a local folder is written ./name"
        )
    if not (_is_hub_name(org) and _is_hub_name(name)) or name.endswith(".git"):
        raise InvalidAdapterIdError(
            "on the hub it is org/name[@revision], each name of 1 to 96 letters, digits, '_', '-'"
            " and '.', with no '-' or '.' at its ends, no '--', no '..', and no '.git' at the end;"
            " a local folder begins with './', '../' or '/', all else is a URL"
        )
    if org in _OTHER_KINDS:
        raise InvalidAdapterIdError(
            f"'{org}/…' is no model repository of the hub; write the organisation and the name"
        )
    return HubRepository("hub", "", None, f"{text}/")


def _is_hub_name(text: str) -> bool:
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


_BUCKET = re.compile(r"[A-Za-z0-9$_-][A-Za-z0-9$._-]*")


def _parse_bucket(scheme: str, name: str) -> str:
    """Return the name of a bucket or container, which becomes part of a URL.

    Refuse characters with a meaning in a URL only: the store knows which names a bucket can have.
    """
    if not _BUCKET.fullmatch(name):
        word = _HOST_WORDS[scheme]
        raise InvalidAdapterIdError(
            f"it is {scheme}://{word}/folder, where the {word}'s name has letters and digits of"
            " ASCII, '-', '_', '$', and, but not first, '.'"
        )
    return name


def _parse_prefix(key: str) -> str:
    """Normalize the prefix of a folder's keys: "" or with a "/" at its end.

    Keys are not percent-encoded. Obstore encodes them, and a gateway may decode them twice: refuse
    what would then be another path. No id has a `?` or `#`, so an `Allow` with one matches nothing.
    """
    if not key:
        return ""
    path = key.removesuffix("/")
    for part in path.split("/"):
        require_path_part(part, "?#\\%")
    return f"{path}/"


_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def _parse_local(text: str) -> str:
    """Normalize a path or file: URL to one that begins with "/", "./" or "../".

    ".." stays, for a link may precede it.
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
    return parse_allowed_ref(AdapterRef(text), allow).plain


def parse_allowed_ref(
    ref: AdapterRef, allow: Sequence[Allow], *, hub_by_default: bool = True
) -> ParsedRef:
    """Parse a reference; raise `AccessDeniedError`, with the missing entry, unless it is allowed.

    With `hub_by_default`, the hub is allowed where no entry names it. Local folders are checked
    against `local_roots` elsewhere. Raises as `parse_ref` does.
    """
    ref = parse_ref(ref)
    location = ref.location
    if isinstance(location, LocalFolder) or is_covered(ref, allow):
        return ref
    pull_request = isinstance(location, HubRepository) and names_pull_request(ref.revision)
    narrowed = not hub_by_default or pull_request or any(entry.scheme == "hub" for entry in allow)
    if isinstance(location, HubRepository) and not narrowed:
        return ref
    arguments = [repr(location.scheme)]
    arguments += [repr(location.host)] if location.host else []
    arguments += [f"port={location.port}"] if location.port is not None else []
    arguments += [f"prefix={location.path!r}"] if 0 < len(location.path) <= 300 else []
    arguments += ["pull_requests=True"] if pull_request else []
    what = "pull requests of this adapter are" if pull_request else "this adapter is"
    raise AccessDeniedError(
        f"{what} not allowed here; the operator can allow it by the setting"
        f" allow=(Allow({', '.join(arguments)}), …)",
        stage="resolve",
    )


def parse_requested(id: str | AdapterRef, sources: Sequence[Allow]) -> ParsedRef | None:
    """Parse an id that a request names; None if it is invalid, or `sources` do not cover it."""
    try:
        ref = AdapterRef(id) if isinstance(id, str) else id
        return parse_allowed_ref(ref, sources, hub_by_default=False)
    except (InvalidAdapterIdError, AccessDeniedError):
        return None


def parse_ref(ref: AdapterRef) -> ParsedRef:
    """Parse the id of `ref`, unless it is parsed already. Check no allow list.

    A `Path` stays a `Path`, and is local. For an id without a source, `ref.source` decides: "s3"
    reads it as `bucket/folder`, "local" as a path below a root. A hub id's revision moves to
    `revision`. Raises `InvalidAdapterIdError`, also for contradictions.
    """
    if isinstance(ref, ParsedRef):
        return ref
    id, revision = ref.id, ref.revision
    if isinstance(id, Path):
        _require_agreement(ref.source, "local")
        source = "local"
        location: Location = LocalFolder(require_id_text(os.fspath(id), os.fsencode), trusted=True)
    else:
        source, text = _split(require_printable(require_id_text(id, str.encode)), ref.source)
        if source == "hub":
            text, revision = _split_revision(text, revision)
        location = _parse_location(source, text)
        id = location.path if isinstance(location, LocalFolder) else location.text
    if source != "hub":
        _check_options(source, revision, use_token=ref.use_token)
    rest = (ref.token, ref.digest, ref.allow_stale, ref.use_token)
    return ParsedRef(id, source, revision, *rest, location=location)


def _split(text: str, source: str | None) -> tuple[str, str]:
    """Split an id into its source and the rest."""
    if text.startswith(("/", "./", "../")) or text[:5].lower() == "file:":
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


def _parse_location(source: str, text: str) -> Location:
    """Parse the part of an id after its scheme."""
    if source == "hub":
        return _parse_repository(text)
    if source == "local":
        return LocalFolder(require_id_text(_parse_local(text), str.encode), trusted=False)
    try:
        if source in DEFAULT_PORTS:
            return _parse_web(f"{source}://{text}")
        if source in STORES:
            bucket, _, key = text.partition("/")
            return StoreFolder(source, _parse_bucket(source, bucket), None, _parse_prefix(key))
    except InvalidUrlError as error:
        raise InvalidAdapterIdError(str(error)) from None
    raise InvalidAdapterIdError(
        f"there is no such source; it is one of {', '.join(SOURCES)}, or a URL that begins with"
        " s3://, gs://, az://, https://, http:// or file:"
    )


def _parse_web(text: str) -> WebFolder:
    folder = WebFolder.of(parse_folder_url(text))
    page = _HUB_PAGE.fullmatch(f"{folder.host}/{folder.path}")
    if page is not None:
        raise InvalidAdapterIdError(f"this is a page of the hub; the id is {page[1]!r}")
    return folder


def _split_revision(text: str, revision: str | None) -> tuple[str, str | None]:
    """Split the id of a repository from its revision, which is in the id or in `revision`."""
    repo, at, own = text.partition("@")
    if at and revision not in {None, own}:
        raise InvalidAdapterIdError("the id has one revision and revision= another; pass one")
    revision = own if at else revision
    return repo, None if revision is None else parse_revision(revision)


def _check_options(source: str, revision: str | None, *, use_token: bool) -> None:
    """Raise `InvalidAdapterIdError` for an option that a source other than the hub has not."""
    if use_token:
        raise InvalidAdapterIdError(
            "use_token is for the hub, the only source for which this machine has a token"
        )
    if revision is not None and source == "local":
        raise InvalidAdapterIdError("a local folder has no revisions; leave the revision out")
    if revision is not None and not _VERSION.fullmatch(revision):
        raise InvalidAdapterIdError(
            "a revision here is a versionId or a strong ETag: up to 1,024 printable characters"
            " of ASCII without spaces"
        )


def origin_of(ref: Ref) -> str | None:
    """Return "hub", "s3://bucket" or "https://host:port"; None for local and invalid ids."""
    if isinstance(ref, RemoteKey):
        text = ref.location
    elif isinstance(ref, AdapterRef):
        try:
            parsed = parse_ref(ref)
        except LoraxError:
            return None  # resolving it raises
        if isinstance(parsed.location, LocalFolder):
            return None
        text = parsed.text
    else:
        return None
    return "/".join(text.split("/")[:3]) if "://" in text else "hub"
