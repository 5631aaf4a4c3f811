"""`Engine`: generations become tokens, many at a time, with a decoder in a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from lorax_async.errors import InternalError, LoaderClosedError, LoraxError, UsageError
from lorax_async.scheduler import AdapterScheduler
from lorax_async.scheduling.batch import Batch
from lorax_async.scheduling.requests import Request, Ticket
from lorax_async.server.decoding.answer import Answer
from lorax_async.server.decoding.sampling import Sampler
from lorax_async.server.decoding.steps import Outcome, Work
from lorax_async.server.generation import Generation
from lorax_async.server.ports import Decoder
from lorax_async.settings.requirements import require_count

T = TypeVar("T")


class Engine:
    """Continuous batching: each step computes a batch of whoever can be computed.

    Parameters
    ----------
    scheduler
        Open, and closed after the engine. Nobody else takes its batches. Its `max_begun` is the
        number of sequences that the decoder has room for. One that the scheduler preempts is
        computed again later, with the tokens that it has, and goes on from there.
    decoder
        Called in one thread, the engine's; nothing of a model is computed on the event loop.
    max_tokens, max_sequences
        Of a step, at most. A longer prompt is computed in parts.

    Use it as an async context manager, on the scheduler's loop. What goes wrong with an adapter
    goes wrong with its generations alone. Where the decoder raises, those of the step end with
    `InternalError`, and the others go on.
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
        self._answers: dict[Ticket, Answer] = {}
        self._waiting: set[Answer] = set()
        self._gone: list[int] = []
        self._thread = ThreadPoolExecutor(1, "lorax-decoder")
        self._refusing: str | None = "the engine is not open yet"
        self._ended = asyncio.Event()
        self._ended.set()
        self._running: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._refusing = None
        self._running = asyncio.create_task(self._run(), name="lorax engine")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take nothing more, and wait until what was taken has ended; whether it has, in time."""
        self._refusing = "the server is closing"
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._ended.wait()
        return self._ended.is_set()

    async def close(self) -> None:
        """End what is under way with `LoaderClosedError`. Waits for the step that is computed.

        Idempotent; cancelling the caller does not stop it.
        """
        if self._closing is None:
            self._refusing = "the engine was closed"
            self._closing = asyncio.create_task(self._close(), name="lorax engine close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._end_all(LoaderClosedError("the engine was closed"))
        if self._running is not None:
            self._running.cancel()
        try:  # behind the step that is computed, if there is one
            await self._in_thread(self._forget, self._take_gone())
        finally:
            self._thread.shutdown()  # it has nothing to do any more

    # -- generations -------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        return self._decoder.max_length

    @property
    def alive(self) -> bool:
        return self._refusing is None

    @property
    def waiting(self) -> int:
        """Generations that were submitted, and of which nothing has been computed yet."""
        return len(self._waiting)

    def submit(self, generation: Generation) -> Answer:
        """Queue it; its adapter begins to come. What is wrong with that, its tokens raise.

        Raises
        ------
        UsageError
            A number is out of range; a token is none of the model's; or prompt and
            `max_new_tokens` together are more than `max_length`.
        LoaderClosedError
            The engine is not open, or closing.
        """
        if self._refusing is not None:
            raise LoaderClosedError(self._refusing)
        sampler = Sampler(generation.sampling)
        request = Request(
            generation.adapter,
            len(generation.prompt),
            generation.max_new_tokens,
            deadline=generation.deadline,
            client=generation.client,
        )
        self._check(generation)
        ticket = self._scheduler.submit(request)
        answer = Answer(next(self._numbers), generation, sampler, ticket)
        self._answers[ticket] = answer
        self._waiting.add(answer)
        self._ended.clear()
        ticket.add_done_callback(partial(self._leave, answer))
        return answer

    def _check(self, generation: Generation) -> None:
        length, vocabulary = len(generation.prompt), self._decoder.vocabulary
        if length + generation.max_new_tokens > self.max_length:
            raise UsageError(
                f"the prompt has {length} tokens and max_new_tokens is {generation.max_new_tokens}:"
                f" together more than the {self.max_length} that a sequence may have"
            )
        if not all(isinstance(t, int) and 0 <= t < vocabulary for t in generation.prompt):
            raise UsageError(f"the prompt's tokens must be integers from 0 to {vocabulary - 1}")

    def _leave(self, answer: Answer) -> None:
        """Its ticket is done."""
        ticket = answer.ticket
        self._answers.pop(ticket, None)
        self._waiting.discard(answer)
        self._gone.append(answer.number)
        answer.end(None if ticket.cancelled else ticket.error)
        if not self._answers:
            self._ended.set()

    def _end_all(self, error: LoraxError) -> None:
        """But not who has ended, and is told in the loop's next turn."""
        for answer in tuple(self._answers.values()):
            if answer.ticket.cancel():
                answer.end(error)

    # -- steps -------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                await self._step(await self._scheduler.next_batch(*self._limits))
        except LoaderClosedError:
            self._refusing = "the scheduler was closed"
        except Exception as error:  # noqa: BLE001 - nobody waits for ever
            self._refusing = "the engine has failed"
            failed = InternalError(f"the engine has failed: {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._end_all(failed)

    async def _step(self, batch: Batch) -> None:
        work = Work.of(batch, self._answers)
        gone = [*self._take_gone(), *self._preempted(batch)]
        self._complete(work, await self._in_thread(work.compute, self._decoder, gone))

    def _preempted(self, batch: Batch) -> list[int]:
        """Return the sequences that have lost their places."""
        answers = [self._answers.get(ticket) for ticket in batch.preempted]
        return [answer.number for answer in answers if answer is not None]

    def _complete(self, work: Work, outcome: Outcome) -> None:
        finished = [
            answer.ticket
            for answer, token in outcome.tokens.items()
            if token in answer.generation.stop_tokens
        ]
        again = self._scheduler.complete(
            work.batch, finished, again=outcome.again, failed=outcome.failed
        )
        for row, answer in work.rows:
            if row.ticket in again:
                if answer in outcome.tokens:  # its first one, which does not count
                    answer.sampler = Sampler(answer.generation.sampling)
                continue
            self._waiting.discard(answer)
            if answer in outcome.tokens and _counts(row.ticket):
                answer.add(outcome.tokens[answer])

    def _take_gone(self) -> list[int]:
        """All whose places the scheduler may have given away, told in this turn or not."""
        untold = [answer.number for ticket, answer in self._answers.items() if ticket.done]
        gone, self._gone = self._gone + untold, []
        return gone

    def _forget(self, gone: Iterable[int]) -> None:
        for number in gone:
            self._decoder.forget(number)

    async def _in_thread(self, work: Callable[..., T], *given: object) -> T:
        """Once it is asked for it is done, whoever is cancelled meanwhile."""
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._thread, copy_context().run, work, *given)
        return await asyncio.shield(done)


def _counts(ticket: Ticket) -> bool:
    """Its token is good: its adapter has not turned out to be false meanwhile, and it is wanted."""
    return not ticket.cancelled and ticket.error is None
