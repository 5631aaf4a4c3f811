"""What colour a box has: that of its layer, from the first to the last, or that of what it is."""

from __future__ import annotations

from colorsys import hls_to_rgb

from lorax_async.tracing.picture import Box, Lane

_FIRST, _LAST = 0.62, 0.05
"""Hues from blue to orange: their lightness differs too, for who does not tell hues apart."""

_PLAIN = {
    "requests": "#6b7a90",
    "files": "#8d99ab",
    "connections": "#a3aab5",
    "layers": "#cfd6e0",
    "compute": "#b9c2cf",
}
_WAIT, _CONNECT, _OTHER = "#f1c9c9", "#c9b8e8", "#9aa5b4"


def colour_of(box: Box, lane: Lane, layers: tuple[int, int]) -> str:
    """As "#rrggbb"."""
    if box.waits:
        return _WAIT
    if box.layer is None:
        return _CONNECT if box.name == "connect" else _PLAIN.get(lane.row, _OTHER)
    first, last = layers
    place = (box.layer - first) / max(1, last - first)
    red, green, blue = hls_to_rgb(_FIRST + (_LAST - _FIRST) * place, 0.42 + 0.16 * place, 0.62)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
