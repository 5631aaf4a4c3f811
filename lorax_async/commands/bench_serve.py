"""`lorax-async bench-serve`: requests that come when they come, and how they are answered."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from lorax_async.commands.arguments import FAILED, OK, AddParser, add_command, lines_of, number_from
from lorax_async.commands.benching import open_loop, picture
from lorax_async.commands.benching.open_loop import Played
from lorax_async.commands.benching.report import summary
from lorax_async.commands.benching.streaming_client import PATHS, Answer, Client, endpoint
from lorax_async.commands.measure import run_on_uvloop
from lorax_async.commands.terminal import Screen
from lorax_async.core.request_schedule import Arrival, schedule
from lorax_async.errors import ConfigError, shorten

KEY = "OPENAI_API_KEY"
LATE_MS = 10
"""Beyond that at the 99th percentile a person is told that the numbers are the generator's, too."""

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")


def add_to(add: AddParser) -> None:
    about = "send requests to an OpenAI-compatible server at a steady rate, and time the answers"
    more = (
        "Requests are sent when they are due and never wait for answers. A request is cold if no"
        " answer from the model that it names had begun by then. A key for the server is taken from"
        f" {KEY}."
    )
    parser = add_command(add, "bench-serve", about, _bench, more)
    parser.add_argument("url", metavar="URL", help="the server's, as http://127.0.0.1:8000")
    _add_requests(parser)
    _add_call(parser)
    parser.add_argument(
        "--lines", type=Path, metavar="FILE", help="write a line of JSON for each request there"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture there (.png)")


def _add_requests(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="NAME|FILE",
        help="what requests name, the most popular first; a file has a name in each line",
    )
    parser.add_argument(
        "--rate", type=float, default=1.0, metavar="R", help="a second (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="for which requests are sent (default: %(default)s)",
    )
    parser.add_argument(
        "--zipf",
        type=float,
        default=1.0,
        metavar="S",
        help="the n-th model is named in proportion to 1/n^S (default: %(default)s)",
    )
    parser.add_argument(
        "--cold-share",
        type=float,
        default=0.0,
        metavar="P",
        help="part of the requests that name one of the last models, each only once (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def _add_call(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--call", choices=PATHS, default="chat", help="(default: %(default)s)")
    parser.add_argument(
        "--prompt-tokens",
        type=number_from(1, 1 << 20),
        default=64,
        metavar="N",
        help="about: so many short words (default: %(default)s)",
    )
    parser.add_argument(
        "--new-tokens",
        type=number_from(1, 1 << 20),
        default=32,
        metavar="N",
        help="at most, in each answer (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="have the server go on to all of them (not in OpenAI's own)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="for a whole answer (default: %(default)s)",
    )
    parser.add_argument(
        "--most-at-once",
        type=number_from(1),
        default=512,
        metavar="N",
        help="requests under way; those beyond are not sent, and counted (default: %(default)s)",
    )


def _bench(arguments: argparse.Namespace, screen: Screen) -> int:
    if not 0 < arguments.timeout < float("inf"):
        raise ConfigError(f"--timeout is more than 0, not {arguments.timeout:g}")
    endpoint(arguments.url, arguments.call)
    if arguments.plot is not None:
        picture.require(arguments.plot)
    random = Random(arguments.seed)  # noqa: S311 - no secret
    arrivals = schedule(
        random.random,
        read_models(arguments.models),
        rate=arguments.rate,
        seconds=arguments.seconds,
        exponent=arguments.zipf,
        cold_share=arguments.cold_share,
    )
    with _lines(arguments.lines) as write, screen.steps() as report:
        played = run_on_uvloop(_play(arguments, arrivals, random, write, report))
    told = _told(arguments, played)
    if arguments.json:
        screen.json(told)
    else:
        _show(told, screen)
    if arguments.plot is not None:
        picture.draw(arguments.plot, played.answers)
    return OK if told["all"]["whole"] == told["all"]["requests"] else FAILED


def read_models(given: Sequence[str]) -> list[str]:
    """Names, and those in the lines of files. Raises `ConfigError` for one that is there twice."""
    models: list[str] = []
    for text in given:
        path = Path(text)
        models += lines_of(path) if path.is_file() else [text.strip()]
    if len(set(models)) < len(models):
        twice = next(name for name, count in Counter(models).items() if count > 1)
        raise ConfigError(f"--models names {shorten(twice)!r} twice")
    if not all(models):
        raise ConfigError("--models names a model without a name")
    return models


async def _play(
    arguments: argparse.Namespace,
    arrivals: Sequence[Arrival],
    random: Random,
    write: Callable[[Answer], None],
    report: Callable[[str], None],
) -> Played:
    done = 0

    def ended(answer: Answer) -> None:
        nonlocal done
        done += 1
        write(answer)
        report(f"{done:,} of {len(arrivals):,} requests are through")

    async with open_loop.session(arguments.timeout, os.environ.get(KEY)) as session:
        return await open_loop.play(
            Client(session, arguments.url, arguments.call),
            arrivals,
            lambda arrival: body_of(arguments, arrival, random),
            most_at_once=arguments.most_at_once,
            ended=ended,
        )


def body_of(arguments: argparse.Namespace, arrival: Arrival, random: Random) -> dict[str, Any]:
    """What is posted. The words differ, so that no server finds a prompt computed already."""
    prompt = " ".join(random.choices(WORDS, k=arguments.prompt_tokens))
    asked: dict[str, Any] = {
        "model": arrival.model,
        "max_tokens": arguments.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if arguments.ignore_eos:
        asked["ignore_eos"] = True
    if arguments.call == "chat":
        return asked | {"messages": [{"role": "user", "content": prompt}]}
    return asked | {"prompt": prompt}


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[Answer], None]]:
    if path is None:
        yield lambda _: None
        return
    with path.open("w", encoding="utf-8", buffering=1) as file:
        yield lambda answer: print(json.dumps(answer.as_json()), file=file)


def _told(arguments: argparse.Namespace, played: Played) -> dict[str, Any]:
    asked = ("url", "call", "rate", "zipf", "cold_share", "prompt_tokens", "new_tokens", "seed")
    return {name: getattr(arguments, name) for name in asked} | summary(played)


def _show(told: dict[str, Any], screen: Screen) -> None:
    columns = ["", " requests", " whole", " first token", " p90", " p99", " between chunks", " p90"]
    columns += [" p99", " tokens/s", "errors"]
    screen.table(
        [column or "which" for column in columns],
        [_row(name, told[name]) for name in ("all", "warm", "cold")],
    )
    late = told["late_ms"] or {"p99": 0.0, "max": 0.0}
    screen.say(
        f"{told['seconds']:.1f} s, {told['most_at_once']} under way at most; requests were sent"
        f" late by {late['p99']:.1f} ms (p99), {late['max']:.1f} ms (max)"
    )
    if late["p99"] > LATE_MS:
        screen.say("so late that the numbers are also this generator's: give it a core", "bold red")


def _row(name: str, of: dict[str, Any]) -> tuple[str, ...]:
    times: list[str] = []
    for which in ("ttft_ms", "between_chunks_ms"):
        spread = of[which] or {}
        times += [f"{spread[p]:.1f} ms" if p in spread else "" for p in ("p50", "p90", "p99")]
    errors = ", ".join(f"{count} × {kind}" for kind, count in sorted(of["errors"].items()))
    counts = (f"{of['requests']:,}", f"{of['whole']:,}")
    return (name, *counts, *times, f"{of['tokens_per_second']:.1f}", errors)
