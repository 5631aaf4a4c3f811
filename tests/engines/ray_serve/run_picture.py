"""A picture of a run: each request a mark in its replica's row, in its adapter's colour."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, ROW, GAP, LEFT = 860, 26, 30, 10


def draw(runs: Mapping[str, Sequence[tuple[str, int]]], adapters: Sequence[str]) -> str:
    """Return an SVG of the runs by title: adapter and replica of each request, in order."""
    parts, top = list[str](), 24
    for title, requests in runs.items():
        parts.append(f'<text x="{LEFT}" y="{top}">{escape(title)}</text>')
        replicas = sorted({replica for _, replica in requests})
        step = (WIDTH - 2 * LEFT) / len(requests)
        for row, replica in enumerate(replicas):
            y = top + 8 + row * (ROW + 4)
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{WIDTH - 2 * LEFT}" height="{ROW}" fill="#f4f4f4"/>'
            )
            for number, (adapter, where) in enumerate(requests):
                if where == replica:
                    hue, light = 137 * adapters.index(adapter) % 360, 45
                    x = LEFT + number * step
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y}" width="{step:.2f}" height="{ROW}"'
                        f' fill="hsl({hue},70%,{light}%)"/>'
                    )
        top += 8 + len(replicas) * (ROW + 4) + GAP
    size = (
        f'viewBox="0 0 {WIDTH} {top - GAP + 10}" font-family="system-ui, sans-serif" font-size="13"'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    ground = f'<rect width="{WIDTH}" height="{top}" fill="#fff"/>'
    return "\n".join([head, ground, *parts, "</svg>\n"])
