"""How much each client has under way."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import HTTPConnection

from lorax_async.adapter import AdapterId, Ref, as_ref
from lorax_async.errors import CapacityError
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.settings import ServerSettings

BEARER = "bearer "


def bearer_of(connection: HTTPConnection) -> str | None:
    """The key that a client brings, if it does."""
    said = connection.headers.get("authorization", "")
    return said[len(BEARER) :].strip() if said.lower().startswith(BEARER) else None


def require_operator(settings: ServerSettings, connection: HTTPConnection) -> None:
    """Raise `Refusal` for whoever has not brought the operator's token."""
    token = settings.admin_token
    if token is None:
        raise Refusal(
            403,
            "This server was started without an admin token: nobody may make this call",
            code="admin_disabled",
        )
    given = (bearer_of(connection) or "").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(given, token.encode()):
        raise Refusal(
            401,
            "This call needs the admin token, as Authorization: Bearer …",
            code="invalid_api_key",
        )


def is_operator(settings: ServerSettings, connection: HTTPConnection) -> bool:
    """Who brings no token is not; raises `Refusal` for a wrong one."""
    if bearer_of(connection) is None:
        return False
    require_operator(settings, connection)
    return True


def client_of(connection: HTTPConnection) -> tuple[str, str]:
    """Who asks: by key if there is one, else by address."""
    key = bearer_of(connection)
    if key is not None:
        return "key", key
    return "address", connection.client.host if connection.client else ""


class Clients:
    """Counts the adapters that each client has under way, `most` at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._using: dict[tuple[str, str], Counter[Ref]] = {}

    @contextmanager
    def using(self, client: tuple[str, str], adapter: AdapterId | None) -> Iterator[None]:
        """While it is entered. The base counts nothing. Raises `CapacityError`."""
        if adapter is None:
            yield
            return
        ref, using = as_ref(adapter), self._using.setdefault(client, Counter())
        if ref not in using and len(using) >= self._most:
            raise CapacityError(
                f"this client has {self._most} adapters under way, which is as many as it may;"
                " ask again when one of them has answered"
            )
        using[ref] += 1
        try:
            yield
        finally:
            using[ref] -= 1
            if not using[ref]:
                del using[ref]
            if not using:
                self._using.pop(client, None)
