"""The backend of folders behind http(s) URLs: a version is a digest of the files' ETags."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lorax_async.concurrency import outcome
from lorax_async.config import Limits
from lorax_async.errors import AdapterNotFoundError, shorten
from lorax_async.formats.digests import sent_sha256
from lorax_async.formats.peft_names import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_PROBLEM,
    WEIGHTS_FILE,
    split_weights_error,
)
from lorax_async.formats.safetensors import header_end
from lorax_async.http.download_scheduler import Job
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.settings import Rules
from lorax_async.http.target import ProbeResult, Target, Validators
from lorax_async.ids import WebFolder
from lorax_async.remote.base import (
    FIRST_BYTES,
    WEAK,
    AnotherVersionError,
    LocatedAdapter,
    Recheck,
    RemoteFile,
    cancel_unfinished,
    require_token,
)
from lorax_async.types import AdapterRef
from lorax_async.urls import Url

_VERSION = re.compile(f"({WEAK})?[0-9a-f]{{40}}")
_STRONG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]+"')


class WebBackend:
    """The `Backend` of adapters in folders behind URLs, `http(s)://host[:port]/folder/`.

    A token is sent as `Authorization: Bearer …`, to the URL's own origin only. `rules` say where
    requests and redirects may go. The maker of `downloader` closes it. With `convert_bin`,
    `PICKLE_FILE` is located where there are no other weights.
    """

    def __init__(
        self,
        downloader: RangeDownloader,
        rules: Rules,
        limits: Limits,
        *,
        convert_bin: bool = False,
    ) -> None:
        self._downloader = downloader
        self._rules = rules
        self._limits = limits
        self._convert_bin = convert_bin

    def is_version(self, revision: str) -> bool:
        """See `Backend`. An ETag is no version: the server has to be asked."""
        return _VERSION.fullmatch(revision) is not None

    async def scope(self, location: WebFolder, ref: AdapterRef) -> str:
        if require_token(ref.token) is None:
            return ""
        text = f"{location.url.origin}\n{ref.token}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    async def locate(self, location: WebFolder, ref: AdapterRef) -> LocatedAdapter:
        """Probe the config and the weights, both at once.

        `ref.revision` is the required version, or the ETag of its weights. Raise
        `AnotherVersionError` for another version, `AdapterNotFoundError` for a missing file,
        `UnsupportedAdapterError` for an index in place of the weights, and the downloader's errors.
        """
        token = require_token(ref.token)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        folder = _Folder(self._downloader, location.url, headers, self._rules, self._limits)
        config, weights = await folder.first_answers(convert_bin=self._convert_bin)
        version, etag = _version((config, weights)), _strong(weights.validators)
        names = {version, etag, etag and etag.strip('"')}
        if ref.revision is not None and ref.revision not in names:
            raise AnotherVersionError(
                f"revision {shorten(ref.revision, 100)!r} is not the version behind the URL now,"
                f" which is {version}; a URL has no other"
            )
        name = weights.target.name
        files = _remote_file(CONFIG_FILE, config), _remote_file(name, weights)
        # Of weights with a strong ETag a byte is enough; others are compared by all that was seen.
        again = partial(folder.request, 1 if etag else FIRST_BYTES, name)
        named = [_name(config), _name(weights)]
        recheck = Recheck(again, lambda answers: [*map(_name, answers)] == named)
        return LocatedAdapter(
            location.text, version, await self.scope(location, ref), files, recheck
        )

    async def find_files(
        self, location: WebFolder, ref: AdapterRef, names: Sequence[str]
    ) -> list[RemoteFile]:
        """See `Backend`. A folder has no list of its files, so request the first byte of each."""
        token = require_token(ref.token)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        folder = _Folder(self._downloader, location.url, headers, self._rules, self._limits)
        return await folder.find(names)


@dataclass(frozen=True, slots=True)
class _Folder:
    """Probes files of one folder."""

    downloader: RangeDownloader
    url: Url
    headers: Mapping[str, str] = field(repr=False)
    """They may hold a token."""

    rules: Rules
    limits: Limits

    async def first_answers(self, *, convert_bin: bool) -> tuple[ProbeResult, ProbeResult]:
        """Return those for the config and the weights, or the pickle with `convert_bin`."""
        requests = self.request()
        config, weights = requests
        try:
            first = await outcome(config.done)
            try:
                return first, await outcome(weights.done)
            except AdapterNotFoundError:
                nbytes = FIRST_BYTES if convert_bin else 1
                requests += self._probe(INDEX_FILE, 1), self._probe(PICKLE_FILE, nbytes)
                return first, await self._pickle(*requests[-2:], convert_bin=convert_bin)
        finally:
            cancel_unfinished(requests)

    def request(
        self, nbytes: int = FIRST_BYTES, weights: str = WEIGHTS_FILE
    ) -> list[Job[ProbeResult]]:
        """Request the config, and the first bytes of the weights."""
        is_first = nbytes == FIRST_BYTES and weights == WEIGHTS_FILE
        needed = _count_needed_bytes if is_first else None
        return [
            self._probe(CONFIG_FILE, self.limits.max_config_bytes, ranged=False),
            self._probe(weights, nbytes, needed_bytes=needed),
        ]

    async def find(self, names: Sequence[str]) -> list[RemoteFile]:
        """Return those of `names` that the folder has."""
        requests, found = [self._probe(name, 1) for name in names], []
        try:
            for name, request in zip(names, requests, strict=True):
                with suppress(AdapterNotFoundError):
                    answer = await outcome(request.done)
                    etag = _strong(answer.validators)
                    found.append(replace(_remote_file(name, answer), answer=None, etag=etag))
        finally:
            cancel_unfinished(requests)
        return found

    def _probe(self, name: str, nbytes: int, **options: Any) -> Job[ProbeResult]:
        """Request a file as `RangeDownloader.probe` does."""
        url = Url(self.url.origin, f"{self.url.target}{name}")
        target = Target(url, name, self.headers, self.rules)
        return self.downloader.probe(target, nbytes, **options)

    async def _pickle(
        self, index: Job[ProbeResult], pickle: Job[ProbeResult], *, convert_bin: bool
    ) -> ProbeResult:
        """Return the answer for the pickle of a folder without other weights, or raise."""
        where = f"the folder at {self.url}"
        with suppress(AdapterNotFoundError):
            await outcome(index.done)
            raise split_weights_error(where)
        try:
            found = await outcome(pickle.done)
        except AdapterNotFoundError:
            raise AdapterNotFoundError(
                f"{where} has no {WEIGHTS_FILE}; nothing else is read"
            ) from None
        if not convert_bin:
            raise AdapterNotFoundError(
                f"{where} has its weights as {PICKLE_FILE} only, {PICKLE_PROBLEM}"
            )
        return found


def _remote_file(name: str, answer: ProbeResult) -> RemoteFile:
    size, digest = answer.validators.size, sent_sha256(answer.fields)
    return RemoteFile(name, answer.target, size, digest, answer=answer)


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
