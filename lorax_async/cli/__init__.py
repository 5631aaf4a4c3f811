"""`lorax-async`: look at adapters, fetch them, load them, see it all work."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence

from lorax_async.cli import cache_commands, demo_remote, fetch, inspect, load, plan, serve, timeline
from lorax_async.cli.arguments import FAILED, INTERRUPTED, OK, AddParser, Command, add_command
from lorax_async.cli.demo_remote import add_adapters
from lorax_async.cli.terminal import Terminal, require_rich
from lorax_async.errors import LoraxError

EPILOG = """\
exit status:
  0    done; for inspect: the adapter can be loaded
  1    an error, whose text is on stderr; for load and fetch: at least one adapter failed;
       for cache: something was damaged, or stays though it was to be removed
  2    inspect: the adapter would be refused; otherwise: wrong arguments
  130  interrupted (Ctrl-C)

Results go to stdout, progress to stderr and only to a terminal.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Raises SystemExit for --help and wrong usage."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know every sign
    terminal = Terminal(sys.stdout, sys.stderr)
    try:
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
        # The reader (`| head`) has had enough; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        terminal.complain(str(error))
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorax-async",
        description="Loads LoRA adapters (PEFT's format) into a running LLM server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("lorax-async")
    parser.add_argument("--version", action="version", version=f"lorax-async {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in (inspect, load, fetch, cache_commands):
        each.add_to(commands.add_parser)
    _add_demo(commands.add_parser)
    demo_remote.add_to(commands.add_parser)
    serve.add_to(commands.add_parser)
    plan.add_to(commands.add_parser)
    timeline.add_to(commands.add_parser)
    return parser


def _add_demo(add: AddParser) -> None:
    about = "load three adapters into a small model and let them answer in one batch"
    parser = add_command(add, "demo", about, _demo)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to ask (default: what all three know)"
    )
    add_adapters(parser)


def _demo(arguments: argparse.Namespace, terminal: Terminal) -> int:
    from lorax_async.cli import demo  # noqa: PLC0415 (kernels and threads that nothing else needs)

    result = demo.run_demo(arguments.adapters, arguments.prompt or demo.PROMPT, terminal)
    if arguments.json:
        terminal.json(demo.demo_as_json(result))
    else:
        demo.show_demo(result, terminal)
    return OK
