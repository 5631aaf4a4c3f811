"""obstore's errors as ours. Its texts may hold URLs, keys and answers, and are not passed on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorax_async.errors import AccessDeniedError, FetchError, FetchTimeoutError

_STATUS = re.compile(r"status(?: code)?: ([1-5][0-9]{2})\b")
_AGAIN = frozenset({408, 425, 429})
_DENIED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class _Sign:
    """A word by which a cause is known, and what is said instead."""

    word: str
    says: str
    retryable: bool


_SIGNS = (
    _Sign(
        "BadScheme",
        "its endpoint is plain http; set AWS_ALLOW_HTTP, GOOGLE_ALLOW_HTTP or AZURE_ALLOW_HTTP to"
        " true, if that is meant",
        retryable=False,
    ),
    _Sign("configured region", "its region is another one; set AWS_REGION", retryable=False),
    _Sign("ertificate", "its certificate is not trusted", retryable=False),
    _Sign("dns error", "there is no such host", retryable=True),
    _Sign("onnection refused", "it refuses connections", retryable=True),
)


def mapped(error: Exception, what: str) -> FetchError:
    """What is raised for any error of obstore but that nothing was found."""
    from obstore import exceptions  # noqa: PLC0415 - an extra, needed here alone

    denied = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    if isinstance(error, denied):
        return _denied(what)
    text = str(error)
    for sign in _SIGNS:
        if sign.word in text:
            return FetchError(f"{what}: {sign.says}", retryable=sign.retryable, stage="resolve")
    if "TimedOut" in text or "timed out" in text:
        return FetchTimeoutError(f"{what}: the store did not answer in time", stage="resolve")
    return _by_status(_STATUS.search(text), what)


def _by_status(found: re.Match[str] | None, what: str) -> FetchError:
    if found is None:
        kind = "the store could not be asked; are there credentials in the environment?"
        return FetchError(f"{what}: {kind}", stage="resolve")
    status = int(found[1])
    if status in _DENIED:
        return _denied(what)
    retryable = status >= 500 or status in _AGAIN
    return FetchError(f"{what}: status {status}", retryable=retryable, stage="resolve")


def _denied(what: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{what}: the environment's credentials may not have it, or are wrong", stage="resolve"
    )
