"""All kinds of origin servers behind one interface, and a link that can be cut."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import web_servers as servers
from fault_server import Asked, Client, FaultServer, answer
from hub_stand_in import HubStandIn
from store_servers import azurite, set_environment, stored, weed
from tools import tool
from user_loads import at, contents, loader
from web_folder import refuse
from web_servers import Command, Nginx

from lorax_async import AdapterLoader, Allow


class SlowProxy:
    """Forwards bytes to and from a local port, with a thread for each direction."""

    rate: float | None = None
    """Bytes per second that come back on each connection."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._left: int | None = None
        self._changed = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        """End all connections, and refuse others. Idempotent."""
        self.go_on()
        with suppress(OSError):  # it was ended before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(20)
        for each in self._sockets:
            with suppress(OSError):  # its other end is gone
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()

    close = __exit__

    def stop_after(self, nbytes: int) -> None:
        """Let this many more bytes come back, and no others before `go_on`."""
        with self._changed:
            self._left = nbytes

    @property
    def stopped(self) -> bool:
        return self._left is not None and self._left <= 0

    def go_on(self) -> None:
        with self._changed:
            self._left = self.rate = None
            self._changed.notify_all()

    def _start(self, work: Callable[..., None], *given: object) -> None:
        thread = threading.Thread(target=work, args=given, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # at its end
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server), 10)
                except OSError:  # it has ended
                    client.close()
                    continue
                server.settimeout(None)
                self._sockets += [client, server]
                self._start(self._pass_on, client, server)
                self._start(self._pass_back, server, client)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65_536):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with client, server, suppress(OSError):
            while data := server.recv(self._allowance()):
                with self._changed:
                    if self._left is not None:
                        self._left -= len(data)
                client.sendall(data)
                if self.rate is not None:
                    time.sleep(len(data) / self.rate)
            client.shutdown(socket.SHUT_RDWR)

    def _allowance(self) -> int:
        """Return the number of bytes that may come back; wait until there are any."""
        with self._changed:
            self._changed.wait_for(lambda: not self.stopped)
            most = 65_536 if self.rate is None else 4_096
            return most if self._left is None else min(most, self._left)


LAYERS = 8
Files = dict[str, bytes]
Begun = Callable[[str], Any]


def _on(program: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs(program), pytest.mark.slow]


KINDS: dict[str, list[pytest.MarkDecorator]] = {
    "hub": [],
    "folder": [],
    "gs": [],
    "python": [pytest.mark.slow],
    "nginx": _on("nginx"),
    "s3": _on("weed"),
    "az": _on("azurite-blob"),
    "rclone http": _on("rclone"),
    "rclone webdav": _on("rclone"),
    "olah": _on("olah-cli"),
}
VERSIONS = {"gs": "versions-", "s3": "etags-", "az": "etags-", "python": "weak-"}
VERSIONS["rclone http"] = "weak-"
OBSTORE = ("gs", "s3", "az")


def on(*kinds: str) -> pytest.MarkDecorator:
    """Run a test on these kinds of server, or on all of them."""
    chosen = [pytest.param(kind, marks=KINDS[kind], id=kind) for kind in kinds or KINDS]
    return pytest.mark.parametrize("origin", chosen, indirect=True)


@dataclass
class Origin:
    """One test's own folder at a server of a kind: its adapter, and loaders for it."""

    kind: str
    id: str
    put_files: Callable[[Files], object]
    link: SlowProxy
    folder: Path
    server: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def put(self, adapter: Path) -> None:
        self.put_files(contents(adapter))

    def loader(self, *allow: Allow, layers: int = LAYERS, **settings: Any) -> AdapterLoader:
        given = self.settings | settings
        given["allow"] = (*self.settings["allow"], *allow)
        return loader(self.folder, layers=layers, **given)


class Shelf(dict[str, bytes]):
    """Files of a server in this process, by path, with strong ETags."""

    def __call__(self, asked: Asked, client: Client) -> None:
        data = self.get(asked.target)
        if data is None:
            refuse("404 Not Found")(asked, client)
        else:
            answer(asked, client, data, f'ETag: "{sha1(data).hexdigest()}"')


@contextmanager
def processes(folders: pytest.TempPathFactory) -> Iterator[Begun]:
    """Return a function that starts a server's process at its first call."""
    with ExitStack() as ends:

        @cache
        def begun(kind: str) -> Any:
            folder = folders.mktemp(kind.replace(" ", "-"))
            shelf = folder / "files"
            program, _, protocol = kind.partition(" ")
            if program == "nginx":
                return ends.enter_context(servers.nginx(folder))
            if program in {"s3", "az"}:
                name, serve = {"s3": ("weed", weed), "az": ("azurite-blob", azurite)}[program]
                return ends.enter_context(serve(str(tool(name)), folder))
            shelf.mkdir()
            if program == "rclone":
                url = ends.enter_context(servers.rclone(protocol, shelf, folder))
            else:
                url = ends.enter_context(servers.pythons_own(shelf, folder))
            return shelf, urlsplit(url).port

        yield begun


def _replaced_in(folder: Path, files: Files) -> None:
    """Replace files, each a second later than the last, so that their dates differ."""
    folder.mkdir(exist_ok=True)
    seconds = 1_000_000_000 + int(time.monotonic() * 10)
    for name, data in files.items():
        place = folder / f"{name}.new"
        place.write_bytes(data)
        os.utime(place, (seconds, seconds))
        place.rename(folder / name)


@contextmanager
def olah(folder: Path, hub: HubStandIn) -> Iterator[str]:
    """Start a mirror of the hub, configured by a file; return its endpoint."""
    program = tool("olah-cli")
    assert program is not None
    port = servers.free_port()
    own = f"127.0.0.1:{port}"
    basic: dict[str, object] = {"host": "127.0.0.1", "port": port, "mirrors-path": []}
    basic |= {"repos-path": str(folder / "repos"), "hf-scheme": "http", "mirror-scheme": "http"}
    basic |= {"hf-netloc": hub.netloc, "hf-lfs-netloc": hub.store_netloc}
    basic |= {"mirror-netloc": own, "mirror-lfs-netloc": own}
    settings = folder / "olah.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in basic.items()]
    settings.write_text("\n".join(["[basic]", *lines, ""]))
    command: Command = [program, "--config", settings, "--log-path", folder / "logs"]
    with servers.running(command, [port], folder / "log"):
        yield f"http://{own}"


def _of_hub(name: str, folder: Path, ends: ExitStack, *, mirrored: bool) -> Origin:
    hub = ends.enter_context(HubStandIn())
    port = int(hub.netloc.rpartition(":")[2])
    if mirrored:
        port = int(ends.enter_context(olah(folder, hub)).rpartition(":")[2])
    link = ends.enter_context(SlowProxy(port))
    allow = (Allow("hub"), at(f"127.0.0.1:{port}"), at(hub.store_netloc))
    settings = {"hub_endpoint": f"http://127.0.0.1:{link.port}", "allow": allow}

    def put(files: Files) -> str:
        return hub.put(f"org/{name}", files)

    return Origin("hub", f"org/{name}", put, link, folder, hub, settings)


def made(
    kind: str, name: str, folder: Path, begun: Begun, ends: ExitStack, patch: pytest.MonkeyPatch
) -> Origin:
    if kind in {"hub", "olah"}:
        return _of_hub(name, folder, ends, mirrored=kind == "olah")
    server: Any
    if kind in OBSTORE:
        store = ends.enter_context(stored(kind, f"{name}/", begun))
        link = ends.enter_context(SlowProxy(store.port))
        set_environment(patch, store.environment(link.port))

        allow = Allow(kind, "adapters")  # type: ignore[arg-type]
        return Origin(kind, store.id, store.put_all, link, folder, None, {"allow": (allow,)})
    if kind == "folder":
        server = Shelf()
        port = ends.enter_context(FaultServer(b"", server)).port

        def put(files: Files) -> None:
            server.update({f"/{name}/{file}": data for file, data in files.items()})
    elif kind == "nginx":
        server = begun(kind)
        assert isinstance(server, Nginx)
        port = server.first

        def put(files: Files) -> None:
            for file, data in files.items():
                server.put(f"{name}/{file}", data)
    else:
        server, port = begun(kind)

        def put(files: Files) -> None:
            _replaced_in(server / name, files)

    link = ends.enter_context(SlowProxy(port))
    netloc = f"127.0.0.1:{link.port}"
    settings = {"allow": (at(netloc, f"{name}/" if kind == "folder" else ""),)}
    return Origin(kind, f"http://{netloc}/{name}/", put, link, folder, server, settings)
