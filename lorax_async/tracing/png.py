"""A picture as PNG, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path

from lorax_async.errors import ConfigError, UsageError
from lorax_async.tracing.colours import colour_of
from lorax_async.tracing.picture import LONGEST_NAME, Lane, Picture, plain_text
from lorax_async.tracing.words import LEGEND, summary

_NARROWEST = 0.001
_LETTER = 0.0055
"""Of all that is drawn: a box's width, at least, and that of a letter."""

MOST_LANES = 400
"""A picture of 10,000 pixels; matplotlib draws no more than 65,535, and takes minutes."""

INSTALL = "pip install 'lorax-async[plot]'"


def write_png(picture: Picture, path: Path, title: str) -> None:
    """Raises `ConfigError` where matplotlib is missing, `UsageError` for many lanes, and `OSError`.

    Blocks. Texts are a stranger's, and no formulas.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise ConfigError(f"a PNG needs matplotlib; run: {INSTALL}; HTML needs nothing") from None
    if len(picture.lanes) > MOST_LANES:
        raise UsageError(
            f"{len(picture.lanes):,} lanes are too many for a PNG; draw a part, or HTML"
        )
    height = 0.21 * (len(picture.lanes) + len({lane.row for lane in picture.lanes}))
    figure = Figure(figsize=(12, 1.3 + height), layout="constrained")
    axes = figure.subplots()
    ticks = []
    y, row = 0.0, None
    for lane in picture.lanes:
        y += 1.0 if lane.row == row else 1.5
        row = lane.row
        title_of_lane = lane.title[:20]
        known = title_of_lane.startswith(row)
        ticks.append((y, title_of_lane if known else f"{row}: {title_of_lane}"))
        _draw(axes, picture, lane, y)
    axes.set_yticks(
        [tick for tick, _ in ticks], [title for _, title in ticks], fontsize=7, parse_math=False
    )
    axes.set_ylim(y + 0.8, 0.5)
    axes.set_xlim(picture.start, max(picture.stop, picture.start + 1e-3))
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    heading = f"{plain_text(title, LONGEST_NAME)}\n{summary(picture)}. {LEGEND}"
    axes.set_title(heading, fontsize=8, loc="left", wrap=True, parse_math=False)
    figure.savefig(path, format="png", dpi=110)


def _draw(axes: object, picture: Picture, lane: Lane, y: float) -> None:
    length = picture.stop - picture.start
    for depth in range(3):
        boxes = [box for box in lane.boxes if min(box.depth, 2) == depth]
        high = 0.84 - 0.22 * depth
        axes.broken_barh(  # type: ignore[attr-defined]  # untyped in matplotlib
            [(box.start, max(box.stop - box.start, length * _NARROWEST)) for box in boxes],
            (y - high / 2, high),
            facecolors=[colour_of(box, lane, picture.layers) for box in boxes],
            edgecolors="white",
            linewidth=0.3,
        )
    for box in lane.boxes:
        if box.layer is None and box.stop - box.start > length * _LETTER * len(box.name):
            style = {"fontsize": 6.5, "va": "center_baseline", "clip_on": True, "parse_math": False}
            axes.text(box.start + length * _LETTER / 2, y, box.name, **style)  # type: ignore[attr-defined]
