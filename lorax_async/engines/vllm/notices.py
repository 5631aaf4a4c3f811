"""Notices from a worker to the API server, which then need not ask: a build ended, a loss.

Each is one UDP datagram, signed with a key that only the server and its workers have. What one that
gets lost would have told, the server's next question to the workers does.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_DGRAM, gethostname, socket
from typing import NamedTuple, TypeAlias

NoticeAddress: TypeAlias = tuple[str, int, str]
"""IP address, port and key of the server."""

_SIGNATURE = 32


class BuildEnded(NamedTuple):
    """A worker's build ended."""

    ticket: str
    """What `WorkerExtension.lorax_prepare` returned."""
    error: str | None


class AdapterLost(NamedTuple):
    """An adapter could not be read again, so that its requests get wrong tokens."""

    path: str
    reason: str


Notice: TypeAlias = BuildEnded | AdapterLost

_KINDS: dict[str, type[Notice]] = {each.__name__: each for each in (BuildEnded, AdapterLost)}


def network_namespace() -> str:
    """Return what two processes have in common if they reach each other by loopback."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # a sandbox hides them
        return gethostname()


def send_notice(address: NoticeAddress, notice: Notice) -> None:
    """Send a notice to the server. Returns at once, from any thread."""
    host, port, key = address
    body = json.dumps([type(notice).__name__, *notice]).encode()
    with suppress(OSError), socket(AF_INET6 if ":" in host else AF_INET, SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(hmac.digest(key.encode(), body, "sha256") + body, (host, port))


async def receive_notices(
    host: str, handle: Callable[[Notice], None]
) -> tuple[asyncio.BaseTransport, NoticeAddress]:
    """Call `handle` for each notice, until the transport is closed.

    Raise OSError if `host` is not an address of this machine.
    """
    receiver = _NoticeReceiver(handle)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: receiver, local_addr=(host, 0)
    )
    bound, port, *_ = transport.get_extra_info("sockname")
    return transport, (bound, port, receiver.key)


class _NoticeReceiver(asyncio.DatagramProtocol):
    def __init__(self, handle: Callable[[Notice], None]) -> None:
        self.key = secrets.token_hex()
        self._handle = handle

    def datagram_received(self, data: bytes, address: object) -> None:  # noqa: ARG002 - asyncio's
        signature, body = data[:_SIGNATURE], data[_SIGNATURE:]
        if hmac.compare_digest(signature, hmac.digest(self.key.encode(), body, "sha256")):
            kind, *fields = json.loads(body)
            self._handle(_KINDS[kind](*fields))
