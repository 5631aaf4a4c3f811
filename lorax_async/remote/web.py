"""The backend of folders behind http(s) URLs: a version is a digest of the files' ETags."""

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
from lorax_async.ids import parse_ref
from lorax_async.remote.base import WEAK, AnotherVersionError, LocatedAdapter, RemoteFile
from lorax_async.remote.metadata import FIRST_BYTES, CancelScope, wait_for
from lorax_async.types import AdapterRef
from lorax_async.urls import Url, parse_url

MAX_INDEX_BYTES = 2 << 20
MAX_SHARDS = 256

_VERSION = re.compile(f"({WEAK})?[0-9a-f]{{40}}")
_STRONG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]+"')
_SHARD = re.compile(rb'"adapter_model-[0-9]{5}-of-([0-9]{5})\.safetensors"')


@dataclass(frozen=True, slots=True)
class _SplitAdapter(LocatedAdapter):
    """Weights in several files, which are probed with the index: the version is of all of them."""

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
        Sends the requests; its maker closes it.
    rules
        Where requests and redirects may go.
    limits
        The largest config.
    """

    def __init__(self, engine: RangeEngine, rules: Rules, limits: Limits) -> None:
        self._engine = engine
        self._rules = rules
        self._limits = limits

    def pinned_version(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """See `Backend`. An ETag is no version: the server has to be asked."""
        folder = _folder(ref, self._rules)
        if ref.revision is None or not _VERSION.fullmatch(ref.revision):
            return None
        return folder.url.text, ref.revision, folder.scope

    async def scope(self, ref: AdapterRef) -> str:
        return _folder(ref, self._rules).scope

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        """Probe the config and the weights, both at once.

        `ref.revision` is the required version, or the ETag of its weights. Raise
        `AnotherVersionError` for another version, `AdapterNotFoundError` for a missing file,
        `InvalidAdapterIdError`, and the engine's errors.
        """
        folder = _folder(ref, self._rules)
        with CancelScope(self._engine) as probes:
            config_request = probes.fetch_whole(
                folder.file(CONFIG_FILE.file_name), self._limits.max_config_bytes
            )
            request = probes.probe(
                folder.file(WEIGHTS_FILE.file_name), FIRST_BYTES, _count_needed_bytes
            )
            config = await wait_for(config_request)
            try:
                weights = await wait_for(request)
            except AdapterNotFoundError:
                located: LocatedAdapter = await _locate_split(probes, folder, config)
                etag = None  # the index's own ETag does not name the weights' bytes
            else:
                files = (_as_file(CONFIG_FILE, config), _as_file(WEIGHTS_FILE, weights))
                version = _version([config, weights])
                located = LocatedAdapter(folder.url.text, version, folder.scope, files)
                etag = _strong(weights.validators)
        _check_revision(ref.revision, located, etag)
        return located

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """Return the files that `locate` probed: the version is theirs too."""
        shards = located.shards if isinstance(located, _SplitAdapter) else ()
        by_role = {file.role: file for file in shards}
        if by_role.keys() != set(roles):
            raise AdapterFormatError(
                f"{INDEX_FILE.file_name}: its weights are not in {len(roles)} files named"
                f" adapter_model-00001-of-{len(roles):05d}.safetensors and so on; save it again"
            )
        return tuple(by_role[role] for role in roles)


def _folder(ref: AdapterRef, rules: Rules) -> _WebFolder:
    parsed_ref = parse_ref(ref)
    if parsed_ref.source not in {"http", "https"}:
        raise InvalidAdapterIdError(f"it is no folder behind a URL, but in {parsed_ref.source}")
    url = parse_url(parsed_ref.text)
    if ref.token is None:
        return _WebFolder(url, {}, rules, "")
    scope = hashlib.sha256(f"{url.origin}\n{ref.token}".encode("utf-8", "surrogatepass"))
    return _WebFolder(url, {"Authorization": f"Bearer {ref.token}"}, rules, scope.hexdigest())


async def _locate_split(
    probes: CancelScope, folder: _WebFolder, config: ProbeResult
) -> _SplitAdapter:
    """Locate weights in several files, by their index."""
    target = folder.file(INDEX_FILE.file_name)
    try:
        index = await wait_for(probes.fetch_whole(target, MAX_INDEX_BYTES))
    except AdapterNotFoundError as error:
        raise AdapterNotFoundError(
            f"the folder at {folder.url} has neither {WEIGHTS_FILE.file_name} nor"
            f" {INDEX_FILE.file_name}; nothing else is read"
        ) from error
    names = _shard_names(index.start)
    requests = [probes.probe(folder.file(name), FIRST_BYTES, _count_needed_bytes) for name in names]
    parts = [await wait_for(request) for request in requests]
    files = (_as_file(CONFIG_FILE, config), _as_file(INDEX_FILE, index))
    shards = tuple(
        _as_file(FileRole("weights", n, len(parts)), part) for n, part in enumerate(parts, 1)
    )
    version = _version([config, index, *parts])
    return _SplitAdapter(folder.url.text, version, folder.scope, files, shards)


def _shard_names(index: bytes) -> list[str]:
    """Return the names of the files in an index; none for invalid names, which `shards` refuses."""
    counts = {int(count) for count in _SHARD.findall(index)}
    if len(counts) != 1:
        return []
    (count,) = counts
    if count > MAX_SHARDS:
        raise AdapterFormatError(
            f"{INDEX_FILE.file_name}: weights in {count:,} files, over the limit of"
            f" {MAX_SHARDS}; save the adapter in larger ones"
        )
    return [f"adapter_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _as_file(role: FileRole, answer: ProbeResult) -> RemoteFile:
    expected = sent_sha256(answer.fields)
    return RemoteFile(role, answer.target, answer.validators.size, expected, answer=answer)


def _version(answers: Sequence[ProbeResult]) -> str:
    lines = [_strong_name(answer) or _description(answer) for answer in answers]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]
    return digest if all(_strong(answer.validators) for answer in answers) else f"{WEAK}{digest}"


def _count_needed_bytes(start: memoryview, validators: Validators) -> int:
    """Return the end of the header; without a strong ETag all first bytes count for the version."""
    return header_end(start) if _strong(validators) else FIRST_BYTES


def _strong(validators: Validators) -> str | None:
    """Return the ETag if it is strong and well-formed."""
    etag = validators.etag or ""
    return etag if _STRONG.fullmatch(etag) else None


def _strong_name(answer: ProbeResult) -> str | None:
    """Return the text that names the file's bytes; None without a strong ETag."""
    etag, version_id = _strong(answer.validators), answer.fields.get("x-amz-version-id", "")
    return None if etag is None else f"{answer.target.name} {etag} {version_id}"


def _description(answer: ProbeResult) -> str:
    """Return all that the probe shows of the file."""
    validators, digest = answer.validators, hashlib.sha256(answer.start).hexdigest()
    fields = (validators.size, validators.etag, validators.modified)
    return repr((answer.target.name, *fields, digest))


def _check_revision(revision: str | None, located: LocatedAdapter, etag: str | None) -> None:
    names = {located.version, etag, etag and etag.strip('"')}
    if revision is not None and revision not in names:
        raise AnotherVersionError(
            f"revision {shorten(revision, 100)!r} is not the version behind the URL now, which is"
            f" {located.version}; a URL has no other"
        )
