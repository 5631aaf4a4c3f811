"""`AdapterMirror`, by which the replicas of a fleet take adapters from each other."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from threading import Event, Lock, Semaphore, Thread
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

from lorax_async.cache.base import CacheEntry, CacheKey, scope_name
from lorax_async.concurrency import Lifetime, call_in, end_in_thread
from lorax_async.errors import ConfigError, LoraxError
from lorax_async.files import Reader
from lorax_async.formats.spans import ByteRange
from lorax_async.formats.split_weights import role_of
from lorax_async.ids import STORES
from lorax_async.loader import AdapterLoader
from lorax_async.peers import Peers, is_same_secret
from lorax_async.remote.opening import PUBLIC, close_unused
from lorax_async.remote.peer_client import PROOF_FIELD, PeerState
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterRef, require_count
from lorax_async.urls import parse_url

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["AdapterMirror", "Peers"]

MAX_CONNECTIONS = 32
"""Requests at once, each in a thread; others wait to be accepted."""

MAX_REQUEST_BYTES = 64 << 10
"""Of a request and its fields, which strangers may send, too."""

MAX_FETCHES = 256
"""Adapters that are fetched for members at once; for others they have to look elsewhere."""

MEMBER_SECONDS = 10.0
"""For a request to arrive, and for a member to take the next bytes."""

HELD_SECONDS = 5.0
"""For members to come and take what was fetched for them, before it may be evicted."""

_CHUNK_BYTES = 64 << 10
_PAUSE_SECONDS = 0.1
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")

Fetch = tuple[CacheKey, str]
"""A key, and the proof of the member that asked for it."""


class AdapterMirror:
    """Serves the adapters in a store's cache to the other members of its fleet.

        store = AdapterStore(StoreConfig(peers=peers))
        async with store, AdapterMirror(store, host=address) as mirror:
            peers.members = [mirror.url, …]

    An adapter that the cache has not is downloaded from its source first, with this machine's own
    credentials. Every request needs the fleet's token; an adapter that no source gave away without
    credentials is served only to a member that proves that it was given the adapter with
    credentials that this cache knows from the source, too.

    Use it as an async context manager, on the event loop of its store. It serves in threads.

    Parameters
    ----------
    store
        An open store or loader whose config has `peers`. Close the mirror before it.
    host, port
        The address at which members reach this machine, not a name or a wildcard; port 0 is any.
    bytes_per_second
        A bound on what is sent, all members together. None: no bound.

    Raises
    ------
    ConfigError
        An argument is malformed, or the store has no peers. `OSError` where it cannot listen.
    """

    def __init__(
        self,
        store: AdapterStore | AdapterLoader,
        host: str = "127.0.0.1",
        port: int = 0,
        bytes_per_second: int | None = None,
    ) -> None:
        peers = store.config.peers
        if peers is None:
            raise ConfigError("the mirror's store has no peers; set StoreConfig.peers")
        try:
            wildcard = ip_address(host).is_unspecified
        except ValueError:
            wildcard = True
        if wildcard:
            raise ConfigError(f"host {host!r} of a mirror is not the address of a machine")
        if bytes_per_second is not None:
            require_count("bytes_per_second", bytes_per_second)
        self.peers = peers
        self.served_bytes = 0
        """Bytes of files sent to members."""
        self._store = store
        self._address = (host, port)
        self._bandwidth = Bandwidth(bytes_per_second)
        self._lifetime = Lifetime("mirror", "async with AdapterMirror(…) as mirror")
        self._fetches: dict[Fetch, asyncio.Task[bool]] = {}

    async def __aenter__(self) -> Self:
        async with self._lifetime.entering():
            self._parts = self._store.parts
            self._loop = asyncio.get_running_loop()
            self._server = MirrorServer(self._address, self)
            self.peers.own_url = self.url
            self._server.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._lifetime.close(self._close)

    @property
    def url(self) -> str:
        """The URL that members know it by."""
        host = self._address[0]
        text = f"[{host}]" if ":" in host else host
        return str(parse_url(f"http://{text}:{self._server.port}").origin)

    async def _close(self) -> None:
        self.peers.own_url = None
        for task in self._fetches.values():
            task.cancel()
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        await end_in_thread("lorax-stop", self._server.end)

    def __del__(self) -> None:
        if hasattr(self, "_lifetime"):
            self._lifetime.warn_if_unclosed()

    # -- in the server's threads ------------------------------------------------------------------

    def entry(self, key: CacheKey, proof: str) -> CacheEntry | None:
        """Lease an entry that a member may have. Blocks."""
        entry = self._parts.remote.stored(key)
        if entry is None or self._may_read(entry, key, proof):
            return entry
        entry.close()
        return None

    def _may_read(self, entry: CacheEntry, key: CacheKey, proof: str) -> bool:
        names = entry.scope_names()
        if scope_name(PUBLIC) in names:
            return True
        if key.source.partition("://")[0] in STORES and not self.peers.trust:
            return False  # their scope names the environment's identity, which is no secret
        return any(
            is_same_secret(proof, self.peers.proof(self.url, key.name, name)) for name in names
        )

    def state(self, key: CacheKey, proof: str) -> PeerState:
        """Return what a member can expect of a key now; begin to fetch it. Blocks."""
        entry = self.entry(key, proof)
        if entry is not None:
            entry.close()
            return "ready"
        call = asyncio.run_coroutine_threadsafe(self._continue(key, proof), self._loop)
        return call.result(MEMBER_SECONDS)

    def progress(self, key: CacheKey) -> int:
        """Return a number that changes with each write to a download. Blocks."""
        partials = self._parts.cache.get().partials
        return max(map(partials.changed_ns, partials.of(key.name)), default=0)

    def wait_to_send(self, nbytes: int) -> bool:
        """Wait until so many bytes may be sent; return False if the mirror ends meanwhile."""
        self.served_bytes += nbytes  # about, of several threads
        return not self._server.ending.wait(self._bandwidth.delay(nbytes))

    # -- on the loop ------------------------------------------------------------------------------

    async def _continue(self, key: CacheKey, proof: str) -> PeerState:
        """Begin to fetch a key for a member, or see whether that has ended."""
        if self._lifetime.closed:
            return "elsewhere"
        task = self._fetches.get((key, proof))
        if task is None:
            for ended in [fetch for fetch, task in self._fetches.items() if task.done()]:
                del self._fetches[ended]
            if len(self._fetches) >= MAX_FETCHES:
                return "elsewhere"
            task = asyncio.create_task(self._fetch(key, proof), name="lorax mirror fetch")
            self._fetches[key, proof] = task
        if not task.done():
            return "fetching"
        del self._fetches[key, proof]
        return "fetching" if task.result() else "refused"  # the entry shows it is ready

    async def _fetch(self, key: CacheKey, proof: str) -> bool:
        """Fetch a key from its source; return whether the member may have it.

        This machine's own token is used only for a member that has used one itself.
        """
        look = partial(self.entry, key, proof)
        for use_token in (False, True) if proof else (False,):
            with suppress(LoraxError), self.peers.fetches_directly(key.source):
                ref = AdapterRef(key.source, revision=key.version, use_token=use_token)
                folder = await self._parts.folders.fetch(ref, self._store.config.timeout)
                async with folder:
                    entry = await call_in(self._parts.threads, look, close_unused)
                    close_unused(entry)
                    if entry is not None:
                        await asyncio.sleep(HELD_SECONDS)
                        return True
        return False


class Bandwidth:
    """A bound on the bytes per second of several threads; None is no bound."""

    def __init__(self, bytes_per_second: int | None) -> None:
        self._rate = bytes_per_second
        self._lock = Lock()
        self._free_at = 0.0

    def delay(self, nbytes: int) -> float:
        """Return the seconds to wait before so many bytes are sent."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + nbytes / self._rate
        return start - now


class MirrorServer:
    """Accepts connections, one request each, from `begin` to `end`."""

    def __init__(self, address: tuple[str, int], mirror: AdapterMirror) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._listener = socket.create_server(address, family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.mirror = mirror
        self.ending = Event()
        self._slots = Semaphore(MAX_CONNECTIONS)
        self._connections: set[socket.socket] = set()
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, "lorax-mirror")
        self._accepting = Thread(target=self._accept, name="lorax-mirror-accept", daemon=True)

    def begin(self) -> None:
        self._accepting.start()

    def _accept(self) -> None:
        while not self.ending.is_set():
            self._slots.acquire()
            try:
                connection, address = self._listener.accept()
            except OSError:  # it ends, or the process has too many files open
                self._slots.release()
                self.ending.wait(_PAUSE_SECONDS)
                continue
            self._connections.add(connection)
            self._threads.submit(self._serve, connection, address)

    def _serve(self, connection: socket.socket, address: object) -> None:
        server: Any = self
        try:
            with connection, suppress(OSError):  # the member has left
                MirrorRequest(connection, address, server)
        finally:
            self._connections.discard(connection)
            self._slots.release()

    def end(self) -> None:
        """End all connections and threads. Blocks."""
        self.ending.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._cut()  # which frees slots
        self._accepting.join()
        self._cut()
        self._threads.shutdown()
        self._listener.close()

    def _cut(self) -> None:
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class RequestBytes(io.RawIOBase):
    """The bytes of one request: at most `MAX_REQUEST_BYTES`, within `MEMBER_SECONDS`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._left = MAX_REQUEST_BYTES
        self._until = time.monotonic() + MEMBER_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        seconds = self._until - time.monotonic()
        if seconds <= 0 or not self._left:
            raise TimeoutError
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= count
        return count


class MirrorRequest(BaseHTTPRequestHandler):
    """Answers one request: for the state of an entry, or for bytes of one of its files."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lorax-async", ""
    disable_nagle_algorithm = True
    server: Any

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(RequestBytes(self.connection))

    def do_GET(self) -> None:
        self.connection.settimeout(MEMBER_SECONDS)
        mirror: AdapterMirror = self.server.mirror
        if not mirror.peers.is_member(self.headers.get("Authorization", "")):
            return self._reply(401)
        target = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        key = CacheKey(query.get("source", ""), query.get("version", ""))
        path, _, file_name = target.path.rpartition("/")
        proof = self.headers.get(PROOF_FIELD, "")
        if path != f"/v1/{key.name}":
            return self._reply(404)
        try:
            if file_name:
                return self._send_file(mirror, mirror.entry(key, proof), file_name)
            state = mirror.state(key, proof)
            answer = {"state": state, "progress": mirror.progress(key)}
        except (LoraxError, RuntimeError, TimeoutError):  # its store closes, or its loop
            return self._reply(503)
        return self._reply(403 if state == "refused" else 200, json.dumps(answer).encode())

    def _send_file(self, mirror: AdapterMirror, entry: CacheEntry | None, file_name: str) -> None:
        """Send the file, or its range that was requested; close the entry."""
        if entry is None:
            return self._reply(404)
        with closing(entry):
            role = role_of(file_name)
            file = None if role is None else entry.record.file(role)
            if file is None:
                return self._reply(404)
            fields = {"ETag": f'"{file.digest.kind}-{file.digest.value}"', "Accept-Ranges": "bytes"}
            span = self._range(file.nbytes, fields["ETag"])
            start, stop = span or (0, file.nbytes)
            if span is not None and start >= stop:
                return self._reply(416, fields={"Content-Range": f"bytes */{file.nbytes}"})
            if span is not None:
                fields["Content-Range"] = f"bytes {start}-{stop - 1}/{file.nbytes}"
            with closing(entry.reader(file.role)) as reader:
                self._head(200 if span is None else 206, stop - start, fields)
                with suppress(LoraxError):  # the connection ends early
                    self._send(mirror, reader, start, stop)
        return None

    def _send(self, mirror: AdapterMirror, reader: Reader, start: int, stop: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, stop - start)))
        for at in range(start, stop, _CHUNK_BYTES):
            chunk = buffer[: stop - at]
            reader.read_into([chunk], at)
            if not mirror.wait_to_send(len(chunk)):
                return
            self.wfile.write(chunk)

    def _range(self, nbytes: int, etag: str) -> ByteRange | None:
        """Return the requested range of this version of the file; None is all of it."""
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        if found is None or self.headers.get("If-Range", etag) != etag:
            return None
        return int(found[1]), min(nbytes, int(found[2]) + 1) if found[2] else nbytes

    def _reply(
        self, status: int, body: bytes = b"", fields: Mapping[str, str] | None = None
    ) -> None:
        self._head(status, len(body), fields or {})
        self.wfile.write(body)

    def _head(self, status: int, nbytes: int, fields: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(nbytes))
        self.send_header("Connection", "close")  # an idle one would keep a thread
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""
