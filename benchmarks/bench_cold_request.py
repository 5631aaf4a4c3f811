"""Requests whose adapters are still on their way: when their first token comes, and what the others
feel of it.

SmolLM2 in float32, adapters over a throttled link. First tokens are held against a bound that
nobody can beat: the slower of "transfer alone", which computes nothing, and "warm", with the
adapter resident. Running requests are timed while 8 adapters come, token by token, against the same
arrivals with the adapters resident.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from bench_options import Options, options, print_environment, write_json
from cold_stage import CONNECTIONS, Base, Decoding
from harness import SEED, WrongBytesError, run_on
from link import Link
from lorax_async.engines.transformers import AttachedModel
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from times import Line, Times, print_lines, verdict

TOKENS = 224
FIRST_TOKEN, ON_SHARED_LINK = 1.05, 1.10
SHARED_CONNECTIONS = 16
"""The default."""

PARTS = {
    f"transfer ÷ prefill {part:g}{', shared link' if shared else ''}": (part, shared)
    for shared in (False, True)
    for part in (0.5, 1.0, 2.0)
}
TRANSFER, WARM = "transfer alone", "warm"
STREAMED, SEQUENTIAL = "cold, streamed", "cold, one after the other"

BESIDE = "inter-token time beside 8 loads"
ARRIVALS = 8
RUNNING = 4
STEPS_BETWEEN = 6
LOAD_SECONDS = 1.0
"""Of one adapter over its link: several are on their way at once."""
MEDIAN, P99 = 1.1, 1.3


@dataclass(slots=True, eq=False)
class Request:
    """A prompt for the one adapter; `expected` is the first token, that of every contender."""

    base: Base
    loader: AdapterLoader
    attached: AttachedModel
    url: str
    expected: list[torch.Tensor]

    async def ready(self, name: str) -> Callable[[], Awaitable[None]]:
        """What is to be timed."""
        if name == WARM:
            handle = await self.loader.load(self.url)
            await handle.verified()

            async def warm() -> None:
                async with handle:
                    await self._first_token(handle)

            return warm
        return {TRANSFER: self._transfer, STREAMED: self._stream, SEQUENTIAL: self._load}[name]

    async def _transfer(self) -> None:
        async with await self.loader.load(self.url):
            pass

    async def _stream(self) -> None:
        async with self.loader.stream(self.url) as handle:
            await self._first_token(handle)

    async def _load(self) -> None:
        async with await self.loader.load(self.url) as handle:
            await self._first_token(handle)

    async def _first_token(self, handle: AdapterHandle) -> None:
        decoding = Decoding(self.base.model, self.attached, [handle])
        await decoding.prefill(TOKENS)
        self.expected.append(decoding.next)
        if not self.expected[-1].equal(self.expected[0]):
            raise WrongBytesError("another token than with the adapter resident")


class Bench:
    """The model and the adapters' files, for all rows."""

    def __init__(self, given: Options, work: Path) -> None:
        self._options = given
        self._cache = work / "cache"
        self._base = Base(work, ARRIVALS + 1)

    async def first_tokens(self, part: float, *, shared: bool) -> Times:
        """With a link by which the adapter takes that part of the time of a prefill."""
        times, shuffle = Times(), random.Random(SEED).shuffle
        names, expected = [TRANSFER, WARM, STREAMED, SEQUENTIAL], list[torch.Tensor]()
        rate = self._base.nbytes / (part * self._prefill_seconds())
        with self._base.link(rate, shared=shared) as link:
            for _ in range(self._options.rounds):
                shuffle(names)
                for name in names:
                    connections = SHARED_CONNECTIONS if shared else CONNECTIONS
                    times.add(name, await self._first_token(name, link, expected, connections))
        return times

    async def _first_token(
        self, name: str, link: Link, expected: list[torch.Tensor], connections: int
    ) -> float:
        base, threads = self._base, self._options.io_threads
        served = base.served(link, self._cache, io_threads=threads, connections=connections)
        async with served as (loader, attached):
            request = Request(base, loader, attached, base.urls(link)[0], expected)
            run = await request.ready(name)
            start = perf_counter()
            await run()
            return perf_counter() - start

    def _prefill_seconds(self) -> float:
        """Of the base alone, the median of some: what the link's rate is made from."""
        prompt = torch.arange(1000, 1000 + TOKENS).unsqueeze(0)
        found = []
        with torch.no_grad():
            for _ in range(4):
                start = perf_counter()
                self._base.model(input_ids=prompt, logits_to_keep=1)
                found.append(perf_counter() - start)
        return statistics.median(found[1:])

    async def inter_token(self) -> Times:
        times, shuffle = Times(), random.Random(SEED).shuffle
        names = ["arrivals, warm", "arrivals, cold"]
        with self._base.link(self._base.nbytes / LOAD_SECONDS, shared=False) as link:
            for _ in range(self._options.rounds):
                shuffle(names)
                for name in names:
                    await self._beside(name, link, times)
        return times

    async def _beside(self, name: str, link: Link, times: Times) -> None:
        base, threads = self._base, self._options.io_threads
        async with base.served(link, self._cache, io_threads=threads) as (loader, attached):
            running, *arriving = base.urls(link)
            async with await loader.load(running) as handle:
                await handle.verified()
                if name.endswith("warm"):
                    await loader.prefetch(arriving)
                await self._decode(
                    name,
                    loader,
                    Decoding(base.model, attached, [handle] * RUNNING),
                    arriving,
                    times,
                )

    async def _decode(
        self,
        name: str,
        loader: AdapterLoader,
        decoding: Decoding,
        arriving: Sequence[str],
        times: Times,
    ) -> None:
        """A step after the other; every few of them somebody wants one more adapter."""
        await decoding.prefill(16)
        wanted: list[asyncio.Task[AdapterHandle]] = []
        for number in range((len(arriving) + 2) * STEPS_BETWEEN):
            if number % STEPS_BETWEEN == 0 and len(wanted) < len(arriving):
                wanted.append(asyncio.create_task(loader.load(arriving[len(wanted)])))
            start = perf_counter()
            await decoding.step()
            times.add(name, perf_counter() - start)
        for task in wanted:
            (await task).release()


def first_token_lines(row: str, times: Times) -> list[Line]:
    bound = max(times.median(TRANSFER), times.median(WARM))
    target = ON_SHARED_LINK if PARTS[row][1] else FIRST_TOKEN
    return [
        _line(row, name, times, times.median(name) / bound, target, judged=name == STREAMED)
        for name in (TRANSFER, WARM, STREAMED, SEQUENTIAL)
    ]


def inter_token_lines(row: str, times: Times) -> list[Line]:
    warm, cold = "arrivals, warm", "arrivals, cold"
    found = []
    for name in (warm, cold):
        line = _line(
            row, name, times, times.median(name) / times.median(warm), MEDIAN, judged=name == cold
        )
        ratio = times.p99(name) / times.p99(warm)
        line |= {"p99_ms": times.p99(name), "p99_ratio": ratio}
        if name == cold:
            line |= {"p99_target": f"≤ {P99}", "p99_verdict": verdict(ratio, P99)}
        found.append(line)
    return found


def _line(row: str, name: str, times: Times, ratio: float, target: float, *, judged: bool) -> Line:
    return {
        "row": row,
        "contender": name,
        "median_ms": times.median(name),
        "min_ms": min(times.of[name]),
        "max_ms": max(times.of[name]),
        "ratio": ratio,
        "target": f"≤ {target}" if judged else "",
        "verdict": verdict(ratio, target) if judged else "",
    }


def main() -> int:
    rows = (*PARTS, BESIDE)
    given = options("bench_cold_request", __doc__ or "", rounds=9, rows=rows, plots=False)
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        bench = Bench(given, Path(work))
        for name in given.only:

            async def run(name: str = name) -> Times:
                if name == BESIDE:
                    return await bench.inter_token()
                part, shared = PARTS[name]
                return await bench.first_tokens(part, shared=shared)

            times = run_on("uvloop", run)
            made = first_token_lines if name in PARTS else inter_token_lines
            found = made(name, times)
            print_lines(f"{name} [uvloop, {given.rounds} rounds]", found)
            write_json(given, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
