"""The operator's endpoints: load and unload adapters by name, as in vLLM, and list all adapters."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lorax_async import ids
from lorax_async.errors import (
    AdapterInUseError,
    AdapterTimeoutError,
    InvalidAdapterIdError,
    LoraxError,
)
from lorax_async.events import Event, SlotId
from lorax_async.runtime.placement import AdapterResidency
from lorax_async.server.clients import read_bearer_key, read_json
from lorax_async.server.error_responses import Refusal
from lorax_async.server.request_bodies import LoadBody, T, UnloadBody, parse_body
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import Service
from lorax_async.types import AdapterId, AdapterKey, AdapterRef

UNLOAD_SECONDS = 1.0
"""Time to wait for requests that use the adapter; new requests for it wait meanwhile."""


def require_operator(settings: ServerSettings, connection: HTTPConnection) -> None:
    """Raise `Refusal` unless the client brings the operator's token."""
    token = settings.admin_token
    if token is None:
        raise Refusal(
            403,
            "This call is disabled: the server was started without an admin token",
            code="admin_disabled",
        )
    key = (read_bearer_key(connection) or "").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(key, token.encode()):
        raise Refusal(
            401,
            "This call needs the admin token, as Authorization: Bearer TOKEN",
            code="invalid_api_key",
        )


def is_operator(settings: ServerSettings, connection: HTTPConnection) -> bool:
    """Return whether the client brings the token; raise `Refusal` for a wrong one."""
    if read_bearer_key(connection) is None:
        return False
    require_operator(settings, connection)
    return True


class AdminEndpoints:
    """Endpoints that need the operator's token."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter. Load the adapter once, to report its errors."""
        names = self._service.names
        with self._service.in_flight.count_request():
            body = await self._body(request, LoadBody)
            if not body.lora_name or not body.lora_path:
                raise _invalid_input("Both 'lora_name' and 'lora_path' must be provided.")
            self._require_free(body)
            adapter = await asyncio.to_thread(_parse_adapter, body.lora_path)
            (await self._service.loader.load(adapter)).release()
            self._require_free(body)
            names.add(body.lora_name, adapter)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter. Requests that use the adapter keep it."""
        names = self._service.names
        with self._service.in_flight.count_request():
            body = await self._body(request, UnloadBody)
            if not body.lora_name:
                raise _invalid_input("'lora_name' needs to be provided to unload a LoRA adapter.")
            adapter = names.remove(body.lora_name)
            if adapter is None:
                raise Refusal(
                    404,
                    f"The lora adapter '{body.lora_name}' cannot be found.",
                    param="lora_name",
                    kind="NotFoundError",
                    code=404,
                )
            if names.name_of(adapter) is None:
                # One in use stays on the device until it is evicted like any other.
                with suppress(AdapterInUseError, AdapterTimeoutError):
                    await self._service.loader.unload(adapter, timeout=UNLOAD_SECONDS)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def adapters(self, request: Request) -> Response:
        """GET /v1/adapters: where each adapter is, and its last events."""
        require_operator(self._service.settings, request)
        placement, names = self._service.loader.placement(), self._service.names
        names_by_key: dict[AdapterKey, list[str]] = {}
        for name, adapter in names.adapters.items():
            for event in placement.story(adapter)[-1:]:
                names_by_key.setdefault(event.key, []).append(name)
        rows = [
            (key, names_by_key.get(key, []), where, placement.story(key))
            for key, where in placement.adapters.items()
        ]
        # Thousands of adapters make a long text; encode it off the loop.
        return await asyncio.to_thread(_list_response, rows)

    async def _body(self, request: Request, kind: type[T]) -> T:
        settings = self._service.settings
        require_operator(settings, request)
        content = await read_json(request, settings.max_body_bytes, settings.slow_client)
        return parse_body(kind, content)

    def _require_free(self, body: LoadBody) -> None:
        names = self._service.names
        if body.lora_name == names.base:
            raise _invalid_input(f"'{body.lora_name}' is the name of the base model.")
        if body.lora_name in names.adapters and not body.load_inplace:
            raise _invalid_input(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load"
                " the adapter in place, set 'load_inplace' to True."
            )


def _parse_adapter(path: str) -> AdapterId:
    """Return the folder or id at `path`. Blocks.

    An absolute path is always a folder, a relative one if it exists. The hub gets this
    machine's token; other sources get none.
    """
    with suppress(OSError, ValueError):
        if os.path.isabs(path) or Path(path).is_dir():
            return Path(path).absolute()
    ref = AdapterRef(path)
    with suppress(InvalidAdapterIdError):
        if ids.parse_ref(ref).source == "hub":
            return replace(ref, use_token=True)
    return path


def _invalid_input(message: str) -> Refusal:
    return Refusal(400, message, kind="InvalidUserInput", code=400)


def _list_response(
    rows: Sequence[tuple[AdapterKey, list[str], AdapterResidency, Sequence[Event]]],
) -> Response:
    data = [
        {
            "id": str(key),
            "names": names,
            "tier": where.tier,
            "state": where.state,
            "slot": _as_json(where.slot),
            "device_bytes": where.device_bytes,
            "host_bytes": where.host_bytes,
            "pinned_bytes": where.pinned_bytes,
            "locked": where.locked,
            "leases": where.leases,
            "pins": where.pins,
            "story": [_event_as_json(event) for event in story],
        }
        for key, names, where, story in rows
    ]
    return JSONResponse({"object": "list", "data": data})


def _event_as_json(event: Event) -> dict[str, Any]:
    members = {
        member.name: _as_json(getattr(event, member.name))
        for member in fields(event)
        if member.name != "key"
    }
    return {"event": type(event).__name__} | members


def _as_json(value: Any) -> Any:
    if isinstance(value, LoraxError):
        return {"error": type(value).__name__, "message": str(value)}
    if isinstance(value, AdapterKey):
        return str(value)
    if isinstance(value, SlotId):
        return {"index": value.index, "generation": value.generation}
    return list(value) if isinstance(value, tuple) else value
