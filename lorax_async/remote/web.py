"""The backend of folders behind http(s) URLs: a version is a digest of the files' ETags."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from lorax_async.concurrency import outcome
from lorax_async.config import Limits
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    shorten,
)
from lorax_async.formats.digests import sent_sha256
from lorax_async.formats.safetensors import header_end
from lorax_async.formats.split_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.http.range_engine import ProbeRequest, RangeEngine
from lorax_async.http.settings import Rules
from lorax_async.http.target import ProbeResult, Target, Validators
from lorax_async.ids import WebFolder
from lorax_async.remote.base import (
    FIRST_BYTES,
    WEAK,
    AnotherVersionError,
    LocatedAdapter,
    RemoteFile,
    require_token,
)
from lorax_async.types import AdapterRef
from lorax_async.urls import Url

MAX_INDEX_BYTES = 2 << 20
MAX_SHARDS = 256

_VERSION = re.compile(f"({WEAK})?[0-9a-f]{{40}}")
_STRONG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]+"')
_SHARD = re.compile(rb'"adapter_model-[0-9]{5}-of-([0-9]{5})\.safetensors"')


class WebBackend:
    """The `Backend` of adapters in folders behind URLs, `http(s)://host[:port]/folder/`.

    A token is sent as `Authorization: Bearer …`, to the URL's own origin only. `rules` say where
    requests and redirects may go. The maker of `engine` closes it.
    """

    def __init__(self, engine: RangeEngine, rules: Rules, limits: Limits) -> None:
        self._engine = engine
        self._rules = rules
        self._limits = limits

    def is_version(self, revision: str) -> bool:
        """See `Backend`. An ETag is no version: the server has to be asked."""
        return _VERSION.fullmatch(revision) is not None

    async def scope(self, place: WebFolder, ref: AdapterRef) -> str:
        if require_token(ref.token) is None:
            return ""
        text = f"{place.url.origin}\n{ref.token}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    async def locate(self, place: WebFolder, ref: AdapterRef) -> LocatedAdapter:
        """Probe the config and the weights, both at once.

        `ref.revision` is the required version, or the ETag of its weights. Raise
        `AnotherVersionError` for another version, `AdapterNotFoundError` for a missing file, and
        the engine's errors.
        """
        token = require_token(ref.token)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with ExitStack() as sent:
            folder = _Folder(self._engine, place.url, headers, self._rules, self._limits, sent)
            first, second = folder.probe(CONFIG_FILE), folder.probe(WEIGHTS_FILE)
            config = await outcome(first.done)
            try:
                weights = await outcome(second.done)
            except AdapterNotFoundError:
                answers = {CONFIG_FILE: config, **await folder.probe_split_weights()}
                etag = None  # the index's own ETag does not name the weights' bytes
            else:
                answers = {CONFIG_FILE: config, WEIGHTS_FILE: weights}
                etag = _strong(weights.validators)
        version = _version(list(answers.values()))
        names = {version, etag, etag and etag.strip('"')}
        if ref.revision is not None and ref.revision not in names:
            raise AnotherVersionError(
                f"revision {shorten(ref.revision, 100)!r} is not the version behind the URL now,"
                f" which is {version}; a URL has no other"
            )
        files = tuple(
            RemoteFile(
                role,
                answer.target,
                answer.validators.size,
                sent_sha256(answer.fields),
                answer=answer,
            )
            for role, answer in answers.items()
        )
        # Its requests end by themselves, after this one's.
        again = partial(_Recheck, replace(folder, sent=None), list(answers.items()))
        scope = await self.scope(place, ref)
        return LocatedAdapter(place.text, version, scope, files, again)

    async def shards(
        self,
        place: WebFolder,  # noqa: ARG002 - the port's
        located: LocatedAdapter,
        roles: Sequence[FileRole],
    ) -> tuple[RemoteFile, ...]:
        """Return the files that `locate` probed: the version is theirs too."""
        shards = {file.role: file for file in located.files[2:]}
        if shards.keys() != set(roles):
            raise AdapterFormatError(
                f"{INDEX_FILE.file_name}: its weights are not in {len(roles)} files named"
                f" adapter_model-00001-of-{len(roles):05d}.safetensors and so on; save it again"
            )
        return tuple(shards[role] for role in roles)


@dataclass(frozen=True, slots=True)
class _Folder:
    """Probes files of one folder. The end of `sent` cancels what is not done.

    It does not wait: the engine's threads leave their sockets by themselves.
    """

    engine: RangeEngine
    url: Url
    headers: Mapping[str, str] = field(repr=False)
    """They may hold a token."""

    rules: Rules
    limits: Limits
    sent: ExitStack | None

    def probe(self, role: FileRole, nbytes: int = FIRST_BYTES) -> ProbeRequest:
        """Request the first `nbytes` of weights, or all of a config or an index."""
        url = Url(self.url.origin, f"{self.url.target}{role.file_name}")
        target = Target(url, role.file_name, self.headers, self.rules)
        if role.kind == "weights":
            needed = _count_needed_bytes if nbytes == FIRST_BYTES else None
            request = self.engine.probe(target, nbytes, needed_bytes=needed)
        else:
            most = MAX_INDEX_BYTES if role == INDEX_FILE else self.limits.max_config_bytes
            request = self.engine.probe(target, most, ranged=False)
        if self.sent is not None:
            self.sent.callback(_cancel, request)
        return request

    async def probe_split_weights(self) -> dict[FileRole, ProbeResult]:
        """Return the answers for the index and all files that it names."""
        try:
            index = await outcome(self.probe(INDEX_FILE).done)
        except AdapterNotFoundError as error:
            raise AdapterNotFoundError(
                f"the folder at {self.url} has neither {WEIGHTS_FILE.file_name} nor"
                f" {INDEX_FILE.file_name}; nothing else is read"
            ) from error
        requests = {role: self.probe(role) for role in _shard_roles(index.start)}
        shards = {role: await outcome(request.done) for role, request in requests.items()}
        return {INDEX_FILE: index, **shards}


class _Recheck:
    """Second answers for the files of a folder, requested when this is made. See `Recheck`.

    Of weights with a strong ETag a byte is enough; others are compared by all that was seen.
    """

    def __init__(self, folder: _Folder, answers: Sequence[tuple[FileRole, ProbeResult]]) -> None:
        self._folder = folder
        self._answers = answers
        self._requests = self._request()

    def _request(self) -> list[ProbeRequest]:
        return [
            self._folder.probe(role, 1 if _strong(answer.validators) else FIRST_BYTES)
            for role, answer in self._answers
        ]

    async def __call__(self) -> bool:
        requests, self._requests = self._requests or self._request(), []
        try:
            again = [await outcome(request.done) for request in requests]
        except (AdapterNotFoundError, IntegrityError):
            return False
        first = [answer for _, answer in self._answers]
        return [_name(answer) for answer in again] == [_name(answer) for answer in first]


def _cancel(request: ProbeRequest) -> None:
    if not request.done.done():
        request.cancel(FetchError("no caller waits for the answer any more"))


def _shard_roles(index: bytes) -> list[FileRole]:
    """Return the files that an index names; none for invalid names, which `shards` refuses."""
    counts = {int(count) for count in _SHARD.findall(index)}
    if len(counts) != 1:
        return []
    (count,) = counts
    if count > MAX_SHARDS:
        raise AdapterFormatError(
            f"{INDEX_FILE.file_name}: weights in {count:,} files, over the limit of"
            f" {MAX_SHARDS}; save the adapter in larger ones"
        )
    return [FileRole("weights", number, count) for number in range(1, count + 1)]


def _version(answers: Sequence[ProbeResult]) -> str:
    lines = [_name(answer) for answer in answers]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]
    return digest if all(_strong(answer.validators) for answer in answers) else f"{WEAK}{digest}"


def _name(answer: ProbeResult) -> str:
    """Return the text that names the file's bytes, or else describes them."""
    return _strong_name(answer) or _description(answer)


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
