"""Folders behind http(s) URLs: a version is what the ETags of their files come to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorax_async.config import Limits
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    InvalidAdapterIdError,
    shorten,
)
from lorax_async.formats.digests import sent_sha256
from lorax_async.formats.safetensors import header_end
from lorax_async.formats.split_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.http.range_engine import RangeEngine
from lorax_async.http.settings import Rules
from lorax_async.http.target import ProbeResult, Target, Validators
from lorax_async.http.urls import Url, parse_url
from lorax_async.ids.parsing import parsed
from lorax_async.remote.base import WEAK, AnotherVersionError, LocatedAdapter, RemoteFile
from lorax_async.remote.metadata import FIRST_BYTES, CancelScope, answered
from lorax_async.types import AdapterRef

MAX_INDEX_BYTES = 2 << 20
MAX_SHARDS = 256

_VERSION = re.compile(f"({WEAK})?[0-9a-f]{{40}}")
_STRONG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]+"')
_SHARD = re.compile(rb'"adapter_model-[0-9]{5}-of-([0-9]{5})\.safetensors"')


@dataclass(frozen=True, slots=True)
class _SplitAdapter(LocatedAdapter):
    """Its version is that of the index and of all files that this names."""

    shards: tuple[RemoteFile, ...] = ()


@dataclass(frozen=True, slots=True)
class _WebFolder:
    url: Url = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    rules: Rules
    scope: str

    def file(self, name: str) -> Target:
        url = Url(self.url.origin, f"{self.url.target}{name}")
        return Target(url, name, self.headers, self.rules)


class WebBackend:
    """Adapters in folders behind URLs, `http(s)://host[:port]/folder/`: a `Backend`.

    A token is sent as `Authorization: Bearer …`, to the URL's own origin only.

    Parameters
    ----------
    engine
        What asks; whoever made it closes it.
    rules
        Where requests and redirects may go.
    limits
        How large a config may be.
    """

    def __init__(self, engine: RangeEngine, rules: Rules, limits: Limits) -> None:
        self._engine = engine
        self._rules = rules
        self._limits = limits

    def recalled(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """Where the revision is a version that a handle told; of ETags the server is asked."""
        folder = _folder(ref, self._rules)
        if ref.revision is None or not _VERSION.fullmatch(ref.revision):
            return None
        return folder.url.text, ref.revision, folder.scope

    async def scope(self, ref: AdapterRef) -> str:
        return _folder(ref, self._rules).scope

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        """Ask for the config and for the beginning of the weights, both at once.

        `ref.revision` is the version that shall be there, or the ETag of its weights. Raises
        `AdapterNotFoundError` where another one is, or a file is not, `InvalidAdapterIdError`,
        and the engine's errors.
        """
        folder = _folder(ref, self._rules)
        with CancelScope(self._engine) as probes:
            asked = probes.whole(folder.file(CONFIG_FILE.file_name), self._limits.max_config_bytes)
            begun = probes.metadata(folder.file(WEIGHTS_FILE.file_name), FIRST_BYTES, _needed)
            config = await answered(asked)
            try:
                weights = await answered(begun)
            except AdapterNotFoundError:
                located: LocatedAdapter = await _in_parts(probes, folder, config)
                etag = None  # of the index alone: it does not name the files that this names
            else:
                files = (_told(CONFIG_FILE, config), _told(WEIGHTS_FILE, weights))
                version = _version([config, weights])
                located = LocatedAdapter(folder.url.text, version, folder.scope, files)
                etag = _strong(weights.validators)
        _check_revision(ref.revision, located, etag)
        return located

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """They were asked for when they were located, for the version is theirs too."""
        shards = located.shards if isinstance(located, _SplitAdapter) else ()
        found = {each.role: each for each in shards}
        if found.keys() != set(roles):
            raise AdapterFormatError(
                f"{INDEX_FILE.file_name}: its weights are not in {len(roles)} files that are called"
                f" adapter_model-00001-of-{len(roles):05d}.safetensors and so on; save it again"
            )
        return tuple(found[role] for role in roles)


def _folder(ref: AdapterRef, rules: Rules) -> _WebFolder:
    found = parsed(ref)
    if found.source not in {"http", "https"}:
        raise InvalidAdapterIdError(f"it is no folder behind a URL, but in {found.source}")
    url = parse_url(found.text)
    if ref.token is None:
        return _WebFolder(url, {}, rules, "")
    scope = hashlib.sha256(f"{url.origin}\n{ref.token}".encode("utf-8", "surrogatepass"))
    return _WebFolder(url, {"Authorization": f"Bearer {ref.token}"}, rules, scope.hexdigest())


async def _in_parts(probes: CancelScope, folder: _WebFolder, config: ProbeResult) -> _SplitAdapter:
    try:
        index = await answered(probes.whole(folder.file(INDEX_FILE.file_name), MAX_INDEX_BYTES))
    except AdapterNotFoundError as error:
        raise AdapterNotFoundError(
            f"the folder at {folder.url} has neither {WEIGHTS_FILE.file_name} nor"
            f" {INDEX_FILE.file_name}; nothing else is read"
        ) from error
    names = _shard_names(index.start)
    begun = [probes.metadata(folder.file(name), FIRST_BYTES, _needed) for name in names]
    parts = [await answered(job) for job in begun]
    files = (_told(CONFIG_FILE, config), _told(INDEX_FILE, index))
    shards = tuple(
        _told(FileRole("weights", n, len(parts)), part) for n, part in enumerate(parts, 1)
    )
    version = _version([config, index, *parts])
    return _SplitAdapter(folder.url.text, version, folder.scope, files, shards)


def _shard_names(index: bytes) -> list[str]:
    """Of how many files an index tells; none where it tells of other ones, which `shards` says."""
    counts = {int(count) for count in _SHARD.findall(index)}
    if len(counts) != 1:
        return []
    (count,) = counts
    if count > MAX_SHARDS:
        raise AdapterFormatError(
            f"{INDEX_FILE.file_name}: weights in {count:,} files, of which there may be"
            f" {MAX_SHARDS}; save the adapter in larger ones"
        )
    return [f"adapter_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _told(role: FileRole, answer: ProbeResult) -> RemoteFile:
    expected = sent_sha256(answer.fields)
    return RemoteFile(role, answer.target, answer.validators.size, expected, answer=answer)


def _version(answers: Sequence[ProbeResult]) -> str:
    lines = [_named(answer) or _described(answer) for answer in answers]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]
    return digest if all(_strong(answer.validators) for answer in answers) else f"{WEAK}{digest}"


def _needed(start: memoryview, known: Validators) -> int:
    """Without a strong ETag all that was asked for is part of the version."""
    return header_end(start) if _strong(known) else FIRST_BYTES


def _strong(known: Validators) -> str | None:
    """What names the very bytes of the file, by the server's word; None if nothing does."""
    etag = known.etag or ""
    return etag if _STRONG.fullmatch(etag) else None


def _named(answer: ProbeResult) -> str | None:
    etag, version_id = _strong(answer.validators), answer.fields.get("x-amz-version-id", "")
    return None if etag is None else f"{answer.target.name} {etag} {version_id}"


def _described(answer: ProbeResult) -> str:
    """All that can be seen of it without reading it to its end."""
    known, metadata = answer.validators, hashlib.sha256(answer.start).hexdigest()
    return repr((answer.target.name, known.size, known.etag, known.modified, metadata))


def _check_revision(revision: str | None, located: LocatedAdapter, etag: str | None) -> None:
    names = {located.version, etag, etag and etag.strip('"')}
    if revision is not None and revision not in names:
        raise AnotherVersionError(
            f"revision {shorten(revision, 100)!r} is not what the URL leads to now: that is"
            f" {located.version}, and there is no other behind a URL"
        )
