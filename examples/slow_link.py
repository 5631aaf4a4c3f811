"""Three adapters over a slow link: when each layer is ready, and a trace of it: docs/tracing.md.

In a clone: python examples/slow_link.py
            python examples/slow_link.py --base smollm2 --trace demo.json

The process serves the adapters to itself over one link, with a cache that is empty at first and
removed afterwards. With --base, a prompt for each goes through that model, layer by layer as they
arrive; otherwise its shapes suffice.
"""

import argparse
import asyncio
import hashlib
import re
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lorax_async import AdapterLoader, Allow, LoaderConfig, Verification, layouts
from lorax_async.engines.smollm2 import prepare_base, smollm2_layout

ADAPTERS = Path(__file__).parent / "adapters"
NAMES = ("pirate", "shout", "json")
FILES = ("adapter_config.json", "adapter_model.safetensors")
RATE = 1_400_000.0  # bytes per second of the link: two to three seconds for all three
PROMPT_TOKENS = 96
COLUMNS = 50


class SlowLink:
    """What all connections share: `rate` bytes per second, until it is cut."""

    def __init__(self, rate: float) -> None:
        self.cut = threading.Event()
        self._rate, self._free_at, self._lock = rate, 0.0, threading.Lock()

    def wait(self, nbytes: int) -> None:
        """Block until `nbytes` are through. Raises `BrokenPipeError` when the link is cut."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self._rate
            seconds = self._free_at - now
        if self.cut.wait(seconds):
            raise BrokenPipeError("the link was cut")


class Handler(BaseHTTPRequestHandler):
    """Answers GET of a file, whole or a range, with its ETag and digest."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def __init__(self, files: dict[str, bytes], link: SlowLink, *connection: Any) -> None:
        self.files, self.link = files, link
        super().__init__(*connection)

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        if content is None:
            self._send(404, {})
            return
        sha256 = hashlib.sha256(content)
        digest = f"sha-256=:{b64encode(sha256.digest()).decode()}:"
        fields = {"ETag": f'"{sha256.hexdigest()[:32]}"', "Repr-Digest": digest}
        wanted = re.fullmatch(r"bytes=([0-9]{1,15})-([0-9]{1,15})", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, fields, content)
            return
        size, start = len(content), int(wanted[1])
        stop = min(int(wanted[2]) + 1, size)
        if start >= stop:
            self._send(416, {})
            return
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self._send(206, fields | part, content[start:stop])

    def _send(self, status: int, fields: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content), 8192):
            chunk = content[start : start + 8192]
            self.link.wait(len(chunk))
            self.wfile.write(chunk)

    def handle(self) -> None:
        with suppress(OSError):  # the other end is gone
            super().handle()

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes], rate: float) -> Iterator[int]:
    """Serve files, by their paths, at a port of loopback, which it yields."""
    link = SlowLink(rate)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files, link)) as server:
        server.daemon_threads = False  # leaving the block joins the connections' threads
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            link.cut.set()
            server.shutdown()
            thread.join()


class Arrival(NamedTuple):
    """When each layer of an adapter was ready, in seconds, and how its file was verified."""

    name: str
    times: list[float]
    checked: Verification


async def load_all(
    port: int, cache: str, base: str | None = None, trace: Path | None = None
) -> list[Arrival]:
    """Load all three at once; with a base model, each prompt follows its adapter's layers."""
    model = None
    if base is not None:
        from transformers import AutoModelForCausalLM

        folder = await asyncio.to_thread(prepare_base) if base == "smollm2" else base
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = LoaderConfig(
        dtype=None if model is None else "float32",
        device_bytes="32MiB",
        max_slots=len(NAMES),
        connections=1,  # more gain nothing on one link, and would hide the layers' order
        allow=(Allow("http", "127.0.0.1", port),),
        cache_dir=cache,
    )
    layout = smollm2_layout() if model is None else layouts.from_module(model)
    async with AdapterLoader(layout, config) as loader:
        with loader.trace() as recorded:
            began = time.perf_counter()

            async def load(name: str) -> Arrival:
                async with loader.stream(f"http://127.0.0.1:{port}/{name}/") as handle:
                    times = []
                    for layer in handle.layers:
                        await handle.layer_ready(layer)
                        times.append(time.perf_counter() - began)
                    return Arrival(name, times, await handle.verified())

            async with asyncio.TaskGroup() as group:
                loads = [group.create_task(load(name)) for name in NAMES]
                if model is not None:
                    group.create_task(compute_all(model, loader, port))
        if trace is not None:
            recorded.write(trace)
        return [task.result() for task in loads]


async def compute_all(model: Any, loader: AdapterLoader, port: int) -> None:
    """Send a prompt for each adapter through the model, one after the other."""
    import torch

    from lorax_async.engines.transformers import attach

    ids = torch.arange(PROMPT_TOKENS).unsqueeze(0) % model.config.vocab_size

    @torch.inference_mode()
    def compute() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores are for the link's server and the copies
    try:
        with attach(model, loader) as attached:
            for name in NAMES:
                async with loader.stream(f"http://127.0.0.1:{port}/{name}/") as handle:
                    with attached.batch([handle]):
                        await asyncio.to_thread(compute)
    finally:
        torch.set_num_threads(threads)


def draw(times: list[float], seconds: float) -> str:
    """Draw how many layers were ready, over `seconds`."""
    marks = ""
    for column in range(1, COLUMNS + 1):
        ready = sum(at <= seconds * column / COLUMNS for at in times)
        marks += "▁▂▃▄▅▆▇█"[-(-ready * 8 // len(times)) - 1] if ready else "·"
    return marks


def run(base: str | None = None, trace: Path | None = None, rate: float = RATE) -> list[Arrival]:
    files = {
        f"/{name}/{file}": (ADAPTERS / name / file).read_bytes() for name in NAMES for file in FILES
    }
    with serving(files, rate) as port, TemporaryDirectory(prefix="slow-link-") as cache:
        return asyncio.run(load_all(port, cache, base, trace))


def main() -> None:
    parser = argparse.ArgumentParser(description="Load three adapters over a slow link.")
    parser.add_argument("--base", help="smollm2, or a folder of such a model")
    parser.add_argument("--trace", type=Path, help="write a trace to this file")
    given = parser.parse_args()
    arrivals = run(given.base, given.trace)
    seconds = max(arrival.times[-1] for arrival in arrivals)
    for name, times, checked in arrivals:
        first, last = 1e3 * times[0], 1e3 * times[-1]
        print(f"{name:6}  {draw(times, seconds)}  {first:.0f} to {last:.0f} ms, {checked.kind}")
    column = f"a column is {1e3 * seconds / COLUMNS:.0f} ms"
    print(f"layers that are ready; {column}; the link has {RATE / 1e6:g} MB/s")


if __name__ == "__main__":
    main()
