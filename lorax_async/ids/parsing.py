"""Parse adapter ids into their canonical form, and check them against the allow list."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from lorax_async.errors import AccessDeniedError, InvalidAdapterIdError, LoraxError
from lorax_async.ids.allow import Allow, OriginPlace
from lorax_async.ids.grammar import (
    DEFAULT_PORTS,
    STORES,
    checked_revision,
    names_pull_request,
    parse_folder_url,
    parse_hub_id,
    parse_store,
)
from lorax_async.types import AdapterRef, Merge, MergedKey, Ref, RemoteKey, checked, readable

_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def is_local_text(text: str) -> bool:
    """Return whether a text names a local folder without `source="local"`."""
    return text.startswith(("/", "./", "../")) or text[:5].lower() == "file:"


def parse_local(text: str) -> str:
    """Normalize a path or file: URL to one that begins with "/", "./" or "../".

    Raises `InvalidAdapterIdError`. ".." stays, for a link may precede it.
    """
    path = readable(_path_of_url(text)) if text[:5].lower() == "file:" else text
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
    return as_parsed(AdapterRef(text), allow)


def as_parsed(ref: AdapterRef, allow: Sequence[Allow]) -> AdapterRef:
    """Parse a reference and check it against `allow`.

    Raises `InvalidAdapterIdError` and `AccessDeniedError`.
    """
    ref = parsed(ref)
    require_allowed(ref, allow)
    return ref


def parsed(ref: AdapterRef) -> AdapterRef:
    """Return `ref` with its source set and its id in canonical spelling. Check no allow list.

    A `Path` stays a `Path`, and is local. For an id without a source, `ref.source` decides: "s3"
    reads it as `bucket/folder`, "local" as a path below a root. A hub id's revision moves to
    `revision`. Idempotent. Raises `InvalidAdapterIdError`, also for contradictions.
    """
    if isinstance(ref.id, Path):
        _require_agreement(ref.source, "local")
        checked(os.fspath(ref.id), os.fsencode)
        return _at(ref, "local", ref.id)
    source, rest = _read(readable(checked(ref.id, str.encode)), ref.source)
    if source == "hub":
        return _on_hub(ref, rest)
    if source == "local":
        return _at(ref, source, checked(parse_local(rest), str.encode))
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
        revision = checked_revision(ref.revision)
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
    """Raise `AccessDeniedError`, with the missing entry, unless a `parsed` reference is allowed.

    Local folders are checked against `local_roots` elsewhere.
    """
    if ref.source == "local":
        return
    pull_request = ref.source == "hub" and names_pull_request(ref.revision)
    narrowed = pull_request or any(entry.scheme == "hub" for entry in allow)
    if not is_covered(ref, allow) and (ref.source != "hub" or narrowed):
        raise _refusal(place_of(ref), pull_request=pull_request)


def is_covered(ref: AdapterRef, allow: Sequence[Allow]) -> bool:
    """Return whether an entry covers the place of a `parsed` remote reference."""
    place = place_of(ref)
    entries = [entry for entry in allow if entry.covers(place)]
    if ref.source == "hub" and names_pull_request(ref.revision):
        return any(entry.pull_requests for entry in entries)
    return bool(entries)


def place_of(ref: AdapterRef) -> OriginPlace:
    """Return the place of a `parsed` remote reference."""
    if ref.source == "hub":
        return OriginPlace("hub", "", None, f"{ref.id}/")
    scheme, _, rest = str(ref.id).partition("://")
    if scheme in STORES:
        place = parse_store(scheme, rest)
        return OriginPlace(scheme, place.bucket, None, place.prefix)
    url = parse_folder_url(str(ref.id))
    return OriginPlace(url.scheme, url.host, url.port, url.path[1:])


def origin_of(ref: AdapterRef) -> str:
    """Return "hub", "s3://bucket" or "https://host:port"; "" for a local or an invalid id."""
    try:
        ref = parsed(ref)
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
    ref = parsed(ref)
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
