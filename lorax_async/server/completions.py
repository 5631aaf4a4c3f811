"""One request for text, from its body to its response."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lorax_async.errors import InternalError, LoraxError
from lorax_async.server.engine import Finish, Generation, OtherVocabularyError, Sampling
from lorax_async.server.request_bodies import (
    MAX_SEED,
    MIN_SEED,
    ChatBody,
    CompletionBody,
    GenerationBody,
    PromptEncoder,
    StreamOptions,
)
from lorax_async.server.responses import (
    UNKNOWN,
    EventStream,
    create_refusal,
    invalid_parameter,
    unknown_model,
)
from lorax_async.server.server_log import in_ms, note_details, note_error, note_id
from lorax_async.server.server_metrics import ObservedTokens
from lorax_async.server.server_settings import identify_client
from lorax_async.server.service import Service
from lorax_async.types import AdapterId

Json = dict[str, Any]
Client = tuple[str, str]

MAX_ATTEMPTS = 3
"""Attempts of a request, if versions of its adapter with other vocabularies come meanwhile."""

CONTEXT_TOKENS = 8
"""Tokens of the prompt to decode first: some decoders drop a leading space."""

_INVALID_PREFIX = "Invalid prefix encountered"
"""How DecodeStream's message begins when new tokens change text that it has already returned."""


class GeneratedResponse(Response):
    """The answer to a request for text, which watches its client until it is sent."""

    background = None

    def __init__(self, service: Service, body: GenerationBody) -> None:
        self._service = service
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, body, settings = self._service, self._body, self._service.settings
        note_id(scope, "model", body.model)
        note_details(scope, stream=bool(body.stream))
        prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
        if prompts * (body.n or 1) > settings.max_choices:
            raise invalid_parameter(
                f"A request may have at most {settings.max_choices} sequences: its prompts,"
                " times n",
                "n" if prompts == 1 else "prompt",
            )
        service.require_room(1)  # refuse cheaply, before the prompt is read
        adapter = service.names.resolve(body.model)
        is_cold = adapter is not None and service.cold.is_cold(adapter)
        start = "base" if adapter is None else "cold" if is_cold else "warm"
        note_details(scope, start=start)
        client = identify_client(HTTPConnection(scope))
        with service.client_limits.count_request(client, adapter):
            stream = EventStream(scope, receive, send, settings.slow_client)
            await self._answer(body, adapter, stream, client)

    async def _answer(
        self, body: GenerationBody, adapter: AdapterId | None, stream: EventStream, client: Client
    ) -> None:
        service = self._service
        try:
            async with service.in_flight.open_scope(stream.receive):
                for attempt in range(1, MAX_ATTEMPTS + 1):
                    encoder, prompts = await service.encoders.read(body, adapter)
                    try:
                        await self._generate(body, adapter, encoder, prompts, stream, client)
                    except OtherVocabularyError:  # before the first token
                        if adapter is None or stream.has_begun or attempt == MAX_ATTEMPTS:
                            raise
                        await service.encoders.learn(adapter)
                    else:
                        break
        except ClientDisconnect as error:
            note_error(stream.scope, error)
            return
        except Exception as error:  # noqa: BLE001 - every error is a response
            note_error(stream.scope, error)
            if isinstance(error, UNKNOWN) and body.model not in service.names.adapters:
                refusal = unknown_model(body.model)
            else:
                refusal = create_refusal(error, service.settings.retry_after, body.model)
            if not stream.has_begun:
                raise (refusal if isinstance(error, LoraxError) else error) from error.__cause__
            await stream.fail(refusal, error)

    async def _generate(
        self,
        body: GenerationBody,
        adapter: AdapterId | None,
        encoder: PromptEncoder,
        prompts: Sequence[tuple[int, ...]],
        stream: EventStream,
        client: Client,
    ) -> None:
        service = self._service
        generations = _create_generations(service, body, adapter, encoder, prompts, client)
        with _submit(service, body, encoder, generations) as texts:
            answer = Answer(body, texts, [*map(len, prompts)])
            try:
                if body.stream:
                    await answer.stream(stream)
                else:
                    await stream.respond(JSONResponse(await answer.collect()))
            finally:
                note_details(stream.scope, **answer.details())


def _create_generations(
    service: Service,
    body: GenerationBody,
    adapter: AdapterId | None,
    encoder: PromptEncoder,
    prompts: Sequence[tuple[int, ...]],
    client: Client,
) -> list[Generation]:
    """Return `n` generations per prompt, in the order of the prompts. Raise `Refusal`."""
    generations: list[Generation] = []
    for prompt in prompts:
        room = service.engine.max_length - len(prompt)
        new = room if body.wanted_tokens is None else body.wanted_tokens
        length = param = None
        if len(prompt) > service.max_prompt_tokens:
            length = f"a prompt of {len(prompt)} tokens"
            param = "messages" if isinstance(body, ChatBody) else "prompt"
        elif new > room:
            length = f"{len(prompt)} tokens of the prompt and {new} new ones"
            param = "max_tokens"
        if param is not None:
            raise invalid_parameter(
                f"This model takes {service.engine.max_length} tokens, new ones included, and"
                f" prompts of {service.max_prompt_tokens}; this request has {length}",
                param,
                "context_length_exceeded",
            )
        stops = frozenset[int]() if body.ignore_eos else encoder.stop_tokens
        for _ in range(body.n or 1):
            sampling = _sampling(body, service.sampling, len(generations))
            generation = Generation(adapter, prompt, new, sampling, stops, client=client)
            generations.append(replace(generation, vocabulary_of=encoder.vocabulary_of))
    return generations


def _sampling(body: GenerationBody, defaults: Sampling, number: int) -> Sampling:
    """Add the sequence's number to the request's seed: its sequences differ. Seeds wrap around."""
    seed = body.seed
    if seed is not None:
        seed = (seed + number - MIN_SEED) % (MAX_SEED - MIN_SEED + 1) + MIN_SEED
    values: Json = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return replace(defaults, **given, seed=seed)


@contextmanager
def _submit(
    service: Service,
    body: GenerationBody,
    encoder: PromptEncoder,
    generations: Sequence[Generation],
) -> Iterator[TextStreams]:
    """Submit all generations or none; on leaving, cancel what is left."""
    service.require_room(len(generations))
    stops = (body.stop,) if isinstance(body.stop, str) else body.stop or ()
    texts = TextStreams()
    try:
        for generation in generations:
            detokenizer = Detokenizer(encoder.tokenizer, generation.prompt)
            tokens = service.submit(generation, body.model)
            texts.add(tokens, detokenizer, StopStrings(stops))
        yield texts
    finally:
        texts.close()


# -- from tokens to texts -------------------------------------------------------------------------


class TextDelta(NamedTuple):
    """New text of the sequence `choice`, or the reason why it ended; and its tokens so far."""

    choice: int
    text: str
    tokens: int
    finish: Finish | None = None


async def _read_texts(
    choice: int, tokens: ObservedTokens, detokenizer: Detokenizer, stops: StopStrings
) -> AsyncGenerator[TextDelta]:
    """Yield the texts of one sequence, then its end. Raise the `LoraxError` that ended it."""
    async for token in tokens:
        text = stops.feed(detokenizer.feed(token))
        if stops.hit:
            tokens.cancel()
        if text:
            yield TextDelta(choice, text, tokens.count)
        if stops.hit:
            yield TextDelta(choice, "", tokens.count, "stop")
            return
    if tokens.finish is None:
        raise InternalError("a generation ended without a reason")
    if text := stops.end():
        yield TextDelta(choice, text, tokens.count)
    yield TextDelta(choice, "", tokens.count, tokens.finish)


class TextStreams:
    """All sequences of one request, for one reader. Closing it cancels their generations."""

    def __init__(self) -> None:
        self._tokens: list[ObservedTokens] = []
        self._texts: list[AsyncGenerator[TextDelta]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, tokens: ObservedTokens, detokenizer: Detokenizer, stops: StopStrings) -> None:
        self._texts.append(_read_texts(len(self._texts), tokens, detokenizer, stops))
        self._tokens.append(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def count(self) -> int:
        """Tokens received."""
        return sum(tokens.count for tokens in self._tokens)

    @property
    def queue_seconds(self) -> float | None:
        """The time to the first step of all."""
        return _least(tokens.queue_seconds for tokens in self._tokens)

    @property
    def first_seconds(self) -> float | None:
        """The time to the first token of all."""
        return _least(tokens.first_seconds for tokens in self._tokens)

    def deltas(self) -> AsyncGenerator[TextDelta]:
        """Yield texts and ends as they arrive. Raise the first error that ended a sequence."""
        # One sequence, the usual case, needs no task.
        return self._texts[0] if len(self._texts) == 1 else self._interleave()

    async def _interleave(self) -> AsyncGenerator[TextDelta]:
        ready = asyncio.Queue[TextDelta | Exception]()

        async def read(texts: AsyncGenerator[TextDelta]) -> None:
            try:
                async for delta in texts:
                    ready.put_nowait(delta)
                    await asyncio.sleep(0)  # sequences whose tokens are ready take turns
            except Exception as error:  # noqa: BLE001 - the reader raises it
                ready.put_nowait(error)

        for texts in self._texts:
            self._tasks.append(asyncio.create_task(read(texts), name="lorax choice"))
        running = len(self._texts)
        while running:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            running -= item.finish is not None
            yield item

    def close(self) -> None:
        for tokens in self._tokens:
            tokens.cancel()
        for task in self._tasks:
            task.cancel()


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


class Detokenizer:
    """Turn one sequence's tokens into text as they come, without special tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in prompt[-CONTEXT_TOKENS:]:
            self.feed(token)

    def feed(self, token: int) -> str:
        """Return the text that a token adds; "" while a character is incomplete."""
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
        # The bytes so far are not text: drop them, and start over with this token.
        self._stream = DecodeStream(skip_special_tokens=True)
        return self._stream.step(self._tokenizer, token) or ""


class StopStrings:
    """Pass text on up to the stop string that completes first, excluding it.

    Text that may become a stop string is held back. How the text is cut does not matter.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = stops
        self._longest = max((len(stop) - 1 for stop in stops), default=0)
        self._held = ""
        self.hit = False
        """Whether a stop string was completed; no further text is passed on."""

    def feed(self, text: str) -> str:
        if self.hit:
            return ""
        held = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if matches:
            self.hit = True
            self._held = ""
            return held[: min(matches)[1]]
        keep = 0  # of the last characters, as many as may begin a stop string
        for length in range(min(self._longest, len(held)), 0, -1):
            if any(stop.startswith(held[-length:]) for stop in self._stops):
                keep = length
                break
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """Return the text held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held


# -- the JSON of answers --------------------------------------------------------------------------


class Answer:
    """The answer to one request in OpenAI's form, whole or as events.

    `prompt_tokens` has the length of each prompt, which equally many of the sequences continue.
    """

    def __init__(
        self, body: GenerationBody, texts: TextStreams, prompt_tokens: Sequence[int]
    ) -> None:
        options = body.stream_options or StreamOptions()
        self._with_usage = bool(options.include_usage)
        self._with_counts = self._with_usage and bool(options.continuous_usage_stats)
        self._is_chat = isinstance(body, ChatBody)
        self._texts = texts
        self._prompt_tokens = prompt_tokens
        self._common = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    async def collect(self) -> Json:
        """Return the whole answer once all sequences have ended."""
        texts: list[list[str]] = [[] for _ in range(len(self._texts))]
        finishes: list[Finish | None] = [None] * len(texts)
        async with aclosing(self._texts.deltas()) as deltas:
            async for choice, text, _, finish in deltas:
                texts[choice].append(text)
                finishes[choice] = finish
        choices = []
        for index, parts in enumerate(texts):
            content: Json = {"text": "".join(parts)}
            if self._is_chat:
                message = {"role": "assistant", "content": content["text"], "refusal": None}
                content = {"message": message}
            choices.append(_choice_as_json(index, content, finishes[index]))
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": self._usage()}

    async def stream(self, stream: EventStream) -> None:
        """Send events; an error before the first text is a status, as for whole answers.

        With `include_usage`, the last event has the usage of all sequences. The others have that of
        their own sequence so far with `continuous_usage_stats`, as in vLLM, else null.
        """
        async with aclosing(self._texts.deltas()) as deltas:
            async for choice, text, tokens, finish in deltas:
                if not stream.has_begun:
                    await stream.begin()
                    for index in range(len(self._texts) if self._is_chat else 0):
                        first = {"delta": {"role": "assistant", "content": ""}}
                        await self._send_choice(stream, _choice_as_json(index, first, None), 0)
                content: Json = {"text": text}
                if self._is_chat:
                    content = {"delta": {} if finish else {"content": text}}
                await self._send_choice(stream, _choice_as_json(choice, content, finish), tokens)
        if self._with_usage:
            await self._send(stream, [], self._usage())
        await stream.end()

    async def _send_choice(self, stream: EventStream, choice: Json, tokens: int) -> None:
        """Send an event of one sequence, of which so many tokens were generated."""
        usage = None
        if self._with_counts:
            per_prompt = len(self._texts) // len(self._prompt_tokens)
            usage = _usage_as_json(self._prompt_tokens[choice["index"] // per_prompt], tokens)
        await self._send(stream, [choice], usage)

    async def _send(self, stream: EventStream, choices: list[Json], usage: Json | None) -> None:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        event = {**self._common, "object": kind, "choices": choices}
        await stream.send_event(event | {"usage": usage} if self._with_usage else event)

    def details(self) -> Json:
        """Return what the log says of the answer."""
        return {
            "id": self._common["id"],
            "prompt_tokens": sum(self._prompt_tokens),
            "tokens": self._texts.count,
            "queue_ms": in_ms(self._texts.queue_seconds),
            "first_token_ms": in_ms(self._texts.first_seconds),
        }

    def _usage(self) -> Json:
        return _usage_as_json(sum(self._prompt_tokens), self._texts.count)


def _usage_as_json(prompt: int, completion: int) -> Json:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _choice_as_json(index: int, content: Json, finish: Finish | None) -> Json:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish}
