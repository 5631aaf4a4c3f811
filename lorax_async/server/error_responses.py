"""Error responses: a status and OpenAI's JSON form for every error of a request."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lorax_async import errors
from lorax_async.errors import LoraxError


class _StatusRow(NamedTuple):
    kind: type[LoraxError]
    status: int
    code: str


TABLE = (
    _StatusRow(errors.AdapterNotFoundError, 404, "model_not_found"),
    _StatusRow(errors.AccessDeniedError, 403, "model_access_denied"),
    _StatusRow(errors.InvalidAdapterIdError, 400, "invalid_model_id"),
    _StatusRow(errors.AdapterFormatError, 422, "adapter_malformed"),
    _StatusRow(errors.UnsupportedAdapterError, 422, "adapter_unsupported"),
    _StatusRow(errors.IncompatibleAdapterError, 422, "adapter_incompatible"),
    _StatusRow(errors.CapacityError, 429, "over_capacity"),
    _StatusRow(errors.LoaderClosedError, 503, "closing"),
    _StatusRow(errors.HandleClosedError, 503, "closing"),  # only closing revokes leases
    _StatusRow(errors.AdapterTimeoutError, 504, "timeout"),
    _StatusRow(errors.FetchTimeoutError, 504, "timeout"),
    # The source is at fault: the client cannot correct its request.
    _StatusRow(errors.IntegrityError, 502, "adapter_altered"),
    _StatusRow(errors.EvictedError, 503, "evicted"),
    _StatusRow(errors.FetchError, 502, "fetch_failed"),
    _StatusRow(errors.AdapterInUseError, 409, "adapter_in_use"),
    _StatusRow(errors.UsageError, 400, "invalid_request"),
    _StatusRow(errors.TransferError, 500, "transfer_failed"),
)
"""The first row whose class matches an error decides; other errors get `INTERNAL`."""

INTERNAL = "Internal server error; the server's log has the details."
"""Internal details are for the operator's log only."""

_KINDS = {400: "invalid_request_error", 429: "rate_limit_error"}
_RETRY_LATER = frozenset({429, 503})
_RETRY_IF_TRANSIENT = frozenset({502, 504})


class Refusal(Exception):  # noqa: N818 - a response, not always an error of the server
    """An error response to one request.

    `kind` is the error's type in OpenAI's JSON; None derives it from the status. `retry_after` is
    in seconds. With `close`, nothing more is read from the connection.
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
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or _KINDS.get(status, "server_error" if status >= 500 else _KINDS[400])
        self.close = close
        self._headers = dict(headers or {})
        if retry_after is not None:
            self._headers["Retry-After"] = str(max(1, ceil(retry_after)))
        if status == 401:
            self._headers["WWW-Authenticate"] = "Bearer"
        if close:
            self._headers["Connection"] = "close"

    def as_json(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.as_json(), self.status, self._headers)


def invalid_parameter(message: str, param: str, code: str = "invalid_value") -> Refusal:
    """Return the response to a parameter that cannot be used."""
    return Refusal(400, message, param=param, code=code)


def create_refusal(error: Exception, retry_after: float, model: str | None = None) -> Refusal:
    """Return the response to an error; `model` is the client's name for the adapter.

    It replaces the id in the message: behind an operator's name, the id may be a path.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):  # starlette's, for an unknown path or method
        return Refusal(error.status_code, error.detail, code="unknown_url", headers=error.headers)
    row = next((row for row in TABLE if isinstance(error, row.kind)), None)
    if row is None or not isinstance(error, LoraxError):
        return Refusal(500, INTERNAL, code="internal_error")
    shown = error if model is None or error.id is None else error.located(id=model)
    retry = row.status in _RETRY_LATER or (row.status in _RETRY_IF_TRANSIENT and error.retryable)
    return Refusal(
        row.status,
        str(shown),
        param="model" if error.id is not None else None,
        code=row.code,
        retry_after=(error.retry_after or retry_after) if retry else None,
    )
