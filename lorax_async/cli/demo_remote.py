"""`lorax-async demo-remote`: load adapters over a slow link and show when each layer is ready."""

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
from lorax_async.cli.load import (
    LoadProgress,
    create_loads,
    in_ms,
    load_as_json,
    load_at_once,
    run_on_uvloop,
)
from lorax_async.cli.terminal import ProgressBars, Terminal, format_ms, format_runs, format_size
from lorax_async.cli.timeline import add_trace, record_trace
from lorax_async.config import LoaderConfig
from lorax_async.errors import ConfigError
from lorax_async.ids import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.sources.local import CONFIG, WEIGHTS
from lorax_async.types import AdapterRef, Verification

CHUNK = 8 << 10
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")


class SlowLink:
    """A link of `rate` bytes per second, shared by all connections."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._ended = threading.Event()

    def wait(self, nbytes: int) -> None:
        """Block until `nbytes` are through. Raises `BrokenPipeError` when the link is cut."""
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
    """A file, with its strong ETag and digest as response header fields."""

    content: memoryview
    etag: str
    digest: str

    @classmethod
    def of(cls, content: bytes) -> Self:
        sha256 = hashlib.sha256(content)
        digest = f"sha-256=:{b64encode(sha256.digest()).decode()}:"
        return cls(memoryview(content), f'"{sha256.hexdigest()[:32]}"', digest)


class SlowServer(ThreadingHTTPServer):
    """A server of `files`, by request target, that runs in its own threads while entered.

    Supports ranges and sends digests. Other targets get a 404.
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
        """Cut the link and join all threads. Clients must have disconnected."""
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
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        fields = {"ETag": served.etag, "Repr-Digest": served.digest}
        if wanted is None:
            self._head(200, size, **fields)
            self._send(served.content)
            return
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
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
        """Discard the message."""

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
"""Bytes per second of the link: the three adapters take two to three seconds."""

COLUMNS = 50
_HEIGHTS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class RemoteDemoResult:
    """The loads over a link of `rate` bytes per second; `nbytes` is the size of all files."""

    loads: tuple[LoadProgress, ...]
    verifications: tuple[Verification, ...]
    rate: float
    nbytes: int


def add_to(add: AddParser) -> None:
    about = "load the demo's adapters over a slow link and show when each layer is ready"
    more = (
        "This process serves them on loopback at 1.4 MB/s, into an empty, temporary cache. With"
        " --base, prompts run through that model, each layer as soon as the adapter's layer is"
        " ready; otherwise no base model is needed, only its shapes."
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
        help="the folder with pirate, shout and json (default: %(default)s, of a checkout)",
    )


def adapters_in(folder: Path) -> list[Path]:
    """Return the folders of the demo's adapters. Raises `ConfigError` if one is missing."""
    paths = [folder / name for name in ADAPTERS]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise ConfigError(
            f"the demo's adapters are missing: {', '.join(missing)}; run the command in a"
            " checkout of the project, or give their folder with --adapters"
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

    With a `base`, also run one prompt per adapter through that model. `trace` is a file to write
    the trace to.

    Raises `ConfigError` if an adapter is missing, and what a load raises.
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
            connections=1,  # more gain nothing on one link, and would hide the layer order
            allow=(Allow("http", "127.0.0.1", server.server_port),),
            cache_dir=cache,
        )
        loads = create_loads([AdapterRef(server.url(name)) for name in ADAPTERS])
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
            with terminal.bars() as bars, record_trace(loader, trace):
                await _load_and_compute(loader, loads, bars, model)
            return tuple([await _verify(load) for load in loads])
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
    from lorax_async.cli.demo import load_base_model  # noqa: PLC0415

    with terminal.steps() as report:
        return load_base_model(base, report)


async def _verify(load: LoadProgress) -> Verification:
    if load.error is not None:
        raise load.error
    assert load.handle is not None
    return await load.handle.verified()


def smollm2_layout() -> ModelLayout:
    """Return the layout of the demo's base: linear modules of 30 layers of hidden size 576."""
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


def sparkline(ready_times: Sequence[float], seconds: float) -> str:
    """Draw how many layers were ready over the `seconds` from the call of `load`."""
    marks = ""
    for column in range(1, COLUMNS + 1):
        ready = bisect_right(ready_times, seconds * column / COLUMNS)
        height = math.ceil(ready * len(_HEIGHTS) / len(ready_times))
        marks += _HEIGHTS[height - 1] if ready else "·"
    return marks


def _show(demo: RemoteDemoResult, terminal: Terminal) -> None:
    columns = ("adapter", "layers", " on device", " first layer", " resident", "checked by")
    rows = zip(demo.loads, demo.verifications, strict=True)
    terminal.table(columns, [(*_row(load), verification.kind) for load, verification in rows])
    seconds = max(load.resident or 0.0 for load in demo.loads)
    sparklines = [(load.name, sparkline(load.ready_times, seconds)) for load in demo.loads]
    column = format_ms(seconds / COLUMNS)
    terminal.say(f"layers on the device; each column is {column}", "bold")
    terminal.pairs(sparklines)
    terminal.say()
    link = f"{demo.rate / 1e6:g} MB/s for all three, on loopback; {format_size(demo.nbytes)} in all"
    terminal.pairs([("link", link), ("times", "from load(), called for all three at once")])


def _row(load: LoadProgress) -> tuple[str, ...]:
    assert load.nbytes is not None
    return (
        load.name,
        format_runs(load.layers),
        format_size(load.nbytes),
        format_ms(load.first_layer),
        format_ms(load.resident),
    )


def _as_json(demo: RemoteDemoResult) -> dict[str, object]:
    adapters = [
        load_as_json(load)
        | {"layers_ms": [in_ms(seconds) for seconds in load.ready_times]}
        | {"checked": asdict(verification)}
        for load, verification in zip(demo.loads, demo.verifications, strict=True)
    ]
    return {"adapters": adapters, "rate": demo.rate, "bytes": demo.nbytes}
