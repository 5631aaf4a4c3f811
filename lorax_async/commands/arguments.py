"""What the commands have in common: options, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from lorax_async.commands.terminal import Screen
from lorax_async.errors import ConfigError

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses; argparse has `REFUSED` for wrong usage."""

AddParser = Callable[..., argparse.ArgumentParser]
Command = Callable[[argparse.Namespace, Screen], int]

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE_HELP = "a number, or one with KiB, MiB or GiB"


def add_command(
    add: AddParser, name: str, about: str, command: Command, more: str = ""
) -> argparse.ArgumentParser:
    """A parser for one command, with `--json`; `more` is told by its own help only."""
    parser = add(name, help=about, description=f"{about[0].upper()}{about[1:]}. {more}".rstrip())
    parser.set_defaults(command=command)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def add_base(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--base",
        required=required,
        metavar="DIR",
        help="the base model's folder (its config.json suffices), or smollm2 for the demo's",
    )


def as_size(text: str) -> int:
    """Bytes, for argparse."""
    digits = text.rstrip("KMGiB")
    unit = text[len(digits) :]
    if not digits.isascii() or not digits.isdecimal() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 1000000, 64MiB or 1GiB")
    return int(digits) * UNITS[unit]


def number_from(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number in this range, for argparse."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        if most is not None and int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is over {most}")
        return int(text)

    return number


def lines_of(path: Path) -> Iterator[str]:
    """Of a text file, without blanks around them and without empty ones.

    Raises
    ------
    ConfigError
        It is no text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8") from None
