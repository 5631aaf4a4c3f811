"""Queries to the hub through huggingface_hub, with its errors mapped to ours. Blocks.

Its errors contain URLs, headers and responses, which may be secret, so none is chained.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterNotFoundError,
    FetchError,
    FetchTimeoutError,
    InvalidAdapterIdError,
    LoraxError,
    UsageError,
    shorten,
)
from lorax_async.formats.digests import Digest
from lorax_async.http.failures import RetryableError, io_error, lookup_error, retry_after_of
from lorax_async.http.settings import Rules
from lorax_async.urls import InvalidUrlError, Url, parse_url

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_DENIED = frozenset({401, 403, 407, 451})
_ABSENT = frozenset({404, 410})
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_REMEDY = (
    "give a token that may read it (or log in on this machine, hf auth login, and let its token be"
    " used: use_token=True)"
)


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def digest_of_etag(etag: str | None) -> Digest | None:
    """Return the digest that an ETag of the hub (without quotes) or a blob's name stands for.

    It is the sha256 of a large file, and git's blob id of another. None if it is neither, as a
    mirror's ETag may be.
    """
    if etag is not None and _SHA256.fullmatch(etag):
        return Digest("sha256", etag)
    if etag is not None and _COMMIT.fullmatch(etag):
        return Digest("git-sha1", etag)
    return None


@dataclass(frozen=True, slots=True)
class FileQuery:
    """A query about one file on the hub."""

    source: str
    name: str
    revision: str
    endpoint: str | None
    token: str | None = field(repr=False)
    rules: Rules = field(repr=False, compare=False)
    timeout: float


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The hub's answer: the file is in `commit`, and its bytes are at `location`.

    `redirected` is False if the requested URL answered itself.
    """

    commit: str
    nbytes: int | None
    expected: Digest | None
    location: Url | None = field(repr=False)
    redirected: bool


@dataclass(frozen=True, slots=True)
class MissingFile:
    """There is no such file, in this commit if the hub named one."""

    commit: str | None


Outcome = FileInfo | MissingFile | LoraxError


def require_token(token: str | None) -> str | None:
    """Return the token. Raise `UsageError` if it is malformed; an empty one does not mean None."""
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError(
            "the hub's token is empty, or has characters that no token has; leave it out (None) to"
            " send none, or this machine's own with use_token"
        )
    return token


def endpoint_in_use(endpoint: str | None) -> str:
    from huggingface_hub import constants  # noqa: PLC0415 (slow)

    return endpoint or constants.ENDPOINT


def machine_token() -> str | None:
    """Return the token that huggingface_hub sends by default. May renew it over the network."""
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub.errors import DeviceCodeError, OIDCError  # noqa: PLC0415

    # Documented but not declared: the module imports it lazily.
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        header = build_hf_headers().get("authorization", "")
    except (OIDCError, DeviceCodeError, httpx2.HTTPError, OSError, ValueError) as error:
        raise AccessDeniedError(
            f"this machine's own token of the hub cannot be read ({type(error).__name__}); log in"
            " again (hf auth login), or pass a token",
            stage="resolve",
        ) from None
    return require_token(header.removeprefix("Bearer ") or None)


def has_stored_token() -> bool:
    """Return whether this machine has a token, even one that must not be sent, or is broken."""
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub import get_token  # noqa: PLC0415
    from huggingface_hub.errors import DeviceCodeError, OIDCError  # noqa: PLC0415

    try:
        return get_token() is not None
    except (OIDCError, DeviceCodeError, httpx2.HTTPError, OSError, ValueError):
        return True


def url_of(source: str, name: str, revision: str, endpoint: str | None) -> Url:
    """Return the URL of a file of a repository. Raise `InvalidAdapterIdError`."""
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 (slow)

    try:
        return parse_url(hf_hub_url(source, name, revision=revision, endpoint=endpoint))
    except ValueError:
        raise InvalidAdapterIdError(
            f"the hub has no such ids or revisions as {shorten(source, 200)!r} at"
            f" {shorten(revision, 200)!r}"
        ) from None


def query_file(query: FileQuery) -> Outcome:
    """Query the hub about one file. Return errors; never raise one."""
    try:
        url = url_of(query.source, query.name, query.revision, query.endpoint)
        if not query.rules.allows(url, 0):
            return AccessDeniedError(
                f"requests to {url} are not allowed; allow it explicitly", stage="resolve"
            )
        return _query(query, url)
    except LoraxError as error:
        return error


def _query(query: FileQuery, url: Url) -> FileInfo | MissingFile:
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub import get_hf_file_metadata  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError  # noqa: PLC0415

    try:
        token, endpoint = query.token or False, query.endpoint
        metadata = get_hf_file_metadata(
            url.text, token=token, timeout=query.timeout, endpoint=endpoint
        )
    except RemoteEntryNotFoundError as error:
        return MissingFile(_commit_of(error))
    except HfHubHTTPError as error:
        if error.response.status_code in _ABSENT and "X-Error-Code" not in error.response.headers:
            return MissingFile(_commit_of(error))  # a mirror, or a server of files
        raise problem_of(error, query, url) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise problem_of(error, query, url) from None
    if metadata.commit_hash is None or not is_commit(metadata.commit_hash):
        raise FetchError(
            f"{url} names no commit in its responses: it is no hub; check the endpoint",
            stage="resolve",
            retryable=False,
        )
    nbytes = None if metadata.size is None or metadata.size < 0 else metadata.size
    return FileInfo(
        metadata.commit_hash,
        nbytes,
        digest_of_etag(metadata.etag),
        _location(metadata.location, url),
        redirected=metadata.location != url.text,
    )


def fetch_repository_id(query: FileQuery) -> str | LoraxError:
    """Return the id of the repository that answers to `query.source` and has its commit.

    A moved repository has another id. Return errors; never raise one.
    """
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        url = url_of(query.source, query.name, query.revision, query.endpoint)
        hub, token = HfApi(endpoint=query.endpoint), query.token or False
        info = hub.model_info(
            query.source, revision=query.revision, timeout=query.timeout, token=token
        )
    except LoraxError as error:
        return error
    except (HfHubHTTPError, httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        return problem_of(error, query, url)
    except (TypeError, KeyError, AttributeError):
        info = None
    if info is None or not isinstance(info.id, str) or info.sha != query.revision:
        return AccessDeniedError(
            f"the hub does not say which repository answers for {query.source!r}, so the token"
            " of this machine is not lent to it; name the repository by its own id",
            stage="resolve",
        )
    return info.id


def _location(text: str, requested: Url) -> Url | None:
    """Return where a redirect led, if the range engine can send requests there."""
    try:
        location = parse_url(text)
    except InvalidUrlError:
        return None
    return location if location != requested else None


def _commit_of(error: HfHubHTTPError) -> str | None:
    commit = error.response.headers.get("X-Repo-Commit", "")
    return commit if is_commit(commit) else None


def problem_of(error: Exception, query: FileQuery, url: Url) -> AdapterError:
    """Return our error for one of huggingface_hub or its HTTP client."""
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415 (slow)

    if isinstance(error, HfHubHTTPError):
        return _refusal(error, query, url)
    return _failure(error, url)


def _refusal(error: HfHubHTTPError, query: FileQuery, url: Url) -> AdapterError:
    """Map an error response."""
    from huggingface_hub.errors import (  # noqa: PLC0415 (slow)
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    source, status = query.source, error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        revision = shorten(query.revision, 200)
        return AdapterNotFoundError(f"{source!r} on {url} has no revision {revision!r}")
    if isinstance(error, GatedRepoError):
        return _denied_error(
            f"{source!r} on {url} is gated: accept its conditions there, and {_REMEDY}"
        )
    if isinstance(error, RepositoryNotFoundError) and status != 403:
        if query.token is None and status == 401:
            return _denied_error(
                f"{url} shows no {source!r} without a token: check the id, or if it is"
                f" private {_REMEDY}"
            )
        if status != 401:
            return AdapterNotFoundError(f"{url} has no {source!r}, or none that the token may see")
    if status in _DENIED:
        token = "without a token" if query.token is None else "with this token"
        return _denied_error(f"{url} refuses {source!r} {token} (status {status}); {_REMEDY}")
    return _by_status(error, f"{query.name} of {source!r} at {url}: status {status}")


def _by_status(error: HfHubHTTPError, problem: str) -> AdapterError:
    if error.response.status_code not in _AGAIN:
        return FetchError(
            f"{problem}, which is no answer to the request", stage="resolve", retryable=False
        )
    return FetchError(problem, stage="resolve", retry_after=_retry_after(error))


def _retry_after(error: HfHubHTTPError) -> float | None:
    """Return seconds by `Retry-After`, or by the hub's own rate limit fields."""
    # Documented but not declared: the module imports it lazily.
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    fields = error.response.headers
    after = retry_after_of(fields.get("retry-after", ""), time.time())
    if after is None and error.response.status_code == 429:
        limit = parse_ratelimit_headers(fields)
        if limit is not None and limit.remaining == 0:
            return float(limit.reset_in_seconds)
    return after


def _denied_error(problem: str) -> AccessDeniedError:
    return AccessDeniedError(problem, stage="resolve")


def _failure(error: Exception, url: Url) -> AdapterError:
    """Map a request without a response."""
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415

    if isinstance(error, OfflineModeIsEnabled):
        return FetchError(
            "huggingface_hub is set to be offline (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)",
            stage="resolve",
            retryable=False,
        )
    if isinstance(error, httpx2.TimeoutException):
        return FetchTimeoutError(f"{url} did not answer in time", stage="resolve")
    system = next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)
    if isinstance(system, socket.gaierror):
        mapped = lookup_error(system, url.origin.host)
    elif system is not None:
        mapped = io_error(system, str(url))
    else:
        what = type(error).__name__
        retryable = isinstance(error, httpx2.TransportError)
        mapped = FetchError(f"the request to {url} failed ({what})", retryable=retryable)
    reason = mapped.error if isinstance(mapped, RetryableError) else mapped
    return reason.located(stage="resolve")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
