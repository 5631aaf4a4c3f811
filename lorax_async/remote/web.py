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
    AdapterError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    shorten,
)
from lorax_async.formats.digests import sent_sha256
from lorax_async.formats.peft_names import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    split_weights_error,
)
from lorax_async.formats.safetensors import header_end
from lorax_async.http.range_downloader import NeededBytes, ProbeRequest, RangeDownloader
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

_VERSION = re.compile(f"({WEAK})?[0-9a-f]{{40}}")
_STRONG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]+"')


class WebBackend:
    """The `Backend` of adapters in folders behind URLs, `http(s)://host[:port]/folder/`.

    A token is sent as `Authorization: Bearer …`, to the URL's own origin only. `rules` say where
    requests and redirects may go. The maker of `downloader` closes it.
    """

    def __init__(self, downloader: RangeDownloader, rules: Rules, limits: Limits) -> None:
        self._downloader = downloader
        self._rules = rules
        self._limits = limits

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
        with ExitStack() as sent:
            folder = _Folder(
                self._downloader, location.url, headers, self._rules, self._limits, sent
            )
            first, second = folder.probe_config(), folder.probe_weights()
            config = await outcome(first.done)
            try:
                weights = await outcome(second.done)
            except AdapterNotFoundError as error:
                raise await folder.missing_weights() from error
        version, etag = _version((config, weights)), _strong(weights.validators)
        names = {version, etag, etag and etag.strip('"')}
        if ref.revision is not None and ref.revision not in names:
            raise AnotherVersionError(
                f"revision {shorten(ref.revision, 100)!r} is not the version behind the URL now,"
                f" which is {version}; a URL has no other"
            )
        files = _remote_file(CONFIG_FILE, config), _remote_file(WEIGHTS_FILE, weights)
        # Its requests end by themselves, after this one's.
        again = partial(_Recheck, replace(folder, sent=None), (config, weights))
        scope = await self.scope(location, ref)
        return LocatedAdapter(location.text, version, scope, files, again)


@dataclass(frozen=True, slots=True)
class _Folder:
    """Probes files of one folder. The end of `sent` cancels what is not done.

    It does not wait: the downloader's threads leave their sockets by themselves.
    """

    downloader: RangeDownloader
    url: Url
    headers: Mapping[str, str] = field(repr=False)
    """They may hold a token."""

    rules: Rules
    limits: Limits
    sent: ExitStack | None

    def probe_config(self) -> ProbeRequest:
        return self._probe(CONFIG_FILE, self.limits.max_config_bytes, ranged=False)

    def probe_weights(self, nbytes: int = FIRST_BYTES) -> ProbeRequest:
        needed = _count_needed_bytes if nbytes == FIRST_BYTES else None
        return self._probe(WEIGHTS_FILE, nbytes, needed_bytes=needed)

    def _probe(
        self,
        name: str,
        nbytes: int,
        *,
        ranged: bool = True,
        needed_bytes: NeededBytes | None = None,
    ) -> ProbeRequest:
        """Request a file as `RangeDownloader.probe` does."""
        url = Url(self.url.origin, f"{self.url.target}{name}")
        target = Target(url, name, self.headers, self.rules)
        request = self.downloader.probe(target, nbytes, ranged=ranged, needed_bytes=needed_bytes)
        if self.sent is not None:
            self.sent.callback(_cancel, request)
        return request

    async def missing_weights(self) -> AdapterError:
        """Return the error for a folder without weights; ask whether it has an index."""
        where = f"the folder at {self.url}"
        try:
            await outcome(self._probe(INDEX_FILE, 1).done)
        except AdapterNotFoundError:
            return AdapterNotFoundError(f"{where} has no {WEIGHTS_FILE}; nothing else is read")
        return split_weights_error(where)


class _Recheck:
    """Second answers for config and weights, requested when this is made. See `Recheck`.

    Of weights with a strong ETag a byte is enough; others are compared by all that was seen.
    """

    def __init__(self, folder: _Folder, answers: tuple[ProbeResult, ProbeResult]) -> None:
        self._folder = folder
        self._answers = answers
        self._requests = self._request()

    def _request(self) -> list[ProbeRequest]:
        nbytes = 1 if _strong(self._answers[1].validators) else FIRST_BYTES
        return [self._folder.probe_config(), self._folder.probe_weights(nbytes)]

    async def __call__(self) -> bool:
        requests, self._requests = self._requests or self._request(), []
        try:
            again = [await outcome(request.done) for request in requests]
        except (AdapterNotFoundError, IntegrityError):
            return False
        finally:
            for request in requests:
                _cancel(request)  # no caller waits for what is not done
        return list(map(_name, again)) == list(map(_name, self._answers))

    def close(self) -> None:
        requests, self._requests = self._requests, []
        for request in requests:
            _cancel(request)


def _cancel(request: ProbeRequest) -> None:
    if not request.done.done():
        request.cancel(FetchError("no caller waits for the answer any more"))


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
