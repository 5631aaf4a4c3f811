"""A picture of a run: first tokens over time, and how they and the pauses are spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_async.commands.benching.streaming_client import Answer
from lorax_async.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"warm": "tab:orange", "cold": "tab:blue"}


def require(path: Path) -> None:
    """Raise `ConfigError` if it could not be drawn there: before the work, not after it."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - heavy, and only here
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lorax-async[measure]'") from error
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(f"--plot {path}: its ending is none of {', '.join(sorted(formats))}")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: no file can be there")


def draw(path: Path, answers: Sequence[Answer]) -> None:
    """Write it to `path`, in the format that its ending says."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 8), layout="constrained")
    over_time, firsts, pauses = figure.subplots(3, 1)
    for name, colour in COLOURS.items():
        mine = [each for each in answers if each.cold == (name == "cold")]
        whole = [each for each in mine if each.error is None and each.first is not None]
        times = [(each.arrival.due, each.first * 1e3) for each in whole if each.first is not None]
        over_time.scatter(
            [due for due, _ in times], [ms for _, ms in times], 12, colour, label=name
        )
        _share(firsts, [ms for _, ms in times], name)
        _share(pauses, [gap * 1e3 for each in whole for gap in each.gaps], name)
    failed = [each.arrival.due for each in answers if each.error is not None]
    if failed:
        over_time.plot(
            failed, [0.02] * len(failed), "rx", transform=over_time.get_xaxis_transform()
        )
    over_time.set(title="first token, by when it was asked for (red: errors)", xlabel="s")
    firsts.set(title="share of requests whose first token came within", xlabel="ms")
    pauses.set(title="share of pauses between chunks that were no longer than", xlabel="ms")
    over_time.set_ylabel("ms")
    for panel in (over_time, firsts, pauses):
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.savefig(path)


def _share(panel: Axes, values: Sequence[float], name: str) -> None:
    if values:
        panel.ecdf(list(values), label=name, color=COLOURS[name])
