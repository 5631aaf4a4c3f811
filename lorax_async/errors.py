"""All errors that callers of this package see; docs/errors.md has texts and remedies.

Pure code raises an error with its problem alone; the driver adds adapter, attempt and story by
`LoraxError.located` before a caller sees it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

Stage = Literal["queue", "resolve", "fetch", "verify", "stage", "copy", "ready"]
"""An adapter's stage; errors, events and statistics use the same words."""

MAX_TEXT = 1_000


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """Cut untrusted text to `limit` printable characters."""
    clean = text
    if not text.isprintable():
        clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def shorten_repr(value: object, limit: int = 100) -> str:
    """Return the `repr` of an argument, cut; Python refuses to format integers of 4,301 digits."""
    try:
        return shorten(repr(value), limit)
    except ValueError:
        return f"a {type(value).__name__} too long to show"


def install_command(extra: str) -> str:
    """Return how to install an extra: the package is not on PyPI yet."""
    return f"in a clone of lorax-async, run: pip install '.[{extra}]'"


class LoraxError(Exception):
    """Base of all errors of this package.

    `problem` is what is wrong and what to do; `id`, `key`, `attempt` and `stage` are where it
    happened; `retryable` tells whether the same call may succeed later, `retry_after` after how
    many seconds, if the source named them; `story` is what happened to the adapter before.
    """

    retryable_by_default: ClassVar[bool] = False
    default_stage: ClassVar[Stage | None] = None

    def __init__(
        self,
        problem: str,
        *,
        id: str | None = None,
        key: object | None = None,
        attempt: int = 0,
        stage: Stage | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        story: Sequence[object] = (),
    ) -> None:
        self.problem = shorten(problem)
        super().__init__(self.problem)
        self.id = id
        self.key = key
        self.attempt = attempt
        self._own_stage = stage
        self.stage: Stage | None = stage or self.default_stage
        self.retryable = self.retryable_by_default if retryable is None else retryable
        self.retry_after = retry_after
        self.story = tuple(story)

    def __str__(self) -> str:
        where = []
        if self.id is not None:
            where.append(f"adapter {shorten(self.id, 200)!r}")
        if self.stage is not None:
            where.append(f"stage {self.stage}")
        return shorten(f"{', '.join(where)}: {self.problem}" if where else self.problem)

    def located(
        self,
        *,
        id: str | None = None,
        key: object | None = None,
        attempt: int | None = None,
        stage: Stage | None = None,
        story: Sequence[object] = (),
    ) -> Self:
        """Return a copy with the adapter's data.

        Each waiter raises its own copy, for raising adds frames to the traceback. A stage passed at
        construction stays; `stage` replaces the class's default only.
        """
        copy = type(self)(
            self.problem,
            id=id if id is not None else self.id,
            key=key if key is not None else self.key,
            attempt=self.attempt if attempt is None else attempt,
            stage=self._own_stage or stage,
            retryable=self.retryable,
            retry_after=self.retry_after,
            story=story or self.story,
        )
        copy.__cause__ = self.__cause__
        return copy

    def prefixed(self, prefix: str) -> Self:
        """Return a copy whose problem begins with `prefix`."""
        return self.reworded(f"{prefix}{self.problem}")

    def reworded(self, problem: str) -> Self:
        """Return a copy with another text."""
        copy = self.located()
        copy.problem = shorten(problem)
        copy.args = (copy.problem,)
        return copy


class AdapterError(LoraxError):
    """Something is wrong with one adapter; others are not affected."""


class AdapterNotFoundError(AdapterError):
    """There is no such adapter where the id points."""

    default_stage = "resolve"


class AdapterTimeoutError(AdapterError, TimeoutError):
    """The deadline passed, in `stage`. Other waiters are not affected."""

    retryable_by_default = True


class FetchError(AdapterError):
    """The adapter's bytes could not be read."""

    retryable_by_default = True
    default_stage = "fetch"


class EvictedError(FetchError):
    """The file was evicted from the disk cache before it was read; a load fetches it again."""


class FetchTimeoutError(FetchError, TimeoutError):
    """A source did not answer in time."""


class IntegrityError(FetchError):
    """The bytes do not match their digest or size, or changed while they were read."""


class SavedDuringLoadError(IntegrityError):
    """The adapter's files were saved while it was loaded, and again during the retry."""


class AccessDeniedError(FetchError):
    """The source, or the operator's rules, do not let this caller read the adapter."""

    retryable_by_default = False


class AdapterFormatError(AdapterError):
    """A file of the adapter is malformed."""

    default_stage = "verify"


class UnsafeFileError(AdapterError):
    """A pickle holds more than tensors, or reading it went over a limit; it was not run."""

    default_stage = "verify"


class UnsupportedAdapterError(AdapterError):
    """The adapter uses a feature that plain `base + scale * B @ A` does not describe."""

    default_stage = "verify"


class IncompatibleAdapterError(AdapterError):
    """The adapter does not fit the base model's layout."""

    default_stage = "verify"


class TransferError(AdapterError):
    """Bytes could not be moved to the device."""

    retryable_by_default = True
    default_stage = "copy"


class CapacityError(LoraxError):
    """There is not enough room, and waiting does not free any."""

    retryable_by_default = True
    default_stage = "queue"


class UsageError(LoraxError):
    """The call itself is wrong."""


class InvalidAdapterIdError(UsageError):
    """The text is not an adapter id."""

    default_stage = "resolve"


class AdapterInUseError(UsageError):
    """The adapter has open leases."""

    retryable_by_default = True
    default_stage = "ready"


class LoaderClosedError(UsageError):
    """The loader or store is closed, or closing."""


class HandleClosedError(UsageError):
    """The handle was released, or its lease revoked."""


class ConfigError(UsageError):
    """A setting is out of range or not available here."""


class InternalError(LoraxError):
    """A fault of this package; the cause is chained. Please report it with the story."""

    @classmethod
    def caused_by(
        cls,
        cause: BaseException,
        problem: str,
        *,
        key: object | None = None,
        stage: Stage | None = None,
    ) -> Self:
        """Make the error for an exception that is not expected where `problem` was tried."""
        error = cls(f"{problem}: {cause!r}", key=key, stage=stage)
        error.__cause__ = cause
        return error


class InvalidTransitionError(InternalError):
    """An outcome arrived that the transition table does not allow; nothing was changed."""


HTTP_STATUSES: tuple[tuple[type[LoraxError], int, str], ...] = (
    (AdapterNotFoundError, 404, "model_not_found"),
    (AccessDeniedError, 403, "model_access_denied"),
    (InvalidAdapterIdError, 400, "invalid_model_id"),
    (AdapterFormatError, 422, "adapter_malformed"),
    (UnsafeFileError, 422, "adapter_unsafe"),
    (UnsupportedAdapterError, 422, "adapter_unsupported"),
    (IncompatibleAdapterError, 422, "adapter_incompatible"),
    (CapacityError, 429, "over_capacity"),
    (LoaderClosedError, 503, "closing"),
    (HandleClosedError, 503, "closing"),  # only closing revokes leases
    (AdapterTimeoutError, 504, "timeout"),
    (FetchTimeoutError, 504, "timeout"),
    # The source is at fault: the client cannot correct its request.
    (SavedDuringLoadError, 503, "adapter_saved"),
    (IntegrityError, 502, "adapter_altered"),
    (EvictedError, 503, "evicted"),
    (FetchError, 502, "fetch_failed"),
    (AdapterInUseError, 409, "adapter_in_use"),
    (UsageError, 400, "invalid_request"),
    (TransferError, 500, "transfer_failed"),
)
"""A server's answers, by status and code: the first row whose class matches an error decides."""


def http_status(error: Exception) -> tuple[int, str] | None:
    """Return the status and code of a server's answer; None for a fault of the server itself."""
    return next(
        ((status, code) for kind, status, code in HTTP_STATUSES if isinstance(error, kind)), None
    )


def as_lorax_error(
    error: BaseException, problem: str, stage: Stage | None = None, key: object | None = None
) -> LoraxError:
    """Return a copy without frames, which refer to a file's bytes: stories keep errors.

    Other exceptions become the cause of a `CapacityError`, if the process has reached a limit of
    its own, or else of an `InternalError`.
    """
    if isinstance(error, LoraxError):
        return error.located()
    return exhausted(error, problem, stage=stage, key=key) or InternalError.caused_by(
        error, problem, key=key, stage=stage
    )


def class_name(error: BaseException) -> str:
    """Return the name of an error's class, or of the public one that an internal class refines."""
    public = (kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    return next(public, type(error)).__name__


def exhausted(
    error: BaseException, problem: str, *, stage: Stage | None = None, key: object | None = None
) -> CapacityError | None:
    """Return the error for an exception of a process without room; None for any other."""
    text = str(error)
    if isinstance(error, RuntimeError) and "start new thread" in text:
        limit = (
            "the process may start no more threads; raise its limit (ulimit -u or -v, the cgroup's"
            " pids.max), or lower io_threads and connections"
        )
    elif isinstance(error, MemoryError) or (
        getattr(error, "errno", None) == errno.ENOMEM
        if isinstance(error, OSError)
        else isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    ):
        limit = (
            "the process may have no more memory; raise its limit (ulimit -v, the cgroup's"
            " memory.max), or lower device_bytes, host_bytes, memory_bytes and io_threads"
        )
    else:
        return None
    short = CapacityError(f"{problem}: {limit}", stage=stage, key=key)
    short.__cause__ = error
    return short
