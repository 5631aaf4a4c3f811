"""Parse what a caller names into an id in its one spelling, which says where to look."""

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
    """Whether a text says by itself that it names a local folder."""
    return text.startswith(("/", "./", "../")) or text[:5].lower() == "file:"


def parse_local(text: str) -> str:
    """A path from "/", "./" or "../" on. Links may lie on it, so ".." stays.

    Raises `InvalidAdapterIdError`.
    """
    path = readable(_path_of_url(text)) if text[:5].lower() == "file:" else text
    parts = [part for part in path.split("/") if part not in {"", "."}]
    inner = "/".join(parts)
    if path.startswith("/"):
        return f"/{inner}"
    if parts[:1] == [".."]:
        return inner if len(parts) > 1 else "../"
    return f"./{inner}"


def checked_path(path: Path) -> Path:
    """Of a program's own; raises `InvalidAdapterIdError` where the system has no such paths."""
    checked(os.fspath(path), os.fsencode)
    return path


def _path_of_url(url: str) -> str:
    """The path of file:/path, file:///path or file://localhost/path (RFC 8089)."""
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
    """What a text names, with `source` set and the id in its one spelling; asks nobody.

    `org/name[@revision]` is always the hub; see docs/sources.md for the other forms, and for what
    `allow` allows: without entries the hub only.

    Raises
    ------
    InvalidAdapterIdError
        The text is no id.
    AccessDeniedError
        No entry allows it.
    """
    return as_parsed(AdapterRef(text), allow)


def as_parsed(ref: AdapterRef, allow: Sequence[Allow]) -> AdapterRef:
    """`parsed`, if it is allowed. Raises `InvalidAdapterIdError` and `AccessDeniedError`."""
    found = parsed(ref)
    require_allowed(found, allow)
    return found


def parsed(ref: AdapterRef) -> AdapterRef:
    """`ref` with its source set and its id in the one spelling, whoever may ask for it.

    A `Path` stays what it is, and local. Where the id says no source, `ref.source` decides what it
    means: "s3" makes `bucket/folder` of it, "local" a path below a root. A hub id's revision moves
    to `revision`. Idempotent. Raises `InvalidAdapterIdError`, also where two words contradict.
    """
    if isinstance(ref.id, Path):
        _require_agreement(ref.source, "local")
        return _at(ref, "local", checked_path(ref.id))
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
    """The source, and what it is to understand."""
    if is_local_text(text):
        _require_agreement(source, "local")
        return "local", text
    found = _SCHEME.match(text)
    if found is None:
        return "hub" if source is None else source, text
    said = found[1].lower()
    _require_agreement(source, said)
    # "hub://", say: these are sources, and no schemes.
    return ("", text) if said in {"hub", "local"} else (said, found[2])


def _require_agreement(source: str | None, said: str) -> None:
    if source not in {None, said}:
        what = "a local folder" if said == "local" else "a URL of another source"
        raise InvalidAdapterIdError(
            f"the id names {what}, and source= says otherwise; leave the source out"
        )


def _on_hub(ref: AdapterRef, text: str) -> AdapterRef:
    repo, revision = parse_hub_id(text)
    if ref.revision is not None and revision not in {None, ref.revision}:
        raise InvalidAdapterIdError("the id has one revision and revision= another; give one")
    if revision is None and ref.revision is not None:
        revision = checked_revision(ref.revision)
    return replace(ref, id=repo, source="hub", revision=revision)


def _at(ref: AdapterRef, source: str, id: str | Path) -> AdapterRef:
    if ref.use_token:
        raise InvalidAdapterIdError(
            "use_token is for ids of the hub, the only source with a token of this machine's own"
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
    """Of a `parsed` one. Local folders are judged by `local_roots`, not here.

    Raises `AccessDeniedError`, which says what entry would allow it.
    """
    if ref.source == "local":
        return
    pull_request = ref.source == "hub" and names_pull_request(ref.revision)
    narrowed = pull_request or any(entry.scheme == "hub" for entry in allow)
    if not is_covered(ref, allow) and (ref.source != "hub" or narrowed):
        raise _refusal(reach_of(ref), pull_request=pull_request)


def is_covered(ref: AdapterRef, allow: Sequence[Allow]) -> bool:
    """Return whether an entry names the place of a `parsed` one that is not local."""
    reach = reach_of(ref)
    entries = [entry for entry in allow if entry.covers(reach)]
    if ref.source == "hub" and names_pull_request(ref.revision):
        return any(entry.pull_requests for entry in entries)
    return bool(entries)


def reach_of(ref: AdapterRef) -> OriginPlace:
    """Where a `parsed` one that is not local lies."""
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
        found = parsed(ref)
        if found.source == "local":
            return ""
        reach = reach_of(found)
    except LoraxError:
        return ""  # resolving it raises
    port = "" if reach.port is None else f":{reach.port}"
    return "hub" if reach.scheme == "hub" else f"{reach.scheme}://{reach.host}{port}"


def _refusal(reach: OriginPlace, *, pull_request: bool) -> AccessDeniedError:
    words = [repr(reach.scheme)]
    words += [repr(reach.host)] if reach.host else []
    words += [f"port={reach.port}"] if reach.port is not None else []
    words += [f"prefix={reach.path!r}"] if 0 < len(reach.path) <= 300 else []
    words += ["pull_requests=True"] if pull_request else []
    what = "pull requests of this adapter are" if pull_request else "this adapter is"
    return AccessDeniedError(
        f"{what} not allowed here; the operator can allow it by"
        f" LoaderConfig(allow=(Allow({', '.join(words)}), …))",
        stage="resolve",
    )


class LocalPlace(NamedTuple):
    """Where to look, in this order. `trusted` paths may be anywhere and lead anywhere."""

    paths: tuple[str, ...]
    trusted: bool


def parse_place(ref: AdapterRef, roots: Sequence[str]) -> LocalPlace:
    """The places that `ref` means; a relative `str` is looked for in each of the roots.

    Raises `InvalidAdapterIdError` for a text that is no id, or names no local folder.
    """
    found = parsed(ref)
    if found.source != "local":
        raise InvalidAdapterIdError(
            "only local folders are asked for here: a pathlib.Path, or a path inside"
            " LoaderConfig.local_roots, which begins with './', '../' or '/'"
        )
    if isinstance(found.id, Path):
        return LocalPlace((os.fspath(found.id),), trusted=True)
    if found.id.startswith("/"):
        return LocalPlace((found.id,), trusted=False)
    return LocalPlace(tuple(os.path.join(root, found.id) for root in roots), trusted=False)


def origins_of(ref: Ref) -> frozenset[str]:
    """Return the origins (`origin_of`) of an adapter or a merge's parts; local ones have none."""
    if isinstance(ref, Merge | MergedKey):
        parts = ref.parts if isinstance(ref, Merge) else ref.merge.parts
        return frozenset[str]().union(*map(origins_of, parts))
    if isinstance(ref, RemoteKey):
        ref = AdapterRef(ref.location)
    origin = origin_of(ref) if isinstance(ref, AdapterRef) else ""
    return frozenset({origin} - {""})
