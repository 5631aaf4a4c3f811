"""Every error a caller of this package can see; the texts and remedies are in docs/errors.md.

Pure code raises an error with its problem alone; the driver adds which adapter, which attempt and
the story (:meth:`LoraxError.located`) before a caller sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

Stage = Literal["queue", "resolve", "fetch", "verify", "stage", "copy", "ready"]
"""Where an adapter was when something happened: the same words in errors, events and statistics."""

MAX_TEXT = 1_000


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """Cut a text that may carry a stranger's names to `limit` printable characters."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def shorten_repr(value: object, limit: int = 100) -> str:
    """Return the `repr` of a caller's argument, cut; Python spells no integer of 4,301 digits."""
    try:
        return shorten(repr(value), limit)
    except ValueError:
        return f"a {type(value).__name__} too long to show"


class LoraxError(Exception):
    """Base of all errors of this package.

    `problem` says what is wrong and what to do; `id`, `key`, `attempt`, `stage` say where;
    `retryable` whether the same call may succeed later, and `retry_after` after how many seconds,
    if the source said so; `story` what had happened to the adapter.
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
        self._said_stage = stage
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
        """A copy that knows its adapter; each waiter gets its own, for raising collects frames.

        What the error said itself stays; `stage` counts where it only had its class's.
        """
        copy = self._again(
            id=id if id is not None else self.id,
            key=key if key is not None else self.key,
            attempt=self.attempt if attempt is None else attempt,
            stage=self._said_stage or stage,
            story=story or self.story,
        )
        copy.__cause__ = self.__cause__
        return copy

    def prefixed(self, words: str) -> Self:
        """A copy whose problem begins with `words`: which part of what was asked for it is."""
        copy = self.located()
        copy.problem = shorten(f"{words}{self.problem}")
        copy.args = (copy.problem,)
        return copy

    def _again(
        self,
        *,
        id: str | None,
        key: object | None,
        attempt: int,
        stage: Stage | None,
        story: Sequence[object],
    ) -> Self:
        return type(self)(
            self.problem,
            id=id,
            key=key,
            attempt=attempt,
            stage=stage,
            retryable=self.retryable,
            retry_after=self.retry_after,
            story=story,
        )


class AdapterError(LoraxError):
    """Something is wrong with one adapter; others are not affected."""


class AdapterNotFoundError(AdapterError):
    """There is no such adapter where the id points."""

    default_stage = "resolve"


class AdapterTimeoutError(AdapterError, TimeoutError):
    """The deadline passed; `stage` is the one it ran out in. Other waiters are not affected."""

    retryable_by_default = True


class FetchError(AdapterError):
    """The adapter's bytes could not be read."""

    retryable_by_default = True
    default_stage = "fetch"


class EvictedError(FetchError):
    """Its file made room in the disk cache before it was read; a load fetches it again itself."""


class FetchTimeoutError(FetchError, TimeoutError):
    """A source did not answer in time."""


class IntegrityError(FetchError):
    """The bytes are not the ones that were promised, or changed while they were read."""


class AccessDeniedError(FetchError):
    """The source, or the operator's rules, do not let this caller read the adapter."""

    retryable_by_default = False


class AdapterFormatError(AdapterError):
    """A file of the adapter is malformed."""

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
    """There is no room, and waiting would not make any."""

    retryable_by_default = True
    default_stage = "queue"


class UsageError(LoraxError):
    """The call itself is wrong."""


class InvalidAdapterIdError(UsageError):
    """The text is not an adapter id."""

    default_stage = "resolve"


class AdapterInUseError(UsageError):
    """Leases are still out."""

    retryable_by_default = True
    default_stage = "ready"


class LoaderClosedError(UsageError):
    """The loader is closed, or closing."""


class HandleClosedError(UsageError):
    """The handle was released, or its lease revoked."""


class ConfigError(UsageError):
    """A setting is out of range, or not available here."""


class InternalError(LoraxError):
    """A fault of this package; the cause is chained. Please report it with the story."""


class InvalidTransitionError(InternalError):
    """An outcome arrived for which the transition table has no row; nothing was changed."""
