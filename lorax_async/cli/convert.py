"""`lorax-async convert`: write the weights of an adapter's pickle as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorax_async.cli.command_line import ABOUTS, OK, AddParser, Terminal, add_command
from lorax_async.formats.peft_names import PICKLE_FILE, WEIGHTS_FILE
from lorax_async.sources.pickled_weights import convert


def add_to(add: AddParser) -> None:
    more = (
        "The pickle is read by a restricted unpickler in a process of its own, with limits of"
        " memory and time. Both files stay; a file of that name is never overwritten."
    )
    parser = add_command(add, "convert", ABOUTS["convert"], _convert, more)
    help = f"the adapter's folder, with {PICKLE_FILE}"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=help)


def _convert(arguments: argparse.Namespace, terminal: Terminal) -> int:
    with terminal.steps(f"converting {PICKLE_FILE}"):
        file = convert(arguments.folder)
    nbytes = file.stat().st_size
    if arguments.json:
        terminal.json({"file": str(file), "bytes": nbytes})
    else:
        terminal.say(f"{arguments.folder}: wrote {WEIGHTS_FILE}, {nbytes:,} bytes", "green")
    return OK
