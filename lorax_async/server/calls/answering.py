"""One request for text, from its body to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lorax_async.adapter import AdapterId
from lorax_async.errors import LoraxError
from lorax_async.server.calls.bodies import read_json
from lorax_async.server.calls.choices import Choices, Writing
from lorax_async.server.calls.clients import client_of
from lorax_async.server.calls.errors import refusal_of
from lorax_async.server.calls.events import EventStream
from lorax_async.server.calls.forms import ChatCompletion, Completion, Usage
from lorax_async.server.calls.planning import generations_of, require_few
from lorax_async.server.calls.requests import Body, ChatBody, parsed
from lorax_async.server.calls.service import Service
from lorax_async.server.calls.text import Detokenizer, StopStrings
from lorax_async.server.calls.under_way import ClientGone
from lorax_async.server.generation import Generation


class Answering:
    """An endpoint, in ASGI's form: it looks after its client from the first byte to the last."""

    def __init__(self, service: Service, kind: type[Body]) -> None:
        self._service = service
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, settings = self._service, self._service.settings
        request = Request(scope, receive)
        with service.under_way.one():
            content = await read_json(request, settings)
            body = parsed(self._kind, content)
            require_few(body, settings.max_choices)
            service.require_room(1)  # to be refused costs little
            adapter = service.names.find(body.model)
            client = client_of(request)
            with service.clients.using(client, adapter):
                stream = EventStream(scope, receive, send, settings.slow_client)
                await self._answer(body, adapter, stream, client)

    async def _answer(
        self, body: Body, adapter: AdapterId | None, stream: EventStream, client: tuple[str, str]
    ) -> None:
        service = self._service
        try:
            async with service.under_way.watched(stream.receive):
                prompts = await asyncio.to_thread(service.prompts.read, body)
                generations = generations_of(service, body, adapter, prompts, client)
                asked = sum(map(len, prompts))
                with self._submitted(body, generations) as choices:
                    await (_stream if body.stream else _send)(body, choices, asked, stream)
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told
            refusal = refusal_of(error, service.settings.retry_after, body.model)
            if not stream.begun:
                raise (refusal if isinstance(error, LoraxError) else error) from error.__cause__
            await stream.fail(refusal, error)

    @contextmanager
    def _submitted(self, body: Body, generations: Sequence[Generation]) -> Iterator[Choices]:
        """All of them or none; however it ends, nothing of them is computed any more."""
        self._service.require_room(len(generations))
        writings: list[Writing] = []
        choices = Choices(writings)
        try:
            for generation in generations:
                writings.append(self._writing(len(writings), body, generation))
            yield choices
        finally:
            choices.close()

    def _writing(self, number: int, body: Body, generation: Generation) -> Writing:
        detokenizer = Detokenizer(self._service.prompts.tokenizer, generation.prompt)
        submitted = self._service.engine.submit(generation)
        tokens = self._service.metrics.measured(submitted, body.model, len(generation.prompt))
        return Writing(number, tokens, detokenizer, StopStrings(body.stops))


def _form_of(body: Body) -> Completion:
    options = body.stream_options
    kind = ChatCompletion if isinstance(body, ChatBody) else Completion
    return kind(body.model, bool(options is not None and options.include_usage))


async def _send(body: Body, choices: Choices, asked: int, stream: EventStream) -> None:
    """The whole answer at once."""
    found = await choices.collect()
    answer = _form_of(body).whole(found, Usage(asked, choices.count))
    await stream.respond(JSONResponse(answer))


async def _stream(body: Body, choices: Choices, asked: int, stream: EventStream) -> None:
    """Piece by piece; an error before the first one is a status, as for whole answers."""
    form = _form_of(body)
    piece = await choices.next()
    await stream.begin()
    for index in range(len(choices)):
        await _tell(stream, form.beginning(index))
    while piece is not None:
        if piece.finish is None:
            await _tell(stream, form.piece(piece.choice, piece.text))
        else:
            await _tell(stream, form.end(piece.choice, piece.finish))
        piece = await choices.next()
    if form.with_usage:
        await _tell(stream, form.usage(Usage(asked, choices.count)))
    await stream.end()


async def _tell(stream: EventStream, data: dict[str, Any] | None) -> None:
    if data is not None:
        await stream.tell(data)
