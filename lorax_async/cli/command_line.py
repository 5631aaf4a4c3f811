"""What commands share: exit statuses, options and their types, and output on a terminal."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar, get_args

from lorax_async.config import DTYPES, HubCache, parse_size
from lorax_async.errors import (
    ConfigError,
    InvalidAdapterIdError,
    LoraxError,
    UsageError,
    class_name,
    install_command,
    shorten,
)
from lorax_async.ids import Allow, allow_ref, parse_ref, parse_source
from lorax_async.types import AdapterRef
from lorax_async.urls import DEFAULT_PORTS

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

    from lorax_async.planning.layout import ModelLayout

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses. argparse exits with `REFUSED` on wrong usage."""

ABOUTS = {
    "inspect": "describe an adapter, and list every reason to refuse it",
    "convert": "write adapter_model.bin, a pickle, as safetensors, without running its code",
    "load": "load adapters, all at once, and report times",
    "fetch": "download adapters into the disk cache and verify them; no base model is needed",
    "cache": "list, verify and clean the adapter cache",
    "demo": "load three adapters into a small model and let them answer in one batch",
    "serve": "serve a base model and its adapters to OpenAI clients",
    "plan": "compute how many adapters fit a device, and what all of them take",
    "timeline": "draw a trace: when each layer was copied and computed, and how much these overlap",
}
"""The commands, and what each does."""

AddParser = Callable[..., argparse.ArgumentParser]
Command = Callable[[argparse.Namespace, "Terminal"], int]
T = TypeVar("T")

SIZE_HELP = "a number, or one with KiB, MiB, GiB or TiB"
ID_HELP = "org/name[@revision] on the hub, s3://…, gs://…, az://…, or https://… of a folder"
BASE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors")
"""What of a base model's repository is downloaded."""

TOKENS = (
    "The hub gets the token in HF_TOKEN, or the one that `hf auth login` stored; object stores get"
    " the environment's credentials. No option takes these: other users can see command lines."
)
SIMULATION = "benchmarks/simulate_capacity.py, in a checkout of the project,"
PIPE_WIDTH = 5_000
"""Columns of a table in a pipe or file, wide enough not to break lines."""

QUIET_SECONDS = 3.0
"""Where there is no terminal to draw on, a line after this much silence says what goes on."""


def run_on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a new uvloop, if there is one, without a policy. Ctrl-C cancels it."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop  # noqa: PLC0415

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


# -- options --------------------------------------------------------------------------------------


def add_command(
    add: AddParser, name: str, about: str, command: Command, more: str = ""
) -> argparse.ArgumentParser:
    """Add a command with `--json`. `more` appears only in the command's own help."""
    parser = add(name, help=about, description=f"{about[0].upper()}{about[1:]}. {more}".rstrip())
    parser.set_defaults(command=command)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def add_base(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--base",
        required=required,
        metavar="BASE",
        help="the base model's folder (its config.json suffices) or hub id, or smollm2, the demo's",
    )


def add_device(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add --device and --dtype; the latter's help is `dtype`."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)


def add_device_bytes(parser: argparse.ArgumentParser, default: str | None = "256MiB") -> None:
    """Add --device-bytes, required if `default` is None."""
    parser.add_argument(
        "--device-bytes",
        type=as_size,
        required=default is None,
        default=default,
        metavar="N",
        help=f"device memory for adapters: {SIZE_HELP}"
        + (" (default: %(default)s)" if default else ""),
    )


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options for sources."""
    parser.add_argument(
        "--allow",
        action="append",
        type=as_allow,
        default=[],
        metavar="URL",
        help="also allow http(s)://HOST[:PORT]/PREFIX/, as a target of redirects to plain http or"
        " to addresses that are not public; repeatable. Ids on the command line are always allowed",
    )
    parser.add_argument(
        "--hub-endpoint", metavar="URL", help="the hub's URL (default: HF_ENDPOINT, if set)"
    )


def add_caches(parser: argparse.ArgumentParser) -> None:
    """Add the options for caches."""
    parser.add_argument(
        "--hub-cache",
        choices=get_args(HubCache),
        help="read the standard hub cache (read, the default) or ignore it (off)",
    )
    add_cache_folder(parser, "--cache-dir")
    parser.add_argument(
        "--cache-bytes",
        type=as_size,
        metavar="N",
        help=f"the adapter cache's budget: {SIZE_HELP} (default: 16GiB)",
    )


def add_cache_folder(parser: argparse.ArgumentParser, option: str) -> None:
    parser.add_argument(
        option,
        dest="cache_dir",
        metavar="DIR",
        help="the adapter cache (default: lorax-async in $XDG_CACHE_HOME, or else in ~/.cache)",
    )


def loader_settings(arguments: argparse.Namespace, refs: Sequence[AdapterRef]) -> dict[str, Any]:
    """Return these options as arguments of `LoaderConfig`, with `refs` allowed."""
    names = ("hub_endpoint", "hub_cache", "cache_dir", "cache_bytes", "offline")
    options = {name: getattr(arguments, name, None) for name in names}
    given = {name: value for name, value in options.items() if value is not None}
    return given | {"allow": (*filter(None, map(allow_ref, refs)), *arguments.allow)}


# -- argument types -------------------------------------------------------------------------------


def as_size(text: str) -> int:
    """Parse a number of bytes, for argparse."""
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 1000000, 64MiB or 1GiB")
    return size


def integer_parser(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return a parser of integers in this range, for argparse."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of {minimum} or more")
        if maximum is not None and int(text) > maximum:
            raise argparse.ArgumentTypeError(f"{text} is over {maximum}")
        return int(text)

    return parse


def as_id(text: str) -> AdapterRef:
    """Parse the id of a remote adapter, for argparse.

    The user chose the id, so the hub gets this machine's own token.
    """
    try:
        ref = AdapterRef(text)
    except InvalidAdapterIdError as error:  # do not repeat the text: it may hold a secret
        raise argparse.ArgumentTypeError(error.problem) from None
    try:
        ref = parse_ref(ref).plain
    except InvalidAdapterIdError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text, 200)!r}: {error.problem}") from None
    if ref.source == "local":
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is already a local folder")
    return replace(ref, use_token=ref.source == "hub")


def as_folder_or_id(text: str) -> AdapterRef:
    """Parse a folder or an id, for argparse. A folder `org/name` takes precedence over the hub."""
    if not text:  # Path("") is the current folder
        raise argparse.ArgumentTypeError("'' is not a folder or an id")
    if "://" in text and not text.lower().startswith("file:"):
        return as_id(text)
    if not Path(text).is_dir():
        with suppress(InvalidAdapterIdError):
            if parse_ref(AdapterRef(text)).source == "hub":
                return as_id(text)
    return AdapterRef(Path(text))


def as_allow(text: str) -> Allow:
    """Parse the URL of an allowed folder, for argparse."""
    source = as_source(text) if "://" in text else None
    if not isinstance(source, Allow) or source.scheme not in DEFAULT_PORTS:
        raise argparse.ArgumentTypeError("it is not http(s)://host[:port]/folder/")
    return source


def as_source(text: str) -> Allow | Path:
    """Parse where adapters are, for argparse: a local folder, or an allowed remote one."""
    try:
        source = parse_source(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.problem) from None
    if isinstance(source, Path) and not source.is_dir():
        raise argparse.ArgumentTypeError(f"{shorten(text, 200)!r} is not a folder")
    return source


# -- reading what they name -----------------------------------------------------------------------


def read_layout(base: str, terminal: Terminal, endpoint: str | None = None) -> ModelLayout:
    """Return the layout of the base model in a folder, of a hub id, or of "smollm2".

    Raises `ConfigError` if there is none.
    """
    from lorax_async import layouts  # noqa: PLC0415 (slow)

    with terminal.steps("reading the base's config") as report:
        folder = base_folder(base, report) if base == "smollm2" else base
        with without_hub_log():
            return layouts.from_pretrained(folder, endpoint=endpoint)


def base_folder(
    base: str, report: Callable[[str], None], *, endpoint: str | None = None, offline: bool = False
) -> Path:
    """Return the folder of `--base`: prepare that of "smollm2", download that of a hub id. Blocks.

    Raises `ConfigError`.
    """
    from lorax_async.engines.smollm2 import prepare_base  # noqa: PLC0415 (slow)
    from lorax_async.layouts import is_hub_id  # noqa: PLC0415 (slow)
    from lorax_async.remote.hub import download_base  # noqa: PLC0415 (slow)

    if base == "smollm2":
        return prepare_base(progress=report)
    if Path(base).is_dir() or not is_hub_id(base):
        return Path(base)
    report("downloading the base model")
    name, _, revision = base.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "token": None, "endpoint": endpoint}
    with without_hub_log():
        return Path(download_base(name, BASE_FILES, **options, offline=offline))


@contextmanager
def without_hub_log() -> Iterator[None]:
    """Keep huggingface_hub's warnings of each retry off stderr: the error says the last one."""
    importlib.import_module("huggingface_hub.utils.logging")  # it sets the level
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def adapter_folders(folder: Path) -> list[Path]:
    """Return `folder` if it is an adapter, else the adapters in it. Raises `ConfigError`."""
    from lorax_async.sources.local import CONFIG  # noqa: PLC0415 (slow)

    if (folder / CONFIG).exists():
        return [folder]
    folders = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not folders:
        raise ConfigError(f"{folder} is not an adapter, and contains none")
    return folders


# -- output ---------------------------------------------------------------------------------------


class Terminal:
    """The two streams of a command. Markup and control codes in texts have no effect."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err
        self._wrote = time.monotonic()

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line of the result, unbroken in a pipe."""
        from rich.text import Text  # noqa: PLC0415

        self._show(Text(shorten(text, 2_000), style))

    def complain(self, text: str) -> None:
        """Print a line to stderr, without rich: it also reports that rich is missing."""
        self._wrote = time.monotonic()
        print(shorten(text, 2_000), file=self._err, flush=True)

    def report_errors(self, errors: Iterable[LoraxError | None]) -> int:
        """Complain about errors; return the exit status of a command that had them."""
        failed = [error for error in errors if error is not None]
        for error in failed:
            self.complain(f"{class_name(error)}: {error}")
        return FAILED if failed else OK

    def json(self, value: object) -> None:
        """Print the result as one line of JSON, and flush: a reader may wait for it."""
        print(json.dumps(value), file=self._out, flush=True)

    def table(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Print rows of the same columns. A title that starts with a blank is aligned right.

        On a narrow terminal, titles and left columns are broken, but no numbers.
        """
        from rich.box import SIMPLE_HEAD  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        widths = {column: max(len(row[column]) for row in rows) for column in rows[0]}
        whole = sum(max(width, len(column.strip())) + 3 for column, width in widths.items()) - 3
        narrow = whole > _console(self._out).width
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0) if narrow else (0, 1))
        for column, width in widths.items():
            title, right = column.strip(), column[0] == " "
            if narrow and right:
                title = "\n".join(textwrap.wrap(title, max(1, width), break_long_words=False))
            justify: Literal["left", "right"] = "right" if right else "left"
            table.add_column(title, justify=justify, no_wrap=right, overflow="fold")
        for row in rows:
            table.add_row(*(Text(shorten(cell)) for cell in row.values()))
        self._show(table)

    def pairs(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values in two columns without a frame."""
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        grid = Table.grid(padding=(0, 2))
        for name, text in rows:
            grid.add_row(Text(f"  {name}", "bold"), Text(shorten(text)))
        self._show(grid)

    def _show(self, content: RenderableType) -> None:
        self._wrote = time.monotonic()
        console = _console(self._out)
        if console.is_terminal:
            console.print(content)
            return
        with console.capture() as lines:
            console.print(content)
        for line in lines.get().splitlines():
            print(line.rstrip(), file=self._out, flush=True)  # the server prints, and goes on

    @contextmanager
    def steps(self, first: str) -> Iterator[Callable[[str], None]]:
        """Show the first step; yield a function that shows the next one, from any thread."""
        if self._draws:
            with _console(self._err).status(shorten(first, 200)) as status:
                yield lambda text: status.update(shorten(text, 200))
            return
        step, began = first, time.monotonic()

        def report(text: str) -> None:
            nonlocal step, began
            step, began = text, time.monotonic()

        with self._not_silent(lambda: f"{step}: {time.monotonic() - began:.0f} s"):
            yield report

    @contextmanager
    def bars(self) -> Iterator[ProgressBars]:
        """Yield progress bars, one per adapter, whose last state stays on the terminal."""
        if not self._draws:
            bars = ProgressBars(None)
            with self._not_silent(lambda: bars.summary):
                yield bars
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[layers]}", markup=False),
            TextColumn("{task.fields[state]}", markup=False),
        )
        console = _console(self._err)
        with Progress(
            *columns, console=console, redirect_stdout=False, redirect_stderr=False
        ) as progress:
            yield ProgressBars(progress)

    @property
    def _draws(self) -> bool:
        return self._err.isatty() and importlib.util.find_spec("rich") is not None

    def _not_silent(self, text: Callable[[], str]) -> AbstractContextManager[None]:
        """Complain of `text()` while the block runs, if nothing was written for `QUIET_SECONDS`."""

        def pulse() -> None:
            if time.monotonic() - self._wrote >= QUIET_SECONDS:
                self.complain(text())

        return repeated(pulse, QUIET_SECONDS / 4)


@contextmanager
def repeated(call: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call every so many seconds, in a thread, while the block runs."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            call()

    thread = threading.Thread(target=run, name="lorax-pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class ProgressBars:
    """One progress bar per adapter; draws nothing without a terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[int, TaskID] = {}
        self._done: dict[int, tuple[int, int | None]] = {}

    @property
    def summary(self) -> str:
        """The bytes of all rows so far, and their total as far as it is known."""
        rows = list(self._done.values())
        done, total = sum(row[0] for row in rows), sum(row[1] or 0 for row in rows)
        return f"so far: {format_size(done)}" + (f" of {format_size(total)}" if total else "")

    def update(
        self, row: int, name: str, done: int, total: int | None, state: str, layers: str = ""
    ) -> None:
        """Update the bar at index `row`; `done` and `total` are bytes, None if unknown."""
        progress = self._progress
        self._done[row] = done, total
        if progress is None:
            return
        if row not in self._tasks:
            name = shorten(name, 60)
            self._tasks[row] = progress.add_task(name, total=None, layers="", state="")
        progress.update(self._tasks[row], completed=done, total=total, layers=layers, state=state)


def require_rich() -> None:
    """Raise `ConfigError` if rich is missing; call before the work."""
    if importlib.util.find_spec("rich") is None:
        raise ConfigError(
            f"tables and progress need rich; use --json in a pipe, or {install_command('cli')}"
        )


def _console(stream: TextIO) -> Console:
    from rich.console import Console  # noqa: PLC0415

    terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def format_size(nbytes: int) -> str:
    """Format a number of bytes in binary units."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def format_age(seconds: float) -> str:
    """Format a duration in the largest unit that it fills."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def describe_os_error(error: OSError) -> str:
    """Return a text without Python's "[Errno 2]"."""
    place = "" if error.filename is None else f"{shorten(os.fsdecode(error.filename), 500)}: "
    return f"{place}{error.strerror or error}"


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def error_as_json(error: LoraxError | None) -> dict[str, object] | None:
    if error is None:
        return None
    return {
        "type": class_name(error),
        "text": str(error),
        "stage": error.stage,
        "retryable": error.retryable,
    }


def format_ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def format_runs(numbers: Sequence[int]) -> str:
    """Format sorted integers as runs: 0–3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
