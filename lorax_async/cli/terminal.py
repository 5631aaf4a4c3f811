"""Output of commands: results on stdout; progress on stderr, if that is a terminal."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from lorax_async.errors import ConfigError, shorten

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

    from lorax_async.cli.load import LoadProgress


PIPE_WIDTH = 5_000
"""Columns of a table in a pipe or file, wide enough not to break lines."""


class Terminal:
    """The two streams of a command. Markup and control codes in texts have no effect."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line of the result, unbroken in a pipe."""
        from rich.text import Text  # noqa: PLC0415

        self._show(Text(shorten(text, 2_000), style))

    def complain(self, text: str) -> None:
        """Print a line to stderr, without rich: it also reports that rich is missing."""
        print(shorten(text, 2_000), file=self._err)

    def json(self, value: object) -> None:
        """Print the result as one line of JSON, and flush: a reader may wait for it."""
        print(json.dumps(value), file=self._out, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table. Columns whose title starts with a blank are aligned to the right."""
        from rich.box import SIMPLE_HEAD  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column.strip(), justify="right" if column[0] == " " else "left")
        for row in rows:
            table.add_row(*(Text(shorten(cell)) for cell in row))
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
        console = _console(self._out)
        if console.is_terminal:
            console.print(content)
            return
        with console.capture() as lines:
            console.print(content)
        for line in lines.get().splitlines():
            print(line.rstrip(), file=self._out)

    @contextmanager
    def steps(self) -> Iterator[Callable[[str], None]]:
        """Yield a function that shows the current step, callable from any thread."""
        if not self._err.isatty():
            yield lambda _: None
            return
        with _console(self._err).status("") as status:
            yield lambda text: status.update(shorten(text, 200))

    @contextmanager
    def bars(self) -> Iterator[ProgressBars]:
        """Yield progress bars, one per adapter, whose last state stays on the terminal."""
        if not self._err.isatty():
            yield ProgressBars(None)
            return
        with _progress(_console(self._err)) as progress:
            yield ProgressBars(progress)


class ProgressBars:
    """One progress bar per adapter; draws nothing without a terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[int, TaskID] = {}

    def show(self, row: int, load: LoadProgress) -> None:
        """Update the bar at index `row` from a load."""
        layers = f"{load.ready}/{len(load.layers)} layers" if load.layers else ""
        self.update(row, load.name, load.moved, load.nbytes, load.state, layers)

    def update(
        self, row: int, name: str, done: int, total: int | None, state: str, layers: str = ""
    ) -> None:
        """Update the bar at index `row`; `done` and `total` are bytes, None if unknown."""
        progress = self._progress
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
            "tables and progress need rich; run: pip install 'lorax-async[cli]', or use --json in"
            " a pipe"
        )


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[layers]}", markup=False),
        TextColumn("{task.fields[state]}", markup=False),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
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
