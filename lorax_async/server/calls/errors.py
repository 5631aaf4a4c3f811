"""What a client is told when it gets no answer: OpenAI's form, with a status that fits."""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from lorax_async.errors import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterTimeoutError,
    CapacityError,
    EvictedError,
    FetchError,
    FetchTimeoutError,
    HandleClosedError,
    IncompatibleAdapterError,
    IntegrityError,
    InvalidAdapterIdError,
    LoaderClosedError,
    LoraxError,
    TransferError,
    UnsupportedAdapterError,
    UsageError,
)


class _Row(NamedTuple):
    kind: type[LoraxError]
    status: int
    code: str


TABLE = (
    _Row(AdapterNotFoundError, 404, "model_not_found"),
    _Row(AccessDeniedError, 403, "model_access_denied"),
    _Row(InvalidAdapterIdError, 400, "invalid_model_id"),
    _Row(AdapterFormatError, 422, "adapter_malformed"),
    _Row(UnsupportedAdapterError, 422, "adapter_unsupported"),
    _Row(IncompatibleAdapterError, 422, "adapter_incompatible"),
    _Row(CapacityError, 429, "over_capacity"),
    _Row(LoaderClosedError, 503, "closing"),
    _Row(HandleClosedError, 503, "closing"),  # leases are revoked by closing only
    _Row(AdapterTimeoutError, 504, "timeout"),
    _Row(FetchTimeoutError, 504, "timeout"),
    # The source's doing, not the client's: it cannot change what it asked for.
    _Row(IntegrityError, 502, "adapter_altered"),
    _Row(EvictedError, 503, "evicted"),
    _Row(FetchError, 502, "fetch_failed"),
    _Row(AdapterInUseError, 409, "adapter_in_use"),
    _Row(UsageError, 400, "invalid_request"),
    _Row(TransferError, 500, "transfer_failed"),
)
"""The first class that an error is an instance of decides. All else is `INTERNAL`."""

INTERNAL = "The server made a mistake; its log has more."
"""What went wrong inside is for whoever runs the server."""

_COME_BACK = frozenset({429, 503})
_MAY_PASS = frozenset({502, 504})


class Refusal(Exception):  # noqa: N818 - what a client is told, whosever fault it was
    """A request that gets no answer.

    `kind` is the word that OpenAI's clients know as an error's type; None takes what is usual for
    the status. `retry_after` is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        kind: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or _kind_of(status)
        self.retry_after = retry_after
        self.close = close
        """Whether nothing further is read from this connection."""

    def as_json(self) -> dict[str, Any]:
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close:
            headers["Connection"] = "close"
        return JSONResponse(self.as_json(), self.status, headers)


def refusal_of(error: Exception, retry_after: float, model: str | None = None) -> Refusal:
    """What to tell of an error; `model` is what the client called the adapter.

    Its own word stands in the text: of a name that the operator gave, the id may be a path.
    """
    if isinstance(error, Refusal):
        return error
    row = next((row for row in TABLE if isinstance(error, row.kind)), None)
    if row is None or not isinstance(error, LoraxError):
        return Refusal(500, INTERNAL, code="internal_error")
    told = error if model is None or error.id is None else error.located(id=model)
    comes_back = row.status in _COME_BACK or (row.status in _MAY_PASS and error.retryable)
    return Refusal(
        row.status,
        str(told),
        param="model" if error.id is not None else None,
        code=row.code,
        retry_after=(error.retry_after or retry_after) if comes_back else None,
    )


def _kind_of(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"
