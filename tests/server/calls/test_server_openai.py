"""The official client, as its users call it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from common import Run
from server.world import FakeEngine, echo, saying, serving, text_of, tokens_of

HI: Any = [{"role": "user", "content": "hi"}]


async def test_a_chat() -> None:
    async def ask() -> ChatCompletion:
        async with serving(FakeEngine(saying("ahoy!"))) as world:
            return await world.client.chat.completions.create(model="base", messages=HI)

    answer = await ask()
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "base")
    assert [choice.index for choice in answer.choices] == [0]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "ahoy!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    asked = len("<user>hi<assistant>")
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": asked,
        "completion_tokens": 5,
        "total_tokens": asked + 5,
    }


async def test_a_completion_of_several_prompts() -> None:
    async def ask() -> tuple[Completion, FakeEngine]:
        async with serving(FakeEngine(echo)) as world:
            answer = await world.client.completions.create(
                model="base", prompt=["one", "two"], n=2, seed=5, temperature=0.5, top_p=0.25
            )
            return answer, world.engine

    answer, engine = await ask()
    assert (answer.id[:5], answer.object) == ("cmpl-", "text_completion")
    assert [choice.text for choice in answer.choices] == [
        "None|one|0.5|0.25|5",
        "None|one|0.5|0.25|6",
        "None|two|0.5|0.25|7",
        "None|two|0.5|0.25|8",
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 4 * 19
    generations = [tokens.generation for tokens in engine.submitted]
    assert {generation.max_new_tokens for generation in generations} == {16}
    assert {generation.stop_tokens for generation in generations} == {frozenset({256})}


async def test_what_is_not_said_is_as_openai_has_it() -> None:
    async def ask() -> Any:
        engine = FakeEngine(echo, max_length=100)
        async with serving(engine) as world:
            await world.client.chat.completions.create(model="base", messages=HI)
            await world.client.completions.create(model="base", prompt=tokens_of("ab"))
            await world.client.completions.create(model="base", prompt=[[1, 2], [3]])
            return [tokens.generation for tokens in engine.submitted]

    chat, completion, *rest = await ask()
    assert chat.max_new_tokens == 100 - len("<user>hi<assistant>")
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.seed) == (1.0, 1.0, None)
    assert completion.prompt == tuple(tokens_of("ab"))
    assert [generation.prompt for generation in rest] == [(1, 2), (3,)]


async def test_conversations_as_clients_keep_them() -> None:
    """What came back is sent again with all its fields; parts of texts are lines."""

    async def ask() -> str:
        async with serving(FakeEngine(saying("yo"))) as world:
            chat = world.client.chat.completions
            first = await chat.create(model="base", messages=HI)
            parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
            messages: Any = [
                {"role": "developer", "content": "be brief"},
                first.choices[0].message.model_dump(),
                {"role": "user", "content": parts},
            ]
            await chat.create(model="base", messages=messages)
            return text_of(world.engine.submitted[1].generation.prompt)

    assert await ask() == "<system>be brief<assistant>yo<user>a\nb<assistant>"


async def test_a_streamed_chat() -> None:
    async def ask() -> list[Any]:
        async with serving(FakeEngine(saying("aé!"))) as world:
            stream = await world.client.chat.completions.create(
                model="base", messages=HI, stream=True, stream_options={"include_usage": True}
            )
            return [chunk async for chunk in stream]

    first, *middle, last, usage = await ask()
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in middle] == ["a", "é", "!"]
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *middle))
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert usage.choices == []
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (19, 4)
    assert {chunk.usage for chunk in (first, *middle, last)} == {None}
    assert len({(chunk.id, chunk.created) for chunk in (first, *middle, last, usage)}) == 1
    assert {chunk.object for chunk in (first, last)} == {"chat.completion.chunk"}


async def test_a_streamed_completion_comes_as_it_is_made() -> None:
    async def ask() -> list[Any]:
        engine = FakeEngine()
        async with serving(engine) as world:
            creating = world.client.completions.create(model="base", prompt="x", n=2, stream=True)
            reading = asyncio.create_task(creating)
            second = await engine.asked(2)
            second.say("b")
            stream = await reading
            pieces = [await anext(stream)]
            first = engine.submitted[0]
            first.say("a")
            pieces.append(await anext(stream))
            second.end("length")
            pieces.append(await anext(stream))
            first.end()
            return [*pieces, *[piece async for piece in stream]]

    pieces = await ask()
    told = [(p.choices[0].index, p.choices[0].text, p.choices[0].finish_reason) for p in pieces]
    assert told == [(1, "b", None), (0, "a", None), (1, "", "length"), (0, "", "stop")]
    assert {piece.object for piece in pieces} == {"text_completion"}


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(stream: bool) -> None:
    """Nothing of one is sent, and what comes after it is not even computed."""

    async def ask() -> tuple[str, str, Any]:
        engine = FakeEngine(lambda tokens: tokens.say("one STOP two"))
        async with serving(engine) as world:
            create: Any = world.client.completions.create
            answer = await create(model="base", prompt="x", stop=["STOP", "zz"], stream=stream)
            pieces = [piece async for piece in answer] if stream else [answer]
            await engine.submitted[0].cancelled.wait()
            text = "".join(piece.choices[0].text for piece in pieces)
            return text, pieces[-1].choices[0].finish_reason, pieces[-1].usage

    text, finish, usage = await ask()
    assert (text, finish) == ("one ", "stop")
    assert stream or usage.completion_tokens == len("one STOP")


def test_max_tokens_cut(run: Run) -> None:
    async def ask() -> Any:
        async with serving(FakeEngine(saying("12345"))) as world:
            chat = world.client.chat.completions
            return [
                await chat.create(model="base", messages=HI, max_tokens=2),
                await chat.create(model="base", messages=HI, max_completion_tokens=3),
            ]

    two, three = (answer.choices[0] for answer in run(ask()))
    assert (two.message.content, two.finish_reason) == ("12", "length")
    assert (three.message.content, three.finish_reason) == ("123", "length")


async def test_models_are_named() -> None:
    async def ask() -> Any:
        async with serving(adapters={"pirate": "org/pirate"}) as world:
            listed = await world.client.models.list()
            return listed, await world.client.models.retrieve("pirate")

    listed, one = await ask()
    assert [model.id for model in listed.data] == ["base", "pirate"]
    assert (one.id, one.object, one.owned_by, one.parent) == (
        "pirate",
        "model",
        "lorax-async",
        "base",
    )


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("base", None), ("pirate", "org/pirate"), ("org/other@main", "org/other@main")],
)
async def test_model_names_an_adapter(model: str, adapter: str | None) -> None:
    async def ask() -> Any:
        async with serving(adapters={"pirate": "org/pirate"}) as world:
            answer = await world.client.completions.create(model=model, prompt="x")
            assert answer.model == model
            return world.engine.submitted[0].generation.adapter

    assert await ask() == adapter
