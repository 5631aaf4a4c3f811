"""`Engine`: continuous batching of generations over a decoder in its own thread."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, Self, TypeVar

import torch

from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    InternalError,
    LoaderClosedError,
    LoraxError,
    UsageError,
)
from lorax_async.handle import AdapterHandle
from lorax_async.scheduler.requests import Request, Ticket
from lorax_async.scheduler.scheduler import AdapterScheduler, Batch, BatchRow
from lorax_async.types import AdapterId, AdapterKey, require_count

Finish = Literal["stop", "length"]

# -- generations ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 1.0
    """From 0, which takes the likeliest token."""
    top_p: float = 1.0
    """Above 0, at most 1: sample from the fewest tokens that have this probability together."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0 is all."""
    min_p: float = 0.0
    """Up to 1: leave out tokens less likely than this times the likeliest."""
    repetition_penalty: float = 1.0
    """From 0.01 to 100: divide the positive logits of tokens that the sequence has, multiply the
    others."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever is computed beside them. None: any."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to generate."""

    adapter: AdapterId | None
    """As for `AdapterLoader.load`; None is the base alone."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int
    """End it with "length" after this many."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    """Any of these ends it with "stop", and is not returned."""
    deadline: float | None = None
    """Seconds from `submit` until its first step must begin; None takes the loader's timeout."""
    client: Hashable = field(default=None, repr=False)
    """Whose it is, as in `scheduler.requests.Request`."""
    vocabulary_of: AdapterKey | None = None
    """The adapter with a vocabulary of its own whose tokens these are; None is the base."""


class OtherVocabularyError(IncompatibleAdapterError):
    """The prompt has tokens of another vocabulary than that of the adapter's present version."""


# -- steps of a decoder ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequencePart:
    """The part of one sequence to compute in a step."""

    sequence: int
    """Names it from its first step until it is forgotten."""
    start: int
    """The position of the first of `tokens`; earlier steps computed those before. 0 starts over."""
    tokens: Sequence[int]
    """Token ids, at least one."""
    handle: AdapterHandle | None
    """Its adapter, resident or streaming, leased for the step; None is the base."""


@dataclass(frozen=True, slots=True)
class DecoderStep:
    """Parts of different sequences, computed together."""

    parts: Sequence[SequencePart]
    budget: float
    """Seconds that it may wait for layers of adapters."""
    others_wait: Callable[[], bool]
    """Whether other sequences could be computed instead; see `Batch`. In any thread."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step."""

    logits: torch.Tensor
    """float32 `[parts, vocabulary]`, of the token after each part's last one; as wide as the widest
    vocabulary of a part, and -inf beyond a part's own. Rows in `out` are undefined."""
    out: Mapping[int, LoraxError]
    """The error of each part that was not computed, by its number. Its sequence is forgotten;
    after an `AdapterTimeoutError` it can start over."""


class Decoder(Protocol):
    """A model with its KV cache, called in one worker thread, one step after the other."""

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""

    @property
    def vocabulary(self) -> int:
        """Token ids of the base are below it."""

    def compute(self, step: DecoderStep) -> StepResult:
        """Compute a step; blocks. An exception fails all of its parts."""

    def forget(self, sequence: int) -> None:
        """Free a sequence's keys and values. Idempotent."""


# -- sampling -------------------------------------------------------------------------------------

LEAST_PENALTY, MOST_PENALTY = 0.01, 100
"""Of repetition. Others would make finite logits infinite, or NaN, as an adapter's faults do."""

_CANDIDATES = 256, 8192
"""Numbers of likeliest tokens to search for `top_p` first: sorting a whole vocabulary takes
milliseconds."""


class Sampler:
    """Choose the tokens of one sequence, with its own random numbers: one per token.

    Raise `UsageError` for a number out of range.
    """

    def __init__(self, sampling: Sampling) -> None:
        temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
        min_p, penalty, seed = sampling.min_p, sampling.repetition_penalty, sampling.seed
        if not _is_between(temperature, 0, sys.float_info.max):
            raise UsageError(
                f"temperature must be a finite number of 0 or more, not {temperature!r}"
            )
        if not _is_between(top_p, 0, 1) or top_p == 0:
            raise UsageError(f"top_p must be above 0 and at most 1, not {top_p!r}")
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
            raise UsageError(f"top_k must be an integer of 0 or more, not {top_k!r}")
        if not _is_between(min_p, 0, 1):
            raise UsageError(f"min_p must be from 0 to 1, not {min_p!r}")
        if not _is_between(penalty, LEAST_PENALTY, MOST_PENALTY):
            raise UsageError(
                f"repetition_penalty must be from {LEAST_PENALTY} to {MOST_PENALTY}, not"
                f" {penalty!r}"
            )
        is_seed = isinstance(seed, int) and _is_between(seed, -(1 << 63), (1 << 63) - 1)
        if seed is not None and not is_seed:
            raise UsageError(f"seed must be a signed 64-bit integer or None, not {seed!r}")
        self.greedy = temperature == 0
        """Whether it takes the likeliest token."""
        self._temperature = float(temperature)
        self._top_p = float(top_p)
        self._top_k = top_k
        self._min_p = float(min_p)
        self._penalty = float(penalty)
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)

    def penalize(self, logits: torch.Tensor, known: Sequence[int]) -> None:
        """Apply the repetition penalty to a row of logits, given the sequence's tokens."""
        if self._penalty != 1:
            tokens = torch.tensor(known, device=logits.device)
            found = logits[tokens]
            logits[tokens] = torch.where(found > 0, found / self._penalty, found * self._penalty)

    def choose(self, logits: torch.Tensor) -> int:
        """Return a token, given float32 logits `[vocabulary]` on the CPU without NaN.

        As in vLLM, `min_p` comes before `top_k`, and `top_p` last.
        """
        likely = torch.softmax((logits - logits.max()).double() / self._temperature, dim=-1)
        if self._min_p:
            likely[likely < self._min_p * likely.max()] = 0
        if self._top_p == 1 and not self._top_k:
            return self._draw(likely)
        # The fewest likeliest tokens that have `top_p` of the rest together.
        counts = (self._top_k,) if self._top_k else (*_CANDIDATES, len(likely))
        for count in counts:
            top, tokens = likely.topk(min(count, len(likely)))
            wanted = self._top_p * (top if self._top_k else likely).sum()
            if top.sum() >= wanted:
                break
        before = top.cumsum(dim=-1) - top
        return int(tokens[self._draw(top[: int((before < wanted).sum())])])

    def _draw(self, likely: torch.Tensor) -> int:
        sums = likely.cumsum(dim=-1)
        at = torch.rand((), dtype=sums.dtype, generator=self._random) * sums[-1]
        return min(int(torch.searchsorted(sums, at, right=True)), len(sums) - 1)


def _is_between(value: object, low: float, high: float) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and low <= value <= high


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Return the next token of each row of `[rows, vocabulary]`; None for unusable logits."""
    largest, likeliest = logits.max(dim=-1)  # NaN if there is one
    usable, tokens = largest.isfinite().tolist(), likeliest.tolist()
    return [
        (tokens[row] if sampler.greedy else sampler.choose(logits[row].cpu()))
        if usable[row]
        else None
        for row, sampler in enumerate(samplers)
    ]


# -- the engine -----------------------------------------------------------------------------------

T = TypeVar("T")


@dataclass(slots=True)
class StepOutcome:
    """The new tokens of a step's rows, the rows to compute again, and those that failed."""

    tokens: dict[TokenStream, int] = field(default_factory=dict)
    again: list[Ticket] = field(default_factory=list)
    failed: dict[Ticket, LoraxError] = field(default_factory=dict)


class Engine:
    """Compute a batch of the ready generations in each step.

    The scheduler is open, and closed after the engine, which alone takes its batches. Its
    `max_begun` is the number of sequences that the decoder has room for; a preempted sequence is
    computed again later, from its prompt and the tokens that it has. The decoder is called in the
    engine's thread only. `max_tokens` and `max_sequences` limit one step; longer prompts are
    computed in parts.

    Use it as an async context manager, on the scheduler's loop. An adapter that fails, fails its
    own generations only. If the decoder raises, those of the step end with `InternalError`.
    """

    def __init__(
        self,
        scheduler: AdapterScheduler,
        decoder: Decoder,
        *,
        max_tokens: int = 2048,
        max_sequences: int = 64,
    ) -> None:
        require_count("max_tokens", max_tokens, least=1)
        require_count("max_sequences", max_sequences, least=1)
        self._scheduler = scheduler
        self._decoder = decoder
        self._limits = max_tokens, max_sequences
        self._numbers = itertools.count()
        self._streams: dict[Ticket, TokenStream] = {}
        self._ended_sequences: list[int] = []
        self._thread = ThreadPoolExecutor(1, "lorax-decoder")
        self._refusal: str | None = "the engine is not open yet"
        self._running: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._refusal = None
        self._running = asyncio.create_task(self._run(), name="lorax engine")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all generations with `LoaderClosedError`, and wait for the step being computed.

        Idempotent; cancelling the caller does not stop it.
        """
        if self._closing is None:
            self._refusal = "the engine was closed"
            self._closing = asyncio.create_task(self._close(), name="lorax engine close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._end_all(LoaderClosedError("the engine was closed"))
        if self._running is not None:
            self._running.cancel()
        try:  # queued behind the step being computed
            await self._in_thread(self._forget, self._take_ended())
        finally:
            self._thread.shutdown()  # idle by now

    # -- generations -------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence, prompt included."""
        return self._decoder.max_length

    @property
    def alive(self) -> bool:
        """Whether it takes generations: False when closing, or after a failure."""
        return self._refusal is None

    @property
    def waiting(self) -> int:
        """The number of submitted generations of which nothing was computed yet."""
        return sum(not stream.begun for stream in self._streams.values())

    def submit(self, generation: Generation) -> TokenStream:
        """Queue a generation, and begin to load its adapter, whose errors the tokens raise.

        Raises
        ------
        UsageError
            A number is out of range, a token is not in the vocabulary, or prompt and
            `max_new_tokens` exceed `max_length`.
        LoaderClosedError
            The engine is not open, or closing.
        """
        if self._refusal is not None:
            raise LoaderClosedError(self._refusal)
        sampler = Sampler(generation.sampling)
        prompt, new = generation.prompt, generation.max_new_tokens
        request = Request(
            generation.adapter,
            len(prompt),
            new,
            deadline=generation.deadline,
            client=generation.client,
        )
        if len(prompt) + new > self.max_length:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is {new}: together more"
                f" than the {self.max_length} that a sequence may have"
            )
        # The limit of a vocabulary of an adapter's own is known once that is loaded.
        own = generation.vocabulary_of is not None
        vocabulary = sys.maxsize if own else self._decoder.vocabulary
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in prompt):
            raise UsageError(f"the prompt's tokens must be integers from 0 to {vocabulary - 1}")
        ticket = self._scheduler.submit(request)
        stream = TokenStream(next(self._numbers), generation, sampler, ticket)
        self._streams[ticket] = stream
        ticket.add_done_callback(partial(self._leave, stream))
        return stream

    def _leave(self, stream: TokenStream) -> None:
        """Forget a stream whose ticket is done."""
        ticket = stream.ticket
        self._streams.pop(ticket, None)
        self._ended_sequences.append(stream.number)
        stream.end(None if ticket.cancelled else ticket.error)

    def _end_all(self, error: LoraxError) -> None:
        """End all streams, except those whose ticket is done and whose callback is due."""
        for stream in tuple(self._streams.values()):
            if stream.ticket.cancel():
                stream.end(error)

    # -- steps -------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                await self._step(await self._scheduler.next_batch(*self._limits))
        except LoaderClosedError:
            self._refusal = "the scheduler was closed"
        except Exception as error:  # noqa: BLE001 - no stream may wait forever
            self._refusal = "the engine has failed"
            failed = InternalError(f"the engine has failed: {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._end_all(failed)

    async def _step(self, batch: Batch) -> None:
        rows = [(row, self._streams[row.ticket]) for row in batch.rows]
        preempted = [self._streams[t].number for t in batch.preempted if t in self._streams]
        gone = self._take_ended() + preempted
        for _, stream in rows:
            stream.note_step()
        outcome = await self._in_thread(self._compute, batch, rows, gone)
        finished = [
            stream.ticket
            for stream, token in outcome.tokens.items()
            if token in stream.generation.stop_tokens
        ]
        without_result = self._scheduler.complete(
            batch, finished, again=outcome.again, failed=outcome.failed
        )
        for row, stream in rows:
            if row.ticket in without_result:
                if stream in outcome.tokens:  # its first token, discarded: restart the sampler
                    stream.sampler = Sampler(stream.generation.sampling)
                continue
            stream.begun = True
            if stream in outcome.tokens:
                stream.add(outcome.tokens[stream])

    def _compute(
        self, batch: Batch, rows: Sequence[tuple[BatchRow, TokenStream]], gone: Iterable[int]
    ) -> StepOutcome:
        """Forget the sequences in `gone`, then compute the batch. Blocks; in the thread."""
        failed_rows = {
            row.ticket: error
            for row, stream in rows
            if (error := _vocabulary_error(row.handle, stream.generation)) is not None
        }
        if failed_rows:
            rows = [pair for pair in rows if pair[0].ticket not in failed_rows]
        outcome = self._compute_rows(batch, rows, gone)
        outcome.failed.update(failed_rows)
        return outcome

    def _compute_rows(
        self, batch: Batch, rows: Sequence[tuple[BatchRow, TokenStream]], gone: Iterable[int]
    ) -> StepOutcome:
        parts = [
            SequencePart(
                stream.number,
                row.start,
                stream.known[row.start : row.start + row.tokens],
                row.handle,
            )
            for row, stream in rows
        ]
        try:
            self._forget(gone)
            if not parts:
                return StepOutcome()
            computed = self._decoder.compute(
                DecoderStep(parts, batch.budget, lambda: batch.others_wait)
            )
            done = [n for n, (row, _) in enumerate(rows) if row.last and n not in computed.out]
            logits, streams = computed.logits[done], [rows[number][1] for number in done]
            for row, stream in zip(logits, streams, strict=True):
                stream.sampler.penalize(row, stream.known)
            tokens = choose(logits, [stream.sampler for stream in streams])
        except Exception as error:  # noqa: BLE001 - the engine outlives its decoder's errors
            failed = error
            if not isinstance(failed, LoraxError):
                failed = InternalError(f"the decoder failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
            return StepOutcome(failed={row.ticket: failed for row, _ in rows})
        outcome = StepOutcome(again=[rows[number][0].ticket for number in computed.out])
        for number, token in zip(done, tokens, strict=True):
            row, stream = rows[number]
            if token is not None:
                outcome.tokens[stream] = token
            elif row.handle is None:
                reason = "the base model's logits are not finite"
                outcome.failed[row.ticket] = InternalError(reason)
            else:
                reason = "with its weights the logits are not finite"
                outcome.failed[row.ticket] = AdapterFormatError(reason, stage="ready")
        return outcome

    def _take_ended(self) -> list[int]:
        """Return all sequences whose places may be reused, also before their callbacks ran."""
        done = [stream.number for ticket, stream in self._streams.items() if ticket.done]
        gone, self._ended_sequences = self._ended_sequences + done, []
        return gone

    def _forget(self, gone: Iterable[int]) -> None:
        for number in gone:
            self._decoder.forget(number)

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        """Run `work` to its end, even if the caller is cancelled."""
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._thread, copy_context().run, work, *args)
        return await asyncio.shield(done)


def _vocabulary_error(handle: AdapterHandle | None, generation: Generation) -> LoraxError | None:
    """Return the error of a sequence whose prompt is not in the vocabulary of its adapter."""
    rows = None if handle is None else handle.vocabulary
    if rows is None and generation.vocabulary_of is None:
        return None
    if handle is None or rows is None or handle.key != generation.vocabulary_of:
        return OtherVocabularyError(
            "its vocabulary is another one than that of the prompt's tokens; ask again",
            stage="ready",
        )
    if (largest := max(generation.prompt)) >= rows:
        return AdapterFormatError(
            f"the prompt has the token {largest}, and its vocabulary {rows} rows; save the adapter"
            " with the tokenizer that it was trained with",
            stage="ready",
        )
    return None


class TokenStream:
    """The tokens of one generation, for one reader. On the event loop.

    Iterating raises the `LoraxError` that ended it, after the last token.
    """

    def __init__(
        self, number: int, generation: Generation, sampler: Sampler, ticket: Ticket
    ) -> None:
        self.number = number
        """Names its sequence to the decoder."""
        self.generation = generation
        self.sampler = sampler
        self.ticket = ticket
        self.known = list(generation.prompt)
        """Token ids, those of the prompt and those generated."""
        self.begun = False
        """Whether anything was computed."""
        self.finish: Finish | None = None
        """Why it ended; None before, and if it failed or was cancelled."""
        self.queue_seconds: float | None = None
        """The time until its first step, once that begins."""
        self._since = time.monotonic()
        self._ready = asyncio.Queue[int | None]()
        self._ended = False
        self._error: LoraxError | None = None

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        token = await self._ready.get()
        if token is None:
            self._ready.put_nowait(None)  # for later calls
            if self._error is not None:
                raise self._error.located() from self._error.__cause__
            raise StopAsyncIteration
        return token

    def cancel(self) -> None:
        """Stop generating, and free its place. Idempotent."""
        self.ticket.cancel()
        self.end()

    def note_step(self) -> None:
        """Note that a step with it begins."""
        if self.queue_seconds is None:
            self.queue_seconds = time.monotonic() - self._since

    def add(self, token: int) -> None:
        """Add a generated token; a stop token ends the stream and is not returned."""
        self.known.append(token)
        if token in self.generation.stop_tokens:
            self.finish = "stop"
            return
        if len(self.known) == len(self.generation.prompt) + self.generation.max_new_tokens:
            self.finish = "length"
        self._ready.put_nowait(token)

    def end(self, error: LoraxError | None = None) -> None:
        """End the stream. Only the first call counts."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._ready.put_nowait(None)
