"""The command `lorax-async`: inspect, fetch, load and serve adapters.

`main` parses the arguments, runs one command and maps errors to exit statuses. Commands may use
every other package; no package imports this one.

- `command_line.py`: exit statuses, shared options and argument types; results on stdout, progress
  and complaints on stderr
- `inspect.py`: `inspect`: check config and header as a load would
- `convert.py`: `convert`: write a pickle's weights as safetensors
- `load.py`: `load`: load onto a device and time it, with progress and stalls of the event loop; the
  option `--trace`
- `cache_commands.py`: `fetch`: download into the disk cache; `cache ls`, `verify`, `rm`, `gc`
- `demo.py`: `demo`, with the example adapters
- `plan.py`: `plan`: how many adapters fit, by `memory_estimate.py`
- `serve.py`: `serve`: the OpenAI-compatible server, and its log
- `timeline.py`: `timeline`: make a page of a trace
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from lorax_async.cli.command_line import (
    ABOUTS,
    FAILED,
    INTERRUPTED,
    SIMULATION,
    Command,
    Terminal,
    describe_os_error,
    require_rich,
)
from lorax_async.errors import LoraxError, shorten

EPILOG = """\
exit status:
  0    done; for inspect: the adapter can be loaded
  1    an error, described on stderr; for load and fetch: at least one adapter failed;
       for cache: an entry was damaged, or is in use and could not be removed
  2    inspect: the adapter would be refused; otherwise: wrong arguments
  130  interrupted (Ctrl-C)

Results go to stdout, progress to stderr: without a terminal, a line every few seconds.
"""


_MODULES = {"fetch": "cache_commands", "cache": "cache_commands"}
"""Where commands are that have no module of their own name."""

_SIMULATED = ("zipf", "trace", "requests", "rate", "seed", "replicas", "cache-bytes", "deaths")
_REMOVED = {
    "demo-remote": "run examples/slow_link.py, in a checkout of the project",
    **{f"plan --{each}": f"{SIMULATION} simulates requests and fleets" for each in _SIMULATED},
}
"""Commands and options of former versions, and what to do instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Raises `SystemExit` for --help, --version and wrong usage.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # its encoding may lack characters
    terminal = Terminal(sys.stdout, sys.stderr)
    try:
        words = sys.argv[1:] if argv is None else argv
        arguments = _parser(words, terminal).parse_args(words)
        command: Command = arguments.command
        if not arguments.json or sys.stderr.isatty():
            require_rich()
        return command(arguments, terminal)
    except LoraxError as error:
        terminal.complain(f"{type(error).__name__}: {error}")
        return FAILED
    except KeyboardInterrupt:
        terminal.complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe: keep Python from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        terminal.complain(describe_os_error(error))
        return FAILED


_LONG_WORD = re.compile(r"\S{101,}")


class _Parser(argparse.ArgumentParser):
    """Cuts long words in errors, for argparse repeats arguments whole; also for commands."""

    def error(self, message: str) -> NoReturn:
        super().error(_LONG_WORD.sub(lambda word: shorten(word[0], 100), message))


class _ShowVersion(argparse.Action):
    """Look for the version only if it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(f"lorax-async {importlib.metadata.version('lorax-async')}\n")
        parser.exit()


def _parser(words: Sequence[str], terminal: Terminal) -> argparse.ArgumentParser:
    """Return the parser of the command in `words`: the module of no other one is imported."""
    parser = _Parser(
        prog="lorax-async",
        description="Loads LoRA adapters (PEFT's format) into a running LLM server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = "show program's version number and exit"
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help=help)
    for word in words:
        name = word.partition("=")[0]
        removed = name if word is words[0] else f"{words[0]} {name}"
        if removed in _REMOVED:
            parser.error(f"{removed} was removed; {_REMOVED[removed]}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    named = next((word for word in words if word in ABOUTS), None)
    if named is not None:
        with terminal.steps("starting"):  # torch takes seconds
            module = importlib.import_module(f"lorax_async.cli.{_MODULES.get(named, named)}")
        module.add_to(commands.add_parser)
    for name, about in ABOUTS.items():
        if name not in commands.choices:
            commands.add_parser(name, help=about)
    return parser
