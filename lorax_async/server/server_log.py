"""The server's log, by the program's `logging`: requests, loads, adapters that leave, failures.

A message is "what happened, name=value …". Its record has the values as attributes, and `event`,
for formatters that write JSON.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorax_async.errors import InvalidAdapterIdError, class_name, shorten
from lorax_async.events import Event, Failed, Resident, SlotFreed, SlotGranted
from lorax_async.loader import AdapterLoader
from lorax_async.server.responses import Refusal
from lorax_async.types import AdapterKey, AdapterRef

_logger = logging.getLogger("lorax_async.server")

GONE = 499
"""The status of a request whose client left before it had one, as in nginx."""

PROBES = frozenset({"/health", "/ping", "/version", "/metrics", "/"})
"""Calls that come often and say little; they and the page's are of level DEBUG."""

_DETAILS = "lorax_async.details"
_MAX_VALUE = 500


def log_event(event: str, *, level: int = logging.INFO, **values: object) -> None:
    """Log `event` with `values`, without those that are None. Texts may be a stranger's."""
    if not _logger.isEnabledFor(level):
        return
    given = {
        name: shorten(value, _MAX_VALUE) if isinstance(value, str) else value
        for name, value in values.items()
        if value is not None
    }
    pairs = [f"{name}={_as_text(value)}" for name, value in given.items()]
    message = f"{event}, {' '.join(pairs)}" if pairs else event
    _logger.log(level, "%s", message, extra={"event": event, **given})


def _as_text(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    is_plain = text != "" and not any(c in ' "=,' for c in text)
    return text if is_plain else json.dumps(text, ensure_ascii=False)


# -- requests -------------------------------------------------------------------------------------


class RequestObserver:
    """ASGI middleware: log HTTP requests, and report the path and status of each to `count`.

    The paths are those below `root_path`, or below which the app is mounted.
    """

    def __init__(
        self, app: ASGIApp, count: Callable[[str, int], None], root_path: str = ""
    ) -> None:
        self._app = app
        self._count = count
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan, say
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), GONE

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        details = dict[str, Any]()
        scope = {**scope, _DETAILS: details}
        if self._root_path:
            scope["root_path"] = self._root_path
        try:
            await self._app(scope, receive, record_status)
        except Exception as error:
            status = 500 if status == GONE else status  # an outer handler answers it
            note_error(scope, error)
            raise
        finally:
            path, root = str(scope["path"]), str(scope.get("root_path", ""))
            path = path.removeprefix(root) if path.startswith(f"{root}/") else path
            self._count(path, status)
            _log_request(scope, path, status, details, time.monotonic() - began)


def note_details(scope: Scope, **values: object) -> None:
    """Add values to the log's line of a request."""
    scope.get(_DETAILS, {}).update(values)


def note_error(scope: Scope, error: Exception) -> None:
    """Add the first error of a request to its line: with the operator's text, not the client's."""
    details = scope.get(_DETAILS, {})
    if "error" not in details:
        # The text of an unknown model has its name, which `note_id` adds, or leaves out.
        is_unknown = isinstance(error, Refusal) and error.code == "model_not_found"
        reason = "unknown model" if is_unknown else str(error) or None
        details |= {"error": class_name(error), "reason": reason}


def note_id(scope: Scope, name: str, text: str) -> None:
    """Add a name or id to the log's line, unless it may hold a secret, as a URL with a password."""
    try:
        AdapterRef(text)
    except InvalidAdapterIdError:
        text = "(no id)"
    note_details(scope, **{name: text})


def _log_request(
    scope: Scope, path: str, status: int, details: dict[str, Any], seconds: float
) -> None:
    level = logging.INFO
    if status >= 500:
        level = logging.WARNING
    elif path in PROBES or path.startswith("/page/"):
        level = logging.DEBUG
    if path.startswith("/v1/models/"):
        path = "/v1/models"  # a name may be a URL with a password, which `note_id` leaves out
    client = scope.get("client")
    values = {"client": client[0] if client else None, "call": path, "status": status}
    log_event("request", level=level, **values, **details, total_ms=in_ms(seconds))


def in_ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e3)


# -- adapters -------------------------------------------------------------------------------------


@contextmanager
def log_adapters(loader: AdapterLoader) -> Iterator[None]:
    """Log the loads of an open loader, those that fail, and the adapters that leave the device."""
    granted: dict[AdapterKey, SlotGranted] = {}
    failed = set[AdapterKey]()

    def on_granted(event: SlotGranted) -> None:
        granted[event.key] = event

    def on_resident(event: Resident) -> None:
        begin = granted.pop(event.key, None)
        if begin is not None:  # else its last copy was done after it was to leave
            load_ms = in_ms(event.time - begin.time)
            log_event("loaded", **_adapter(event), bytes=begin.nbytes, load_ms=load_ms)

    def on_failed(event: Failed) -> None:
        if event.slot is not None:
            failed.add(event.key)
        error, stage = class_name(event.error), event.error.stage
        values = {"stage": stage, "error": error, "reason": event.error.problem}
        log_event("load failed", level=logging.WARNING, **_adapter(event), **values)

    def on_freed(event: SlotFreed) -> None:
        granted.pop(event.key, None)
        if event.key not in failed:
            log_event("left the device", **_adapter(event))
        failed.discard(event.key)

    with ExitStack() as subscribed:
        for unsubscribe in (
            loader.subscribe(on_granted, SlotGranted),
            loader.subscribe(on_resident, Resident),
            loader.subscribe(on_failed, Failed),
            loader.subscribe(on_freed, SlotFreed),
        ):
            subscribed.callback(unsubscribe)
        yield


def _adapter(event: Event) -> dict[str, Any]:
    return {"adapter": str(event.key), "slot": event.slot and event.slot.index}
