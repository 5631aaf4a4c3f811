"""`lorax-async demo-remote`: adapters come over a slow link, and their first layers long before."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import re
import threading
import time
from base64 import b64encode
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from lorax_async import layouts
from lorax_async.cli.arguments import OK, AddParser, add_base, add_command
from lorax_async.cli.measure import (
    LoadProgress,
    load_as_json,
    load_at_once,
    loads_of,
    run_on_uvloop,
)
from lorax_async.cli.terminal import ProgressBars, Terminal, milliseconds, size, spans
from lorax_async.cli.timeline import add_trace, traced
from lorax_async.config import LoaderConfig
from lorax_async.errors import ConfigError
from lorax_async.ids.allow import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.sources.local_folder import CONFIG, WEIGHTS
from lorax_async.types import AdapterRef, Verification

CHUNK = 8 << 10
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")


class SlowLink:
    """A line that brings `rate` bytes per second, for all who use it together."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._ended = threading.Event()

    def wait(self, nbytes: int) -> None:
        """Until so many bytes are through. Raises `BrokenPipeError` when the line is cut."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self._rate
            seconds = self._free_at - now
        if self._ended.wait(seconds):
            raise BrokenPipeError("the link was cut")

    def cut(self) -> None:
        self._ended.set()


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A file with its strong ETag and its digest, as fields of a response have them."""

    content: memoryview
    etag: str
    digest: str

    @classmethod
    def of(cls, content: bytes) -> Self:
        found = hashlib.sha256(content)
        digest = f"sha-256=:{b64encode(found.digest()).decode()}:"
        return cls(memoryview(content), f'"{found.hexdigest()[:32]}"', digest)


class SlowServer(ThreadingHTTPServer):
    """Serves `files` by their targets, in threads of its own, while it is entered.

    Ranges are served, and the digest is sent along; all else is a 404.
    """

    daemon_threads = False

    def __init__(self, files: Mapping[str, bytes], rate: float) -> None:
        self.served = {target: ServedFile.of(content) for target, content in files.items()}
        self.link = SlowLink(rate)
        super().__init__(("127.0.0.1", 0), _SlowHandler)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.01,), name="lorax-slow-server"
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Clients are to have left: their threads are waited for."""
        self.link.cut()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def url(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{folder}/"


class _SlowHandler(BaseHTTPRequestHandler):
    server: SlowServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def do_GET(self) -> None:
        served = self.server.served.get(self.path)
        if served is None:
            self._head(404, 0)
            return
        size = len(served.content)
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        fields = {"ETag": served.etag, "Repr-Digest": served.digest}
        if asked is None:
            self._head(200, size, **fields)
            self._send(served.content)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, size)
        if start >= stop:
            self._head(416, 0)
            return
        fields["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._head(206, stop - start, **fields)
        self._send(served.content[start:stop])

    def finish(self) -> None:
        with suppress(OSError):  # the other end is gone
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # the other end is gone
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""

    def _head(self, status: int, length: int, **fields: str) -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK):
            chunk = content[start : start + CHUNK]
            self.server.link.wait(len(chunk))
            self.wfile.write(chunk)


ADAPTERS = ("pirate", "shout", "json")

RATE = 1_400_000.0
"""Bytes per second of the whole link: the three adapters take two to three seconds."""

COLUMNS = 50
_HEIGHTS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class RemoteDemoResult:
    """What came out: the loads, over a link of `rate` bytes per second, of `nbytes` in all."""

    loads: tuple[LoadProgress, ...]
    verifications: tuple[Verification, ...]
    rate: float
    nbytes: int


def add_to(add: AddParser) -> None:
    about = "load the demo's adapters over a slow link, and show when each layer came"
    more = (
        "They are served on loopback by this process, at 1.4 MB/s, into a cache that is empty at"
        " first and gone afterwards. No base model is needed, only its shapes; with --base, prompts"
        " go through that model, whose layers compute as soon as their adapters' layers are here."
    )
    parser = add_command(add, "demo-remote", about, _demo_remote, more)
    add_adapters(parser)
    add_base(parser, required=False)
    add_trace(parser)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters",
        type=Path,
        default=Path("examples/adapters"),
        metavar="DIR",
        help="the folder with pirate, shout and json (default: %(default)s, as in a checkout)",
    )


def adapters_in(folder: Path) -> list[Path]:
    """The three folders. Raises `ConfigError` where one is missing."""
    paths = [folder / name for name in ADAPTERS]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise ConfigError(
            f"the demo's adapters are not here: {', '.join(missing)}; run it in a checkout of the"
            " project, or give their folder with --adapters"
        )
    return paths


def _demo_remote(arguments: argparse.Namespace, terminal: Terminal) -> int:
    demo = run_remote_demo(arguments.adapters, terminal, base=arguments.base, trace=arguments.trace)
    if arguments.json:
        terminal.json(_as_json(demo))
    else:
        _show(demo, terminal)
    return OK


def run_remote_demo(
    folder: Path,
    terminal: Terminal,
    rate: float = RATE,
    *,
    base: str | None = None,
    trace: Path | None = None,
) -> RemoteDemoResult:
    """Serve the adapters in `folder` at `rate` bytes per second, and load all three at once.

    With a `base`, a prompt for each goes through that model meanwhile; a `trace` is a file for what
    happens when.

    Raises `ConfigError` where they are not there, and whatever a load raises.
    """
    files = {
        f"/{path.name}/{name}": (path / name).read_bytes()
        for path in adapters_in(folder)
        for name in (CONFIG, WEIGHTS)
    }
    model = None if base is None else _model(base, terminal)
    with SlowServer(files, rate) as server, TemporaryDirectory(prefix="lorax-async-") as cache:
        config = LoaderConfig(
            dtype=None if model is None else "float32",
            device_bytes=32 << 20,
            max_slots=len(ADAPTERS),
            connections=1,  # more would gain nothing on one line, and hide the layers' order
            allow=(Allow("http", "127.0.0.1", server.server_port),),
            cache_dir=cache,
        )
        loads = loads_of([AdapterRef(server.url(name)) for name in ADAPTERS])
        for load, name in zip(loads, ADAPTERS, strict=True):
            load.name = name
        verifications = run_on_uvloop(_load(config, loads, terminal, model, trace))
    return RemoteDemoResult(tuple(loads), verifications, rate, sum(map(len, files.values())))


async def _load(
    config: LoaderConfig,
    loads: Sequence[LoadProgress],
    terminal: Terminal,
    model: Any,
    trace: Path | None,
) -> tuple[Verification, ...]:
    layout = smollm2_layout() if model is None else layouts.from_module(model)
    async with AdapterLoader(layout, config) as loader:
        try:
            with terminal.bars() as bars, traced(loader, trace):
                await _load_and_compute(loader, loads, bars, model)
            return tuple([await _verified(load) for load in loads])
        finally:
            for load in loads:
                load.release()


async def _load_and_compute(
    loader: AdapterLoader, loads: Sequence[LoadProgress], bars: ProgressBars, model: Any
) -> None:
    if model is None:
        await load_at_once(loader, loads, bars.show, hold=True)
        return
    from lorax_async.cli.demo import stream_through  # noqa: PLC0415

    async with asyncio.TaskGroup() as group:
        group.create_task(load_at_once(loader, loads, bars.show, hold=True), name="loads")
        refs = [load.ref for load in loads]
        group.create_task(stream_through(model, loader, refs), name="passes")


def _model(base: str, terminal: Terminal) -> Any:
    from lorax_async.cli.demo import base_model  # noqa: PLC0415

    with terminal.steps() as report:
        return base_model(base, report)


async def _verified(load: LoadProgress) -> Verification:
    if load.error is not None:
        raise load.error
    assert load.handle is not None
    return await load.handle.verified()


def smollm2_layout() -> ModelLayout:
    """The linear modules of the demo's base, which has 30 layers of hidden size 576."""
    hidden, middle, heads = 576, 1536, 192
    shapes = (
        ("self_attn.q_proj", hidden, hidden, Parallelism.COLUMN),
        ("self_attn.k_proj", hidden, heads, Parallelism.COLUMN),
        ("self_attn.v_proj", hidden, heads, Parallelism.COLUMN),
        ("self_attn.o_proj", hidden, hidden, Parallelism.ROW),
        ("mlp.gate_proj", hidden, middle, Parallelism.COLUMN),
        ("mlp.up_proj", hidden, middle, Parallelism.COLUMN),
        ("mlp.down_proj", middle, hidden, Parallelism.ROW),
    )
    modules = [
        Module(f"model.layers.{layer}.{name}", into, out, layer, parallel)
        for layer in range(30)
        for name, into, out, parallel in shapes
    ]
    return ModelLayout(tuple(modules), 30, "BF16", "model.")


def picture(came: Sequence[float], seconds: float) -> str:
    """How many of the layers were there, column by column, from the call of `load` on."""
    marks = ""
    for column in range(1, COLUMNS + 1):
        there = bisect_right(came, seconds * column / COLUMNS)
        height = math.ceil(there * len(_HEIGHTS) / len(came))
        marks += _HEIGHTS[height - 1] if there else "·"
    return marks


def _show(demo: RemoteDemoResult, terminal: Terminal) -> None:
    columns = ("adapter", "layers", " on device", " first layer", " resident", "checked by")
    rows = zip(demo.loads, demo.verifications, strict=True)
    terminal.table(columns, [(*_row(load), found.kind) for load, found in rows])
    seconds = max(load.resident or 0.0 for load in demo.loads)
    pictures = [(load.name, picture(load.came, seconds)) for load in demo.loads]
    column = milliseconds(seconds / COLUMNS)
    terminal.say(f"layers on the device; each column is {column}", "bold")
    terminal.pairs(pictures)
    terminal.say()
    link = f"{demo.rate / 1e6:g} MB/s for all three, on loopback; {size(demo.nbytes)} to bring"
    terminal.pairs([("link", link), ("times", "from load(), called for all three in one turn")])


def _row(load: LoadProgress) -> tuple[str, ...]:
    assert load.nbytes is not None
    return (
        load.name,
        spans(load.layers),
        size(load.nbytes),
        milliseconds(load.first_layer),
        milliseconds(load.resident),
    )


def _as_json(demo: RemoteDemoResult) -> dict[str, object]:
    adapters = [
        load_as_json(load)
        | {"layers_ms": [round(each * 1e3, 3) for each in load.came], "checked": asdict(found)}
        for load, found in zip(demo.loads, demo.verifications, strict=True)
    ]
    return {"adapters": adapters, "rate": demo.rate, "bytes": demo.nbytes}
