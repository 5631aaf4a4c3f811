"""The page of the command line names every command and option that there is, and no other."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from lorax_async.cli import EPILOG, _parser

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cli.md").read_text()
README = (ROOT / "README.md").read_text()

PLAIN = {"--help", "--base", "--dtype", "--device-bytes", "--prompt", "--adapters"}
"""Which `--help` alone explains."""


def _leaves(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every command by its words, with its options."""
    below = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    for each in below:
        for word, child in each.choices.items():
            yield from _leaves(child, f"{name} {word}".strip())
    if not below:
        yield (
            name,
            {
                option
                for each in parser._actions
                for option in each.option_strings
                if option[:2] == "--"
            },
        )


COMMANDS = dict(_leaves(_parser()))


def test_every_command_is_named() -> None:
    assert COMMANDS.keys() == {
        *("inspect", "load", "fetch", "serve", "plan", "bench-serve", "demo", "demo-remote"),
        "timeline",
        *("cache ls", "cache verify", "cache rm", "cache gc"),
    }
    table = re.findall(r"^\| `lorax-async (.+?) \| ", PAGE, re.MULTILINE)
    named = set()
    for row in table:
        first, *more = [re.split(r" [A-Z]|`", text)[0] for text in row.split("`, `")]
        named |= {first, *(f"{first.split()[0]} {each}" for each in more)}
    assert named == COMMANDS.keys()


def test_every_command_of_the_readme_is_one() -> None:
    named = re.findall(r"lorax-async ([a-z][a-z-]+(?: ls)?)", README)
    assert {"fetch", "cache ls", "demo-remote"} <= set(named)
    assert set(named) <= COMMANDS.keys() | {"cache"}


def test_every_option_is_explained() -> None:
    options = set().union(*COMMANDS.values())
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert written <= options
    assert options - PLAIN <= written
    assert all("--json" in each for each in COMMANDS.values())


def test_the_exit_statuses_are_the_same() -> None:
    told = re.findall(r"^  (\d+) ", EPILOG, re.MULTILINE)
    sentence = PAGE.partition("Exit statuses: ")[2].partition("\n\n")[0]
    assert re.findall(r"(?:^|; )(\d+) ", " ".join(sentence.split())) == told
