"""A proxy of bytes on loopback, slow where told: what passes is counted, and stopped on command."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Self

from fault_server import until

BURST = 8 << 10
"""What a connection may pass at once; it is small, so that sums of many are small, too."""

_QUANTUM = BURST // 2
_TICK = 0.005


@dataclass(slots=True, eq=False)
class _Pair:
    """A connection from a client, and ours to the server, with what is on its way to the client."""

    client: socket.socket
    server: socket.socket
    back: bytes = b""
    ended: bool = False
    tokens: float = BURST
    filled: float = field(default_factory=monotonic)

    def close(self) -> None:
        self.client.close()
        self.server.close()


class SlowProxy:
    """Passes bytes to a port of this machine and back, unchanged, in one thread.

    Parameters
    ----------
    port
        Where the server is.
    rate
        Bytes per second that come back on each connection, by a token bucket; None is no throttle.
    most
        Bytes that come back in all; then it waits until it is allowed more. None: all.

    Both may be set at any time. `passed` is what has come back so far, heads of responses included.
    """

    def __init__(self, port: int, *, rate: float | None = None, most: int | None = None) -> None:
        self.rate = rate
        self.most = most
        self.passed = 0
        self._server = port
        self._pairs: list[_Pair] = []
        self._hanging_up = False

    def __enter__(self) -> Self:
        self._ending = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """From now on connections are refused. Idempotent."""
        self._ending.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    close = __exit__

    def stop_after(self, nbytes: int) -> None:
        """So many more, and no others before `go_on`."""
        self.most = self.passed + nbytes

    def hang_up(self) -> None:
        """End the connections that there are."""
        self._hanging_up = True
        until(lambda: not self._hanging_up)

    @property
    def stopped(self) -> bool:
        return self.most is not None and self.passed >= self.most

    def go_on(self) -> None:
        """At full speed."""
        self.rate = self.most = None

    def _run(self) -> None:
        while not self._ending.is_set():
            waiting = {pair.client: pair for pair in self._pairs}
            due = {pair.server: pair for pair in self._pairs if self._allowance(pair)}
            full = [pair.client for pair in self._pairs if pair.back]
            found, free, _ = select.select([self._listener, *waiting, *due], full, [], _TICK)
            for ready in found:
                if ready is self._listener:
                    self._accept()
                elif ready in waiting:
                    self._forth(waiting[ready])
                else:
                    self._back(due[ready])
            for client in free:
                self._flush(waiting[client])
            self._let_go()
        self._listener.close()
        for pair in self._pairs:
            pair.close()

    def _let_go(self) -> None:
        hanging_up = self._hanging_up  # once: it may be told at any moment, and is meant for all
        for pair in list(self._pairs):
            if hanging_up or (pair.ended and not pair.back):
                pair.close()
                self._pairs.remove(pair)
        if hanging_up:
            self._hanging_up = False

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._server), 10)
        except OSError:  # it has ended: so does the client's connection
            client.close()
            return
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setblocking(False)
        self._pairs.append(_Pair(client, server))

    def _forth(self, pair: _Pair) -> None:
        """What clients send is little, and goes as it comes."""
        data = b""
        with suppress(OSError):
            data = pair.client.recv(65_536)
            pair.server.sendall(data)
        if not data:
            pair.ended, pair.back = True, b""

    def _back(self, pair: _Pair) -> None:
        data = b""
        with suppress(OSError):
            data = pair.server.recv(self._allowance(pair))
        if not data:
            pair.ended = True
        pair.tokens -= len(data)
        self.passed += len(data)
        pair.back += data
        self._flush(pair)

    def _flush(self, pair: _Pair) -> None:
        try:
            pair.back = pair.back[pair.client.send(pair.back) :]
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more
            pair.ended, pair.back = True, b""

    def _allowance(self, pair: _Pair) -> int:
        """How many bytes may come back on it now."""
        if pair.ended or pair.back:
            return 0
        most = 65_536 if self.most is None else min(65_536, max(0, self.most - self.passed))
        if self.rate is None:
            return most
        now = monotonic()
        pair.tokens = min(float(BURST), pair.tokens + (now - pair.filled) * self.rate)
        pair.filled = now
        return 0 if pair.tokens < _QUANTUM else min(most, int(pair.tokens))
