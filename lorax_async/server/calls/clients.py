"""How much each client has under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import HTTPConnection

from lorax_async.adapter import AdapterId, Ref, as_ref
from lorax_async.errors import CapacityError

BEARER = "bearer "


def bearer_of(connection: HTTPConnection) -> str | None:
    """The key that a client brings, if it does."""
    said = connection.headers.get("authorization", "")
    return said[len(BEARER) :].strip() if said.lower().startswith(BEARER) else None


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
