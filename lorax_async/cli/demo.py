"""`lorax-async demo` and `demo-remote`: the example adapters, in one batch and over a slow link."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import math
import re
import threading
import time
from base64 import b64encode
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from lorax_async import layouts
from lorax_async.cli.command_line import (
    ABOUTS,
    OK,
    AddParser,
    ProgressBars,
    Terminal,
    add_base,
    add_command,
    base_folder,
    format_ms,
    format_size,
    in_ms,
    run_on_uvloop,
)
from lorax_async.cli.load import (
    LoadProgress,
    LoopStall,
    add_trace,
    create_loads,
    load_at_once,
    record_trace,
    with_ticker,
)
from lorax_async.cli.serve import serve_commands
from lorax_async.concurrency import IsWanted, in_thread
from lorax_async.config import LoaderConfig
from lorax_async.engines.smollm2 import smollm2_layout
from lorax_async.errors import ConfigError
from lorax_async.handle import AdapterHandle
from lorax_async.ids import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.sources.local import CONFIG, WEIGHTS
from lorax_async.types import AdapterRef, Verification

ADAPTERS = ("pirate", "shout", "json")

PROMPT = "What is ice?"
"""A prompt of the adapters' training data: the smallest adapter knows little else."""

MAX_NEW_TOKENS = 32
PROMPT_TOKENS = 96
"""Of each prompt through the model of `demo-remote --base`."""

IDLE_SECONDS = 0.25
"""How long the idle loop is measured before the loads; they take about a tenth of that."""

RATE = 1_400_000.0
"""Bytes per second of the link: the three adapters take two to three seconds."""

CHUNK = 8 << 10
COLUMNS = 50
_HEIGHTS = "▁▂▃▄▅▆▇█"
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")


def add_to(add: AddParser) -> None:
    about = ABOUTS["demo"]
    parser = add_command(add, "demo", about, _demo)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to ask (default: what all three know)"
    )
    _add_adapters(parser)
    about = ABOUTS["demo-remote"]
    more = (
        "This process serves them on loopback at 1.4 MB/s, into an empty, temporary cache. With"
        " --base, prompts run through that model, each layer as soon as the adapter's layer is"
        " ready; otherwise no base model is needed, only its shapes."
    )
    parser = add_command(add, "demo-remote", about, _demo_remote, more)
    _add_adapters(parser)
    add_base(parser, required=False)
    add_trace(parser)


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters",
        type=Path,
        default=Path("examples/adapters"),
        metavar="DIR",
        help="the folder with pirate, shout and json (default: %(default)s, of a checkout)",
    )


def _find_adapters(folder: Path) -> list[Path]:
    """Return the folders of the demo's adapters. Raises `ConfigError` if one is missing."""
    paths = [folder / name for name in ADAPTERS]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise ConfigError(
            f"the demo's adapters are missing: {', '.join(missing)}; run the command in a"
            " checkout of the project, or give their folder with --adapters"
        )
    return paths


def _load_model(base: str, report: Callable[[str], None]) -> tuple[Any, Path]:
    """Return a base model in float32 and eval mode, and its folder. Blocks for seconds."""
    folder = base_folder(base, report)
    report("loading the base model")
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    # transformers draws progress bars on any stderr, even a pipe.
    logging: Any = importlib.import_module("transformers.utils.logging")  # untyped
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def _torch_threads(count: int | None = None) -> Iterator[None]:
    """Limit torch to `count` threads, or to half of those it has."""
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(count or max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


async def _load_all(
    loader: AdapterLoader, loads: Sequence[LoadProgress], bars: ProgressBars
) -> None:
    """Load all at once and hold them; raise the first error."""
    await load_at_once(loader, loads, bars, hold=True)
    for load in loads:
        if load.error is not None:
            raise load.error


# -- demo -----------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace, terminal: Terminal) -> int:
    folder, prompt = arguments.adapters, arguments.prompt or PROMPT
    paths = _find_adapters(folder)  # fail before the base is loaded
    began = time.perf_counter()
    # Import and load before the loop starts: both block for seconds, and Ctrl-C ends them at once.
    with terminal.steps("looking for the base model") as report:
        model, base = _load_model("smollm2", report)
        from transformers import AutoTokenizer  # noqa: PLC0415

        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    prepared = time.perf_counter() - began
    loads = create_loads(paths)
    demo = run_on_uvloop(_run_demo(model, tokenizer, loads, prompt, terminal))
    if arguments.json:
        adapters = [load.as_json() for load in loads]
        prepare = {"prepare_s": round(prepared, 3)}
        terminal.json({"prompt": prompt, "adapters": adapters} | demo | prepare)
        return OK
    terminal.say(prompt, "bold")
    terminal.say()
    terminal.pairs(
        [(it["by"], " ".join(it["text"].split()) + " …" * it["cut"]) for it in demo["answers"]]
    )
    terminal.table([_cells(load, "state") for load in loads])
    stalls = {
        when: f"{milliseconds:.1f} ms (1 ms ticker, {demo['ticks'][when]} ticks)"
        for when, milliseconds in demo["stall_ms"].items()
    }
    again = f"{demo['again_resident_ms']:.1f} ms for all three, by a second loader"
    terminal.pairs([
        ("times", "from load(), called for all three in one iteration of the event loop"),
        ("second load", again),
        ("longest stall", f"{stalls['loading']} during the loads"),
        ("", f"{stalls['idle']} in the idle loop before"),
        ("answers", f"{demo['generate_s']:.1f} s for four rows in one batch, fp32, greedy"),
    ])  # fmt: skip
    terminal.say()
    terminal.say("To serve the adapters, and query one:", "bold")
    for command in serve_commands(folder):
        terminal.say(command)
    return OK


def _cells(load: LoadProgress, *without: str) -> dict[str, str]:
    return {name: cell for name, cell in load.cells().items() if name not in without}


async def _run_demo(
    model: Any, tokenizer: Any, loads: Sequence[LoadProgress], prompt: str, terminal: Terminal
) -> dict[str, Any]:
    """Load, attach and generate; return answers and times as JSON has them.

    "stall_ms" are the loop's longest stalls during the loads, and in the idle loop before.
    "again_resident_ms" is the time that a second loader of the same process takes to load all
    three: the first load of a process pays for warming up, too.
    """
    from lorax_async.engines.transformers import attach  # noqa: PLC0415 - imports its kernels

    layout = layouts.from_module(model)
    config = LoaderConfig(dtype="float32", device_bytes=32 << 20, max_slots=len(ADAPTERS))
    async with AdapterLoader(layout, config) as loader:
        try:
            with terminal.bars() as bars:
                _, idle = await with_ticker(asyncio.sleep(IDLE_SECONDS))
                _, stall = await with_ticker(_load_all(loader, loads, bars))
            async with AdapterLoader(layout, config) as second:
                again = create_loads([load.ref for load in loads])
                await _load_all(second, again, ProgressBars(None))
                for load in again:
                    load.release()
            began = time.perf_counter()
            rows: list[AdapterHandle | None] = [None, *(load.handle for load in loads)]
            step = "four rows, one batch: the base and the three adapters"
            with terminal.steps(step), attach(model, loader) as attached, attached.batch(rows):
                run = copy_context().run  # the batch assigns rows in this context
                answers = await in_thread(
                    lambda wanted: run(_answer, model, tokenizer, prompt, len(rows), wanted)
                )
            generated = time.perf_counter() - began
        finally:
            for load in loads:
                load.release()
    names = ["base", *(load.name for load in loads)]
    stalls: dict[str, LoopStall] = {"loading": stall, "idle": idle}
    return {
        "answers": [
            {"by": name, "text": text, "cut": cut}
            for name, (text, cut) in zip(names, answers, strict=True)
        ],
        "again_resident_ms": in_ms(max(load.resident or 0.0 for load in again)),
        "stall_ms": {when: in_ms(stall.longest) for when, stall in stalls.items()},
        "ticks": {when: stall.ticks for when, stall in stalls.items()},
        "generate_s": round(generated, 3),
    }


def _answer(
    model: Any, tokenizer: Any, prompt: str, rows: int, is_wanted: IsWanted
) -> list[tuple[str, bool]]:
    """Answer the prompt greedily in `rows` rows; return each text and whether it was cut."""
    import torch  # noqa: PLC0415
    from transformers import StoppingCriteriaList  # noqa: PLC0415

    def is_stopped(ids: torch.Tensor, _: object, **__: object) -> torch.Tensor:
        return torch.full((len(ids),), not is_wanted(), device=ids.device)

    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([text] * rows, return_tensors="pt", padding=True)
    with _torch_threads():  # OpenMP's threads spin, and on all cores took 7x as long
        out = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([is_stopped]),
        )
    end = tokenizer.eos_token_id
    return [
        (tokenizer.decode(row, skip_special_tokens=True).strip(), end not in row)
        for row in out[:, inputs["input_ids"].shape[1] :]
    ]


# -- demo-remote ----------------------------------------------------------------------------------


def _demo_remote(arguments: argparse.Namespace, terminal: Terminal) -> int:
    loads, checks, nbytes = run_remote_demo(
        arguments.adapters, terminal, base=arguments.base, trace=arguments.trace
    )
    rows = list(zip(loads, checks, strict=True))
    if arguments.json:
        adapters = [
            load.as_json()
            | {"layers_ms": [in_ms(seconds) for seconds in load.ready_times]}
            | {"checked": asdict(check)}
            for load, check in rows
        ]
        terminal.json({"adapters": adapters, "rate": RATE, "bytes": nbytes})
        return OK
    terminal.table(
        [_cells(load, "state", " file") | {"checked by": check.kind} for load, check in rows]
    )
    seconds = max(load.resident or 0.0 for load in loads)
    terminal.say(f"layers on the device; each column is {format_ms(seconds / COLUMNS)}", "bold")
    terminal.pairs([(load.name, _draw(load.ready_times, seconds)) for load in loads])
    terminal.say()
    link = f"{RATE / 1e6:g} MB/s for all three, on loopback; {format_size(nbytes)} in all"
    terminal.pairs([("link", link), ("times", "from load(), called for all three at once")])
    return OK


def _draw(ready_times: Sequence[float], seconds: float) -> str:
    """Draw how many layers were ready over the `seconds` from the call of `load`."""
    marks = ""
    for column in range(1, COLUMNS + 1):
        ready = bisect_right(ready_times, seconds * column / COLUMNS)
        height = math.ceil(ready * len(_HEIGHTS) / len(ready_times))
        marks += _HEIGHTS[height - 1] if ready else "·"
    return marks


def run_remote_demo(
    folder: Path,
    terminal: Terminal,
    rate: float = RATE,
    *,
    base: str | None = None,
    trace: Path | None = None,
) -> tuple[list[LoadProgress], list[Verification], int]:
    """Serve the adapters in `folder` at `rate` bytes per second, and load all three at once.

    With a `base`, also run one prompt per adapter through that model. `trace` is a file to write
    the trace to. Return the loads, how each was verified, and the bytes of all files.

    Raises `ConfigError` if an adapter is missing, and what a load raises.
    """
    files = {
        f"/{path.name}/{name}": (path / name).read_bytes()
        for path in _find_adapters(folder)
        for name in (CONFIG, WEIGHTS)
    }
    model = None
    if base is not None:
        with terminal.steps("looking for the base model") as report:
            model, _ = _load_model(base, report)
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
        checks = run_on_uvloop(_load_remote(config, loads, terminal, model, trace))
    return loads, checks, sum(map(len, files.values()))


async def _load_remote(
    config: LoaderConfig,
    loads: Sequence[LoadProgress],
    terminal: Terminal,
    model: Any,
    trace: Path | None,
) -> list[Verification]:
    layout = smollm2_layout() if model is None else layouts.from_module(model)
    async with AdapterLoader(layout, config) as loader:
        try:
            with terminal.bars() as bars, record_trace(loader, trace):
                async with asyncio.TaskGroup() as group:
                    group.create_task(load_at_once(loader, loads, bars, hold=True), name="loads")
                    if model is not None:
                        group.create_task(_stream_through(model, loader, loads), name="passes")
            checks = []
            for load in loads:
                if load.error is not None:
                    raise load.error
                assert load.handle is not None
                checks.append(await load.handle.verified())
            return checks
        finally:
            for load in loads:
                load.release()


async def _stream_through(model: Any, loader: AdapterLoader, loads: Sequence[LoadProgress]) -> None:
    """Run one prompt after another, each through its adapter's layers as they become ready."""
    import torch  # noqa: PLC0415

    from lorax_async.engines.transformers import attach  # noqa: PLC0415

    def compute() -> None:
        ids = torch.arange(PROMPT_TOKENS).unsqueeze(0) % model.config.vocab_size
        # Leave the other cores to the slow link's server and to the copies.
        with torch.inference_mode(), _torch_threads(1):
            model(ids, use_cache=False, logits_to_keep=1)

    with attach(model, loader) as attached:
        for load in loads:
            async with loader.stream(load.ref) as handle:
                with attached.batch([handle]):
                    await asyncio.to_thread(compute)


# -- the slow link --------------------------------------------------------------------------------


class SlowServer(ThreadingHTTPServer):
    """A server of `files`, by request target, that runs in its own threads while entered.

    All connections share a link of `rate` bytes per second. It supports ranges and sends digests;
    other targets get a 404.
    """

    daemon_threads = False

    def __init__(self, files: Mapping[str, bytes], rate: float) -> None:
        self.files = {target: _describe(content) for target, content in files.items()}
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._cut = threading.Event()
        super().__init__(("127.0.0.1", 0), _SlowHandler)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.01,), name="lorax-slow-server"
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Cut the link and join all threads. Clients must have disconnected."""
        self._cut.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def url(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{folder}/"

    def wait(self, nbytes: int) -> None:
        """Block until `nbytes` are through. Raises `BrokenPipeError` when the link is cut."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self._rate
            seconds = self._free_at - now
        if self._cut.wait(seconds):
            raise BrokenPipeError("the link was cut")


def _describe(content: bytes) -> tuple[memoryview, dict[str, str]]:
    """Return a file's content, and its strong ETag and digest as response header fields."""
    sha256 = hashlib.sha256(content)
    digest = f"sha-256=:{b64encode(sha256.digest()).decode()}:"
    return memoryview(content), {"ETag": f'"{sha256.hexdigest()[:32]}"', "Repr-Digest": digest}


class _SlowHandler(BaseHTTPRequestHandler):
    server: SlowServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def do_GET(self) -> None:
        if self.path not in self.server.files:
            self._send(404, {})
            return
        content, fields = self.server.files[self.path]
        size = len(content)
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, fields, content)
            return
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
        if start >= stop:
            self._send(416, {})
            return
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self._send(206, fields | part, content[start:stop])

    def _send(
        self, status: int, fields: Mapping[str, str], content: bytes | memoryview = b""
    ) -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content), CHUNK):
            chunk = content[start : start + CHUNK]
            self.server.wait(len(chunk))
            self.wfile.write(chunk)

    def finish(self) -> None:
        with suppress(OSError):  # the other end is gone
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # the other end is gone
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Discard the message."""
