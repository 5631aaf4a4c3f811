"""The base models that commands are told of."""

from __future__ import annotations

from pathlib import Path

from lorax_async import layouts
from lorax_async.commands.terminal import Screen
from lorax_async.core.layout import ModelLayout
from lorax_async.engines.smollm2 import prepare_base


def layout_of(base: str, screen: Screen) -> ModelLayout:
    """Of the base in a folder, or of the demo's. Raises `ConfigError` where there is none."""
    with screen.steps() as report:
        report("reading the base's config")
        folder = prepare_base(progress=report) if base == "smollm2" else Path(base)
        return layouts.from_pretrained(folder)
