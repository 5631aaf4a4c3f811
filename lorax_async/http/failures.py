"""Map statuses and failures of sockets, TLS and name services to typed errors.

Their texts hold no path and no secret.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterNotFoundError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
)

_SECONDS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after how many seconds.

    Attributes
    ----------
    attempts
        Requests for one piece, the first included, that may fail without bringing much.
    base, most
        The first wait is up to `base`, each next one up to twice as long, and none above `most`.
    obeyed
        The longest wait that a source may ask for; what is longer ends the download at once.
    """

    attempts: int = 5
    base: float = 0.25
    most: float = 8.0
    obeyed: float = 30.0

    def wait(self, failed: int, draw: float, retry_after: float | None = None) -> float | None:
        """Seconds until the next attempt after `failed` ones; None if there shall be none.

        `draw` is drawn evenly from [0, 1): callers that failed together do not come back together.
        """
        if failed >= self.attempts or (retry_after or 0.0) > self.obeyed:
            return None
        longest = min(self.most, self.base * 2.0 ** min(failed - 1, 60))
        if retry_after is None:
            return draw * longest
        return retry_after + draw * min(longest, 1.0)


def retry_after_of(text: str, now: float) -> float | None:
    """Seconds that a `Retry-After` field means, at the time `now` since the epoch.

    None for what is neither seconds nor a date.
    """
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


class AbortedError(Exception):
    """Another thread ended this attempt: its job was cancelled, failed, or no longer needs it."""


class UnansweredError(ConnectionError):
    """The connection was closed before a byte of the response came."""


class RetryableError(Exception):
    """An attempt failed, and another one may succeed.

    Attributes
    ----------
    error
        Raised to the caller if there is no further attempt.
    retry_after
        Seconds that the source requested.
    throttled
        The source is overloaded, perhaps by this client: use fewer connections.
    """

    def __init__(
        self, error: AdapterError, *, retry_after: float | None = None, throttled: bool = False
    ) -> None:
        super().__init__(error.problem)
        self.error = error
        self.retry_after = retry_after
        self.throttled = throttled


_NO_RANGE = re.compile(r"bytes \*/([0-9]{1,18})")
DENIED = frozenset({401, 403, 407, 451})
MISSING = frozenset({404, 410})
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""What the statuses of all sources mean."""

_THROTTLED = frozenset({429, 503})


def status_error(
    status: int, fields: Mapping[str, str], what: str, *, size: int | None
) -> RetryableError | AdapterError:
    """Map a response's status; `size` is that of the file, if it is known."""
    problem = f"{what}: status {status}"
    if status in DENIED:
        return AccessDeniedError(f"{problem}; this caller may not have it, or needs a token")
    if status in MISSING:
        return AdapterNotFoundError(f"{problem}; there is no such file", stage="fetch")
    if status == 412:
        return changed_error(what)
    if status == 416:
        match = _NO_RANGE.fullmatch(fields.get("content-range", ""))
        if match is None or size is None:
            return IntegrityError(f"{what}: it is shorter than the requested range, or empty")
        if int(match[1]) != size:
            return changed_error(what)
        return FetchError(f"{what}: it refuses a range that it has")
    if status in RETRYABLE:
        after = retry_after_of(fields.get("retry-after", ""), time.time())
        error = FetchError(problem, retry_after=after)
        return RetryableError(error, retry_after=after, throttled=status in _THROTTLED)
    return FetchError(f"{problem}, which is no answer to the request", retryable=False)


class FileChangedError(IntegrityError):
    """The file is not the one of earlier responses."""


def changed_error(what: str) -> FileChangedError:
    return FileChangedError(f"{what}: the file changed while it was read; load it again")


_DESCRIPTOR_LIMITS = {errno.EMFILE, errno.ENFILE}


def io_error(error: OSError, peer: str) -> RetryableError | AdapterError:
    """Map an `OSError` of a socket or of TLS; `peer` is an origin ("https://host")."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessDeniedError(
            f"{peer} showed a certificate that is not trusted ({error.verify_message}); if it is"
            " one of your own, name its authority by SSL_CERT_FILE or ca_bundle"
        )
    if isinstance(error, TimeoutError | BlockingIOError):
        return timeout_error(f"{peer} did not answer in time")
    if isinstance(error, UnansweredError):
        return RetryableError(FetchError(f"{peer} closed the connection without an answer"))
    if error.errno in _DESCRIPTOR_LIMITS:
        code = errno.errorcode[error.errno or 0]
        return RetryableError(
            FetchError(
                f"no socket for {peer} ({code}): the process has too many files open; raise its"
                " limit (ulimit -n) or use fewer connections"
            )
        )
    if isinstance(error, ssl.SSLError):
        return RetryableError(FetchError(f"TLS with {peer} failed ({error.reason or 'no reason'})"))
    return RetryableError(FetchError(f"the connection to {peer} failed ({_code(error)})"))


def lookup_error(error: OSError, host: str) -> RetryableError | AdapterError:
    """Map an `OSError` of a name lookup."""
    codes = {getattr(socket, name): name for name in dir(socket) if name.startswith("EAI_")}
    code = codes.get(error.errno) or _code(error)
    problem = f"the host {host!r} cannot be found ({code})"
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_NONAME:
        return RetryableError(FetchError(problem))
    return FetchError(f"{problem}; check its spelling and this machine's name service")


def timeout_error(problem: str) -> RetryableError:
    """Wrap a `FetchTimeoutError`."""
    return RetryableError(FetchTimeoutError(problem))


def broken_off(peer: str) -> RetryableError:
    """Report a response that ended before its length."""
    return RetryableError(FetchError(f"{peer} closed the connection before all was sent"))


def _code(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
