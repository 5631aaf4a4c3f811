"""Requests that an engine computes together, against transformers' own `generate` of the same batch
and against the same requests one after the other.

SmolLM2 in float32; prompts and answers of the same length, the likeliest tokens. The tokens of all
contenders are compared.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import perf_counter

import torch

from bench_options import Options, options, print_environment, write_json
from cold_stage import Base
from harness import SEED, WrongBytesError, run_on
from lorax_async.config import LoaderConfig
from lorax_async.engines.transformers import attach
from lorax_async.loader import AdapterLoader
from lorax_async.scheduler.scheduler import AdapterScheduler
from lorax_async.server.engine import Engine, Generation, Sampling
from lorax_async.server.transformers_decoder import TransformersDecoder
from times import Line, Times, print_lines, verdict

PROMPT, NEW = 32, 32
FULL = {"full batch of 8": 8, "full batch of 32": 32}
TOGETHER = {"8 at once, base": 0, "8 at once, 4 adapters": 4}
REQUESTS = 8
GENERATE, ENGINE = "transformers' generate", "engine"
ALONE, AT_ONCE = "one after the other", "at once"
TARGETS = {ENGINE: 1.15, AT_ONCE: 0.4}

Tokens = list[list[int]]
Run = Callable[[], Awaitable[Tokens]]
Opened = AbstractAsyncContextManager[Run]


class Bench:
    """The model and the adapters' files, for all rows."""

    def __init__(self, given: Options, work: Path) -> None:
        self._options = given
        self._base = Base(work, max(TOGETHER.values()))

    async def row(self, name: str) -> Times:
        """Every contender does the same work in every round, in an order that is shuffled anew."""
        times, shuffle = Times(), random.Random(SEED).shuffle
        expected = list[Tokens]()
        contenders = self._full(FULL[name]) if name in FULL else self._together(TOGETHER[name])
        order = list(contenders)
        for _ in range(self._options.rounds):
            shuffle(order)
            for contender in order:
                async with contenders[contender]() as run:
                    start = perf_counter()
                    tokens = await run()
                    times.add(contender, perf_counter() - start)
                expected.append(tokens)
                if tokens != expected[0]:
                    raise WrongBytesError(f"{contender}: other tokens")
        return times

    def _full(self, requests: int) -> dict[str, Callable[[], Opened]]:
        wanted = _wanted(requests, [None])

        @asynccontextmanager
        async def generate() -> AsyncIterator[Run]:
            yield lambda: asyncio.to_thread(self._generate, [one.prompt for one in wanted])

        return {GENERATE: generate, ENGINE: lambda: self._engine(wanted, at_once=True)}

    def _together(self, adapters: int) -> dict[str, Callable[[], Opened]]:
        wanted = _wanted(REQUESTS, self._base.folders[:adapters] or [None])
        return {
            ALONE: lambda: self._engine(wanted, at_once=False),
            AT_ONCE: lambda: self._engine(wanted, at_once=True),
        }

    def _generate(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        ids = torch.tensor(prompts)
        found = self._base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
        )
        tokens: Tokens = found[:, PROMPT:].tolist()
        return tokens

    @asynccontextmanager
    async def _engine(self, wanted: Sequence[Generation], *, at_once: bool) -> AsyncIterator[Run]:
        """One that is new, with its adapters on the device."""
        async with self._opened(len(wanted)) as (loader, engine):
            for folder in {one.adapter for one in wanted} - {None}:
                assert folder is not None
                async with await loader.load(folder) as handle:
                    await handle.verified()

            async def answer(one: Generation) -> list[int]:
                return [token async for token in engine.submit(one)]

            async def run() -> Tokens:
                if at_once:
                    return await asyncio.gather(*map(answer, wanted))
                return [await answer(one) for one in wanted]

            yield run

    @asynccontextmanager
    async def _opened(self, requests: int) -> AsyncIterator[tuple[AdapterLoader, Engine]]:
        base, slots = self._base, max(TOGETHER.values())
        config = LoaderConfig(
            dtype=torch.float32,
            device_bytes=slots * (3 * base.nbytes),
            max_slots=slots,
            io_threads=self._options.io_threads,
        )
        async with AdapterLoader(base.layout, config) as loader:
            with attach(base.model, loader) as attached:
                decoder = TransformersDecoder(base.model, attached, requests)
                async with (
                    AdapterScheduler(loader, max_begun=requests) as scheduler,
                    Engine(scheduler, decoder, max_sequences=requests) as engine,
                ):
                    yield loader, engine


def _wanted(requests: int, adapters: Sequence[Path | None]) -> list[Generation]:
    """Other prompts, the adapters in turn."""
    return [
        Generation(
            adapters[number % len(adapters)],
            tuple(range(1000 + number * PROMPT, 1000 + (number + 1) * PROMPT)),
            NEW,
            Sampling(temperature=0),
        )
        for number in range(requests)
    ]


def lines(row: str, times: Times) -> list[Line]:
    bound = GENERATE if row in FULL else ALONE
    return [_line(row, name, times, bound) for name in sorted(times.of, key=bound.__ne__)]


def _line(row: str, name: str, times: Times, bound: str) -> Line:
    ratio, target = times.median(name) / times.median(bound), TARGETS.get(name)
    return {
        "row": row,
        "contender": name,
        "median_ms": times.median(name),
        "min_ms": min(times.of[name]),
        "max_ms": max(times.of[name]),
        "ratio": ratio,
        "ratio_of_minima": min(times.of[name]) / min(times.of[bound]),
        "target": "" if target is None else f"≤ {target}",
        "verdict": "" if target is None else verdict(ratio, target),
    }


def main() -> int:
    given = options("bench_server", __doc__ or "", rounds=7, rows=(*FULL, *TOGETHER), plots=False)
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        bench = Bench(given, Path(work))
        for name in given.only:

            async def run(name: str = name) -> Times:
                return await bench.row(name)

            found = lines(name, run_on("uvloop", run))
            print_lines(f"{name} [uvloop, {given.rounds} rounds]", found)
            write_json(given, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
