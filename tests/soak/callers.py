"""Those who want adapters: they load, stream, prefetch and pin, look at what they got, and leave."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from time import monotonic
from typing import Any

import torch
from safetensors.torch import load

from lorax_async import AdapterHandle, IntegrityError, LoraxError
from lorax_async.verification import Verification, VerificationKind
from soak.judging import Judge, SoakError, Tally
from soak.library import COUNT, LAYERS, MODULES, Stored, library
from soak.setting import Setting

AT_ONCE = 64
ZIPF = 1.1
CANCELLED = 0.2
VERIFIED = 0.5
"""Of those who load: they wait for the digest."""
GRACE = 60.0
"""Seconds after its deadline, or its cancellation, in which a call must have ended."""
MOST_PINNED = 2

WISHES = {"load": 55, "stream": 20, "prefetch": 15, "pin": 10}
TIERS = ("disk", "host", "device")
_POPULAR = list(accumulate(1 / (1 + n) ** ZIPF for n in range(COUNT)))

# -- what a device must hold -----------------------------------------------------------------------

Digests = tuple[str, ...]
"""One for each layer, over A and B of its modules."""

PER_LAYER = len(MODULES) // LAYERS


@cache
def expected(seed: int) -> tuple[Digests, ...]:
    """Of the whole library."""
    return tuple(map(_of_source, library(seed)))


def on_device(handle: AdapterHandle, layers: range) -> Digests:
    """Of those layers. In any thread: the slot is kept meanwhile, whoever releases the handle."""
    with handle.use():
        return tuple(_of_device(handle, layer) for layer in layers)


def _of_source(stored: Stored) -> Digests:
    saved = load(stored.weights())
    found = []
    for layer in range(LAYERS):
        digest = hashlib.sha256()
        for name in _names(layer):
            for part in ("A", "B"):
                digest.update(_raw(saved[f"base_model.model.{name}.lora_{part}.weight"]))
        found.append(digest.hexdigest())
    return tuple(found)


def _of_device(handle: AdapterHandle, layer: int) -> str:
    digest = hashlib.sha256()
    modules = handle.modules
    for name in _names(layer):
        module = modules[name]
        for tensor in (module.a, module.b):
            digest.update(_raw(tensor))
    return digest.hexdigest()


def _names(layer: int) -> tuple[str, ...]:
    return MODULES[layer * PER_LAYER : (layer + 1) * PER_LAYER]


def _raw(tensor: torch.Tensor) -> Any:
    """The bytes as they are: not all of them are numbers."""
    return tensor.contiguous().view(torch.uint8).numpy()


# -- callers --------------------------------------------------------------------------------------


class Callers:
    """`held` are the handles that are out now. `threads` are those that look at the device."""

    def __init__(
        self,
        setting: Setting,
        expected: tuple[Digests, ...],
        judge: Judge,
        tally: Tally,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.held: set[AdapterHandle] = set()
        self._setting = setting
        self._expected = expected
        self._judge = judge
        self._tally = tally
        self._threads = threads
        self._pinned: set[Stored] = set()

    async def caller(self, draw: random.Random, until: float) -> None:
        """One of them, one wish after the other."""
        while monotonic() < until:
            (stored,) = draw.choices(self._setting.library, cum_weights=_POPULAR)
            (wish,) = draw.choices(list(WISHES), list(WISHES.values()))
            doing = {
                "load": self._load,
                "stream": self._stream,
                "prefetch": self._prefetch,
                "pin": self._pin,
            }[wish]
            await self._wish(wish, doing, stored, draw)

    async def everything_loads(self, stored: Stored, draw: random.Random) -> None:
        """Now that the source is good; what was left of a bad download may show once."""
        for _ in range(5):
            try:
                await self._load(stored, draw, 120)
            except LoraxError as error:
                self._judge.require_allowed(stored, error)
                failed = error
            else:
                return
        raise SoakError(f"{stored.name} does not load any more: {failed}", failed.story)

    async def _wish(
        self,
        wish: str,
        doing: Callable[[Stored, random.Random, float], Awaitable[None]],
        stored: Stored,
        draw: random.Random,
    ) -> None:
        seconds = draw.uniform(1, 10)
        impatient = draw.random() < CANCELLED
        task = asyncio.ensure_future(doing(stored, draw, seconds))
        try:
            if impatient:
                await asyncio.wait([task], timeout=draw.uniform(0, 1.5))
                impatient = task.cancel()
            await asyncio.wait([task], timeout=seconds + GRACE)
            if not task.done():
                raise SoakError(f"{wish} of {stored.name} neither ends nor fails")
        finally:
            if task.cancel():
                await asyncio.wait([task], timeout=GRACE)
        self._judged(wish, stored, task, impatient=impatient)

    def _judged(
        self, wish: str, stored: Stored, task: asyncio.Future[None], *, impatient: bool
    ) -> None:
        if task.cancelled():
            if not impatient:
                raise SoakError(f"{wish} of {stored.name} was cancelled by nobody")
            self._tally.outcomes["cancelled"] += 1
            return
        error = task.exception()
        if error is None:
            self._tally.outcomes[wish] += 1
            return
        if isinstance(error, SoakError):
            raise error
        self._judge.require_allowed(stored, error)
        assert isinstance(error, LoraxError)
        self._tally.outcomes["failed"] += 1
        self._tally.failed(error)

    # -- wishes -----------------------------------------------------------------------------------

    async def _load(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        ref = self._setting.ref(stored)
        handle = await self._setting.loader.load(ref, timeout=seconds, priority=draw.randrange(3))
        with self._holding(handle):
            await self._look(stored, handle, range(LAYERS))
            if draw.random() < VERIFIED:
                await self._verify(stored, handle, seconds)
            await asyncio.sleep(draw.uniform(0, 0.2))

    async def _verify(self, stored: Stored, handle: AdapterHandle, seconds: float) -> None:
        found = await handle.verified(timeout=seconds)
        kind: VerificationKind = "sha256" if stored.promised else "transport"
        if found != Verification(kind, stored.digests[1]):
            raise SoakError(f"{stored.name} was checked, and is {found}")
        self._tally.outcomes["verified"] += 1

    async def _stream(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        ref = self._setting.ref(stored)
        async with self._setting.loader.stream(ref, timeout=seconds) as handle:
            with self._holding(handle):
                for layer in range(LAYERS):
                    await handle.layer_ready(layer, timeout=seconds)
                    await self._look(stored, handle, range(layer, layer + 1))

    async def _prefetch(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        ref, tier = self._setting.ref(stored), draw.choice(TIERS)
        hint = self._setting.loader.prefetch(ref, tier=tier, timeout=seconds)  # type: ignore[arg-type]
        try:
            await hint
        finally:
            hint.cancel()

    async def _pin(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        """For a while."""
        if len(self._pinned) == MOST_PINNED or stored in self._pinned:
            await self._load(stored, draw, seconds)
            return
        ref, loader = self._setting.ref(stored), self._setting.loader
        self._pinned.add(stored)
        try:
            await loader.pin(ref, timeout=seconds)
            await asyncio.sleep(draw.uniform(0, 0.3))
        finally:
            self._pinned.discard(stored)
            loader.unpin(ref)

    # -- what they hold ---------------------------------------------------------------------------

    @contextmanager
    def _holding(self, handle: AdapterHandle) -> Iterator[None]:
        self.held.add(handle)
        try:
            yield
        finally:
            self.held.discard(handle)
            handle.release()

    async def _look(self, stored: Stored, handle: AdapterHandle, layers: range) -> None:
        """The bytes are the source's; or the loader, which had no time to check them, finds out."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, on_device, handle, layers)
        self._tally.outcomes["layers compared"] += len(layers)
        if found == self._expected[stored.number][layers.start : layers.stop]:
            return
        told = await self._judge.verdict(handle.key, handle.slot, GRACE)
        if not stored.promised or told is not IntegrityError:
            story = self._setting.loader.story(handle.key)
            raise SoakError(f"{stored.name}: {layers} on the device is wrong ({told})", story)
        self._tally.outcomes["wrong bytes that were told of"] += len(layers)
