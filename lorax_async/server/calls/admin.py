"""The operator's calls: adapters by name, as in vLLM, and where all adapters are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lorax_async.adapter import AdapterId, AdapterKey, AdapterRef
from lorax_async.errors import (
    AdapterInUseError,
    AdapterTimeoutError,
    InvalidAdapterIdError,
    LoraxError,
)
from lorax_async.events import Event, SlotId
from lorax_async.ids import parsing
from lorax_async.runtime.whereabouts import AdapterResidency
from lorax_async.server.calls.bodies import read_json
from lorax_async.server.calls.clients import require_operator
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.requests import LoadBody, T, UnloadBody, parsed
from lorax_async.server.calls.service import Service

UNLOAD_SECONDS = 1.0
"""For how long requests that still have the adapter are waited for, while new ones of it wait."""


class Administration:
    """Endpoints for whoever has the operator's token."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter. The adapter is loaded once, so that its errors are told."""
        with self._service.under_way.one():
            body = await self._body(request, LoadBody)
            if not body.lora_name or not body.lora_path:
                raise _invalid("Both 'lora_name' and 'lora_path' must be provided.")
            self._require_free(body)
            adapter = await asyncio.to_thread(_adapter_at, body.lora_path)
            (await self._service.loader.load(adapter)).release()
            self._require_free(body)
            self._service.names.put(body.lora_name, adapter)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter. Requests that have it go on with it."""
        with self._service.under_way.one():
            body = await self._body(request, UnloadBody)
            if not body.lora_name:
                raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
            adapter = self._service.names.take(body.lora_name)
            if adapter is None:
                raise Refusal(
                    404,
                    f"The lora adapter '{body.lora_name}' cannot be found.",
                    param="lora_name",
                    kind="NotFoundError",
                    code=404,
                )
            await self._let_go(adapter)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def adapters(self, request: Request) -> Response:
        """GET /v1/adapters: the adapters that are anywhere, and what happened to them."""
        require_operator(self._service.settings, request)
        loader, names = self._service.loader, self._service.names
        named: dict[AdapterKey, list[str]] = {}
        for name, adapter in names.adapters.items():
            for event in loader.story(adapter)[-1:]:
                named.setdefault(event.key, []).append(name)
        found = [
            (key, named.get(key, []), where, loader.story(key))
            for key, where in loader.residency().items()
        ]
        # Of thousands of adapters this is a long text, and answers are under way.
        return await asyncio.to_thread(_listed, found)

    async def _body(self, request: Request, kind: type[T]) -> T:
        require_operator(self._service.settings, request)
        return parsed(kind, await read_json(request, self._service.settings))

    def _require_free(self, body: LoadBody) -> None:
        names = self._service.names
        if body.lora_name == names.base:
            raise _invalid(f"'{body.lora_name}' is the name of the base model.")
        if body.lora_name in names.adapters and not body.load_inplace:
            raise _invalid(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load"
                " the adapter in place, set 'load_inplace' to True."
            )

    async def _let_go(self, adapter: AdapterId) -> None:
        """Free its memory, unless somebody uses it; then it is evicted as all others are."""
        if adapter in self._service.names.adapters.values():
            return
        with suppress(AdapterInUseError, AdapterTimeoutError):
            await self._service.loader.unload(adapter, timeout=UNLOAD_SECONDS)


def _adapter_at(path: str) -> AdapterId:
    """Return the folder that an operator means, whatever is there, or an id. Blocks.

    An absolute path is always a folder; a relative one is if it is there.
    """
    with suppress(OSError, ValueError):
        if os.path.isabs(path) or Path(path).is_dir():
            return Path(path).absolute()
    return _named_by_operator(path)


def _named_by_operator(text: str) -> AdapterId:
    """Return an id for which the hub is asked with the machine's own token, as the caller's word.

    Other sources have no such token.
    """
    ref = AdapterRef(text)
    with suppress(InvalidAdapterIdError):
        if parsing.parsed(ref).source == "hub":
            return replace(ref, use_token=True)
    return text


def _invalid(message: str) -> Refusal:
    return Refusal(400, message, kind="InvalidUserInput", code=400)


def _listed(
    found: Sequence[tuple[AdapterKey, list[str], AdapterResidency, Sequence[Event]]],
) -> Response:
    data = [
        {
            "id": str(key),
            "names": names,
            "tier": where.tier,
            "state": where.state,
            "slot": _plain(where.slot),
            "device_bytes": where.device_bytes,
            "host_bytes": where.host_bytes,
            "pinned_bytes": where.pinned_bytes,
            "locked": where.locked,
            "leases": where.leases,
            "pins": where.pins,
            "story": [_event(event) for event in story],
        }
        for key, names, where, story in found
    ]
    return JSONResponse({"object": "list", "data": data})


def _event(event: Event) -> dict[str, Any]:
    told = {name.name: _plain(getattr(event, name.name)) for name in fields(event)}
    del told["key"]
    return {"event": type(event).__name__} | told


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, LoraxError):
        return {"error": type(value).__name__, "message": str(value)}
    if isinstance(value, AdapterKey):
        return str(value)
    if isinstance(value, SlotId):
        return {"index": value.index, "generation": value.generation}
    return list(value) if isinstance(value, tuple) else value
