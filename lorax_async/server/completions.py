"""One request for text, from its body to its response."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lorax_async.errors import InternalError, LoraxError
from lorax_async.server.clients import EventStream, identify_client, read_json
from lorax_async.server.engine import ObservedTokens
from lorax_async.server.error_responses import Refusal, create_refusal, invalid_parameter
from lorax_async.server.generation import Finish, Generation, Sampling
from lorax_async.server.request_bodies import (
    MAX_SEED,
    MIN_SEED,
    ChatBody,
    CompletionBody,
    GenerationBody,
    parse_body,
)
from lorax_async.server.service import Service
from lorax_async.types import AdapterId

Json = dict[str, Any]
Client = tuple[str, str]
Prompt = tuple[int, ...]

CONTEXT_TOKENS = 8
"""Tokens of the prompt to decode first: some decoders drop a leading space."""

_INVALID_PREFIX = "Invalid prefix encountered"
"""How DecodeStream's message begins when new tokens change text that it has already returned."""


class CompletionEndpoint:
    """An ASGI endpoint that watches its client from the first byte to the last."""

    def __init__(self, service: Service, kind: type[GenerationBody]) -> None:
        self._service = service
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, settings = self._service, self._service.settings
        request = Request(scope, receive)
        with service.in_flight.count_request():
            content = await read_json(request, settings.max_body_bytes, settings.slow_client)
            body = parse_body(self._kind, content)
            _require_choices(body, settings.max_choices)
            service.require_room(1)  # refuse cheaply, before the prompt is read
            adapter = service.names.resolve(body.model)
            client = identify_client(request)
            with service.client_limits.count_request(client, adapter):
                stream = EventStream(scope, receive, send, settings.slow_client)
                await self._answer(body, adapter, stream, client)

    async def _answer(
        self, body: GenerationBody, adapter: AdapterId | None, stream: EventStream, client: Client
    ) -> None:
        service = self._service
        try:
            async with service.in_flight.open_scope(stream.receive):
                prompts = await asyncio.to_thread(service.prompts.read, body)
                generations = _create_generations(service, body, adapter, prompts, client)
                with self._submit(body, generations) as texts:
                    respond = _stream if body.stream else _send
                    await respond(body, texts, sum(map(len, prompts)), stream)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - every error is a response
            refusal = create_refusal(error, service.settings.retry_after, body.model)
            if not stream.has_begun:
                raise (refusal if isinstance(error, LoraxError) else error) from error.__cause__
            await stream.fail(refusal, error)

    @contextmanager
    def _submit(
        self, body: GenerationBody, generations: Sequence[Generation]
    ) -> Iterator[TextStreams]:
        """Submit all of them or none; on leaving, cancel what is left."""
        service = self._service
        service.require_room(len(generations))
        streams: list[TextStream] = []
        texts = TextStreams(streams)
        try:
            for index, generation in enumerate(generations):
                detokenizer = Detokenizer(service.prompts.tokenizer, generation.prompt)
                tokens = service.submit(generation, body.model)
                streams.append(TextStream(index, tokens, detokenizer, StopStrings(body.stops)))
            yield texts
        finally:
            texts.close()


async def _send(
    body: GenerationBody, texts: TextStreams, prompt_tokens: int, stream: EventStream
) -> None:
    whole_texts = await texts.collect()
    answer = AnswerFormat(body).response(whole_texts, _usage_as_json(prompt_tokens, texts.count))
    await stream.respond(JSONResponse(answer))


async def _stream(
    body: GenerationBody, texts: TextStreams, prompt_tokens: int, stream: EventStream
) -> None:
    """Send events; an error before the first text is a status, as for whole answers."""
    form = AnswerFormat(body)
    delta = await texts.next()
    await stream.begin()
    for index in range(len(texts) if form.is_chat else 0):
        await stream.send_event(form.opening_event(index))
    while delta is not None:
        await stream.send_event(form.delta_event(delta))
        delta = await texts.next()
    if form.with_usage:
        await stream.send_event(form.usage_event(_usage_as_json(prompt_tokens, texts.count)))
    await stream.end()


# -- from a body to generations -------------------------------------------------------------------


def _require_choices(body: GenerationBody, limit: int) -> None:
    prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
    if prompts * (body.n or 1) > limit:
        message = f"A request may have at most {limit} sequences: its prompts, times n"
        raise invalid_parameter(message, "n" if prompts == 1 else "prompt")


def _create_generations(
    service: Service,
    body: GenerationBody,
    adapter: AdapterId | None,
    prompts: Sequence[Prompt],
    client: Client,
) -> list[Generation]:
    """Return `n` generations per prompt, in the order of the prompts. Raise `Refusal`."""
    generations: list[Generation] = []
    for prompt in prompts:
        if len(prompt) > service.max_prompt_tokens:
            param = "messages" if isinstance(body, ChatBody) else "prompt"
            raise _too_long(service, f"a prompt of {len(prompt)} tokens", param)
        room = service.engine.max_length - len(prompt)
        wanted = room if body.wanted_tokens is None else body.wanted_tokens
        if wanted > room:
            length = f"{len(prompt)} tokens of the prompt and {wanted} new ones"
            raise _too_long(service, length, "max_tokens")
        for _ in range(body.n or 1):
            sampling = _sampling(body, len(generations))
            stops = frozenset[int]() if body.ignore_eos else service.stop_tokens
            generations.append(Generation(adapter, prompt, wanted, sampling, stops, client=client))
    return generations


def _too_long(service: Service, length: str, param: str) -> Refusal:
    message = (
        f"This model takes {service.engine.max_length} tokens, new ones included, and prompts of"
        f" {service.max_prompt_tokens}; this request has {length}"
    )
    return invalid_parameter(message, param, "context_length_exceeded")


def _sampling(body: GenerationBody, number: int) -> Sampling:
    """Add the sequence's number to the request's seed: its sequences differ. Seeds wrap around."""
    seed = body.seed
    if seed is not None:
        seed = (seed + number - MIN_SEED) % (MAX_SEED - MIN_SEED + 1) + MIN_SEED
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed,
    )


# -- from tokens to texts -------------------------------------------------------------------------


class TextDelta(NamedTuple):
    """New text of the sequence `choice`, or the reason why it ended."""

    choice: int
    text: str
    finish: Finish | None


@dataclass(slots=True)
class TextStream:
    """The text of one sequence. `count` is its tokens so far."""

    choice: int
    tokens: ObservedTokens
    detokenizer: Detokenizer
    stops: StopStrings
    count: int = 0
    finish: Finish | None = None

    async def next(self) -> TextDelta | None:
        """Return the next text, then the end, then None. Raise the `LoraxError` that ended it."""
        if self.finish is not None:
            return None
        ended: Finish | None = "stop" if self.stops.hit else None
        while ended is None:
            try:
                token = await anext(self.tokens)
            except StopAsyncIteration:
                ended = self.tokens.finish
                if ended is None:
                    raise InternalError("a generation ended without a reason") from None
                text = self.stops.end()
            else:
                self.count += 1
                text = self.stops.feed(self.detokenizer.feed(token))
                if self.stops.hit:
                    self.tokens.cancel()
                    ended = "stop"
            if text:
                return TextDelta(self.choice, text, None)
        self.finish = ended
        return TextDelta(self.choice, "", ended)


class TextStreams:
    """All sequences of one request, in the order in which their texts arrive.

    Closing it cancels their generations.
    """

    def __init__(self, streams: Sequence[TextStream]) -> None:
        self._streams = streams
        self._reading: dict[asyncio.Task[TextDelta | None], TextStream] = {}
        self._begun = False

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def count(self) -> int:
        """Tokens received."""
        return sum(stream.count for stream in self._streams)

    async def next(self) -> TextDelta | None:
        """Return the next text of any sequence; None once all have ended."""
        if len(self._streams) == 1:  # the usual case needs no tasks
            return await self._streams[0].next()
        if not self._begun:
            self._begun = True
            for stream in self._streams:
                self._read(stream)
        while self._reading:
            await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)
            task = next(task for task in self._reading if task.done())
            stream = self._reading.pop(task)  # re-inserted last: the sequences take turns
            delta = task.result()
            if delta is not None:
                self._read(stream)
                return delta
        return None

    async def collect(self) -> list[tuple[str, Finish | None]]:
        """Return all texts, and why they ended, once all have."""
        texts: list[list[str]] = [[] for _ in self._streams]
        while (delta := await self.next()) is not None:
            texts[delta.choice].append(delta.text)
        finishes = [stream.finish for stream in self._streams]
        return list(zip(map("".join, texts), finishes, strict=True))

    def close(self) -> None:
        for stream in self._streams:
            stream.tokens.cancel()
        for task in self._reading:
            task.cancel()
        self._reading.clear()

    def _read(self, stream: TextStream) -> None:
        self._reading[asyncio.create_task(stream.next(), name="lorax choice")] = stream


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
        # The bytes so far are no text: drop them, and start over with this token.
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
        self._held += text
        matches = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if matches:
            self.hit = True
            _, keep = min(matches)
            out, self._held = self._held[:keep], ""
            return out
        return self._release(len(self._held) - self._partial())

    def end(self) -> str:
        """Return the text held back, at the end of the sequence."""
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        out, self._held = self._held[:length], self._held[length:]
        return out

    def _partial(self) -> int:
        """Return how many of the last characters may begin a stop string."""
        for length in range(min(self._longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


# -- the JSON of answers --------------------------------------------------------------------------


class AnswerFormat:
    """Format the answer to one request, whole or as events.

    With `include_usage`, the last event has the usage, and the others have null.
    """

    def __init__(self, body: GenerationBody) -> None:
        options = body.stream_options
        self.with_usage = bool(options is not None and options.include_usage)
        self.is_chat = isinstance(body, ChatBody)
        self._common = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    def response(self, texts: Sequence[tuple[str, Finish | None]], usage: Json) -> Json:
        choices = []
        for index, (text, finish) in enumerate(texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.is_chat else {"text": text}
            choices.append(_choice_as_json(index, content, finish))
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": usage}

    def opening_event(self, index: int) -> Json:
        """Return the event before the first text of a chat's sequence."""
        return self._event(
            _choice_as_json(index, {"delta": {"role": "assistant", "content": ""}}, None)
        )

    def delta_event(self, delta: TextDelta) -> Json:
        chat = {"delta": {} if delta.finish else {"content": delta.text}}
        content = chat if self.is_chat else {"text": delta.text}
        return self._event(_choice_as_json(delta.choice, content, delta.finish))

    def usage_event(self, usage: Json) -> Json:
        return self._event() | {"usage": usage}

    def _event(self, *choices: Json) -> Json:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        no_usage = {"usage": None} if self.with_usage else {}
        return {**self._common, "object": kind, "choices": choices, **no_usage}


def _choice_as_json(index: int, content: Json, finish: Finish | None) -> Json:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish}


def _usage_as_json(prompt: int, completion: int) -> Json:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
