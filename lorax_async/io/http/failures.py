"""What goes wrong on the way, as errors of this package; no text holds a URL's path or a secret."""

from __future__ import annotations

import errno
import socket
import ssl

from lorax_async.errors import AccessDeniedError, AdapterError, FetchError, FetchTimeoutError


class AbortedError(Exception):
    """Somebody else ended this attempt: its download was cancelled or failed, or needs it not."""


class SetbackError(Exception):
    """An attempt failed, and another one may succeed.

    Attributes
    ----------
    error
        What the caller sees if no other one is made.
    retry_after
        Seconds that the source asked for.
    crowded
        The source has too much to do, maybe because of us: use fewer connections.
    """

    def __init__(
        self, error: AdapterError, *, retry_after: float | None = None, crowded: bool = False
    ) -> None:
        super().__init__(error.problem)
        self.error = error
        self.retry_after = retry_after
        self.crowded = crowded


class NoAnswerError(SetbackError):
    """A connection was closed before a response began, as idle ones are."""


_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


def failed_io(error: OSError, what: str) -> SetbackError | AdapterError:
    """For an `OSError` of sockets or TLS while `what` ("https://host") was asked."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessDeniedError(
            f"{what} showed a certificate that is not trusted ({error.verify_message}); if it is"
            " one of your own, name its authority by SSL_CERT_FILE or ca_bundle"
        )
    if isinstance(error, TimeoutError | BlockingIOError):
        return timed_out(f"{what} did not answer in time")
    if error.errno in _DESCRIPTORS:
        code = errno.errorcode[error.errno or 0]
        return SetbackError(
            FetchError(
                f"no socket for {what} ({code}): the process has too many files open; raise its"
                " limit (ulimit -n) or use fewer connections"
            )
        )
    if isinstance(error, ssl.SSLError):
        return SetbackError(FetchError(f"TLS with {what} failed ({error.reason or 'no reason'})"))
    return SetbackError(FetchError(f"the connection to {what} failed ({_code(error)})"))


def failed_lookup(error: OSError, host: str) -> SetbackError | AdapterError:
    """For an `OSError` of looking up a name."""
    problem = f"the host {host!r} cannot be found ({_lookup_code(error)})"
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_NONAME:
        return SetbackError(FetchError(problem))
    return FetchError(f"{problem}; check its spelling and this machine's name service")


def timed_out(problem: str) -> SetbackError:
    return SetbackError(FetchTimeoutError(problem))


def broken_off(what: str) -> SetbackError:
    return SetbackError(FetchError(f"{what} closed the connection before all was sent"))


def _code(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def _lookup_code(error: OSError) -> str:
    names = (name for name in dir(socket) if name.startswith("EAI_"))
    return next((name for name in names if getattr(socket, name) == error.errno), _code(error))
