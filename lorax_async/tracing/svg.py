"""A picture as SVG, and as a page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from lorax_async.tracing.colours import colour_of
from lorax_async.tracing.picture import LONGEST_NAME, Box, Lane, Picture, plain_text
from lorax_async.tracing.words import LEGEND, marks, summary

LANE, GAP, LEFT, WIDTH, TOP = 18, 10, 132, 1200, 26
"""Pixels: a lane's height, between two rows, beside the boxes, of all, above the first lane."""

_NARROWEST = 1.2
_INSET = 2.5
_LETTER = 5.6

_STYLE = (
    "text{font:10px system-ui,sans-serif;fill:#1d2733}.r{font-weight:700}.m{fill:#5b6672}"
    ".b{fill:#fff;pointer-events:none}.d{fill:#1d2733;pointer-events:none}"
    "line{stroke:#8894a3;stroke-opacity:.3}.l{fill:#8894a3;fill-opacity:.09}"
)
_DARK = (
    "@media(prefers-color-scheme:dark){body{background:#14191f;color:#dde4ec}"
    "text{fill:#dde4ec}.m{fill:#9aa6b3}.d{fill:#1d2733}}"
)


def as_svg(picture: Picture) -> str:
    """A document of its own. Boxes tell what they are when they are pointed at."""
    places, height = _places(picture)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    said = escape(summary(picture))
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{said}">',
        f"<style>{_STYLE}</style>",
        *_axis(picture, height),
    ]
    if picture.dropped:
        drawn.append(f'<text class="m" x="4" y="12">{picture.dropped:,} spans gone</text>')
    row = ""
    for lane, top in zip(picture.lanes, places, strict=True):
        if lane.row != row:
            row = lane.row
            drawn.append(f'<text class="r" x="4" y="{top - 3}">{escape(row)}</text>')
        drawn += _lane(picture, lane, top)
    return "\n".join([*drawn, "</svg>\n"])


def as_html(picture: Picture, title: str) -> str:
    """A page with the picture in it: no script, no network; a narrow screen scrolls it."""
    heading, said = escape(plain_text(title, LONGEST_NAME)), escape(summary(picture))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>body{{font:15px/1.4 system-ui,sans-serif;margin:12px;background:#fff;color:#1d2733}}
h1{{font-size:1.1rem;margin:0 0 4px}}p{{margin:4px 0}}
div{{overflow-x:auto;-webkit-overflow-scrolling:touch}}svg{{display:block}}{_DARK}</style></head>
<body><h1>{heading}</h1><p>{said}.</p><p>{escape(LEGEND)}</p>
<div tabindex="0" role="region" aria-label="the picture, which scrolls">
{as_svg(picture)}</div></body></html>
"""


def _places(picture: Picture) -> tuple[list[int], int]:
    """The top of each lane, and the height of all."""
    top, row, places = TOP, "", []
    for lane in picture.lanes:
        if lane.row != row:
            row, top = lane.row, top + GAP + 4
        places.append(top)
        top += LANE
    return places, top + GAP


def _x(picture: Picture, ms: float) -> float:
    length = max(picture.stop - picture.start, 1e-9)
    place = min(max((ms - picture.start) / length, 0.0), 1.0)
    return LEFT + place * (WIDTH - LEFT - 8)


def _axis(picture: Picture, height: int) -> Iterator[str]:
    for mark in marks(picture.start, picture.stop):
        x = f"{_x(picture, mark):.1f}"
        yield f'<line x1="{x}" y1="16" x2="{x}" y2="{height - 4}"/>'
        yield f'<text class="m" x="{x}" y="12" text-anchor="middle">{mark:g} ms</text>'


def _lane(picture: Picture, lane: Lane, top: int) -> Iterator[str]:
    wide = WIDTH - LEFT - 8
    yield f'<text x="10" y="{top + 12}">{escape(lane.title[:20])}</text>'
    yield f'<rect class="l" x="{LEFT}" y="{top}" width="{wide}" height="{LANE - 2}"/>'
    for box in _seen(picture, lane):
        yield _box(picture, lane, box, top)


def _seen(picture: Picture, lane: Lane) -> Iterator[Box]:
    """Of boxes narrower than a pixel, the first one in each: a document of all is megabytes."""
    last: dict[float, int] = {}
    for box in lane.boxes:
        x, stop = _x(picture, box.start), _x(picture, box.stop)
        if stop - x < 1:
            if last.get(_inset(box)) == int(x):
                continue
            last[_inset(box)] = int(x)
        yield box


def _inset(box: Box) -> float:
    return _INSET * min(box.depth, 2)


def _box(picture: Picture, lane: Lane, box: Box, top: int) -> str:
    x = _x(picture, box.start)
    width = max(_NARROWEST, _x(picture, box.stop) - x)
    inset = _inset(box)
    colour = colour_of(box, lane, picture.layers)
    took = f"{box.stop - box.start:,.3f} ms from {box.start:,.3f}"
    said = escape(f"{box.name}: {took}" + (f"; {box.details}" if box.details else ""))
    rect = (
        f'<rect x="{x:.2f}" y="{top + inset:g}" width="{width:.2f}"'
        f' height="{LANE - 2 - 2 * inset:g}" fill="{colour}" stroke="#fff" stroke-width=".4">'
        f"<title>{said}</title></rect>"
    )
    text = _text_in(box, width)
    if text:
        kind = "b" if box.layer is not None and not box.waits else "d"
        rect += f'<text class="{kind}" x="{x + 3:.2f}" y="{top + 12}">{escape(text)}</text>'
    return rect


def _text_in(box: Box, width: float) -> str:
    """The name, or a layer's number, where there is room for it."""
    layer = str(box.layer) if box.layer is not None and not box.waits else ""
    return next((text for text in (box.name, layer) if len(text) * _LETTER + 6 <= width), "")
