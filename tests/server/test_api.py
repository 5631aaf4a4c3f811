"""The API as its users call it: the official client, its strict forms, and text as it is made."""

import asyncio
import importlib.metadata
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import DefaultAsyncHttpxClient
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from server_world import (
    COMPLETIONS,
    MAX_LENGTH,
    FakeEngine,
    echo,
    saying,
    serving,
    tokenizer,
    tokens_of,
)
from tokenizers import Tokenizer, decoders, models

from lorax_async.server.completions import Detokenizer, StopStrings

CHATS = "/v1/chat/completions"
HI: Any = [{"role": "user", "content": "hi"}]
PROMPT = "<user>hi<assistant>"
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
COMPLETION: Any = (COMPLETIONS, {"prompt": ["a", "b"]}, Completion, Completion)


async def test_a_completion_of_several_prompts() -> None:
    seed = 2**63 - 2
    async with serving(FakeEngine(echo)) as world:
        answer = await world.client.completions.create(
            model="base", prompt=["one", "two"], n=2, seed=seed, temperature=0.5, top_p=0.25
        )
        generations = [tokens.generation for tokens in world.engine.submitted]
    assert (answer.id[:5], answer.object) == ("cmpl-", "text_completion")
    seeds = {"one": (seed, seed + 1), "two": (-(2**63), -(2**63) + 1)}
    texts = [f"None|{prompt}|0.5|0.25|{each}" for prompt in seeds for each in seeds[prompt]]
    assert [(choice.index, choice.text) for choice in answer.choices] == [*enumerate(texts)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == sum(map(len, texts))
    assert {generation.max_new_tokens for generation in generations} == {16}
    assert {generation.stop_tokens for generation in generations} == {frozenset({256})}


async def test_defaults_are_those_of_openai() -> None:
    async with serving(FakeEngine(echo, max_length=100)) as world:
        await world.client.chat.completions.create(model="base", messages=HI)
        await world.client.completions.create(model="base", prompt=tokens_of("ab"))
        await world.client.completions.create(model="base", prompt=[[1, 2], [3]])
        chat, completion, *rest = [tokens.generation for tokens in world.engine.submitted]
    assert chat.max_new_tokens == 100 - len(PROMPT)
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.seed) == (1.0, 1.0, None)
    assert completion.prompt == tuple(tokens_of("ab"))
    assert [generation.prompt for generation in rest] == [(1, 2), (3,)]


async def test_a_conversation_is_sent_back_with_all_its_fields() -> None:
    async with serving(FakeEngine(saying("yo"))) as world:
        chat = world.client.chat.completions
        first = await chat.create(model="base", messages=HI)
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        brief, last = (
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts},
        )
        messages: Any = [brief, first.choices[0].message.model_dump(), last]
        await chat.create(model="base", messages=messages)
        prompt = tokenizer().decode(world.engine.submitted[1].generation.prompt)
    assert prompt == "<system>be brief<assistant>yo<user>a\nb<assistant>"


async def test_max_tokens_cut_an_answer() -> None:
    limits: Any = {"12": {"max_tokens": 2}, "123": {"max_completion_tokens": 3}}
    async with serving(FakeEngine(saying("12345"))) as world:
        chat = world.client.chat.completions
        for text, limit in limits.items():
            (choice,) = (await chat.create(model="base", messages=HI, **limit)).choices
            assert (choice.message.content, choice.finish_reason) == (text, "length")


async def test_models_are_listed_and_name_adapters() -> None:
    async with serving(adapters={"pirate": "org/pirate"}) as world:
        listed = await world.client.models.list()
        one: Any = await world.client.models.retrieve("pirate")
        card = (await world.ask("GET", "/v1/models")).json["data"][0]
        other = "org/other@main"
        for model, adapter in (("base", None), ("pirate", "org/pirate"), (other, other)):
            answer = await world.client.completions.create(model=model, prompt="x")
            assert answer.model == model
            assert world.engine.submitted[-1].generation.adapter == adapter
    assert [model.id for model in listed.data] == ["base", "pirate"]
    assert (one.id, one.object, one.parent) == ("pirate", "model", "base")
    assert one.owned_by == "lorax-async"
    assert Model.model_validate(card, strict=True).id == "base"
    # As vLLM has them.
    assert card.keys() - Model.model_fields.keys() == {"parent", "max_model_len"}


async def test_a_streamed_chat() -> None:
    async with serving(FakeEngine(saying("aé!"))) as world:
        stream = await world.client.chat.completions.create(
            model="base", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        first, *middle, last, usage = [chunk async for chunk in stream]
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in middle] == ["a", "é", "!"]
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *middle))
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (19, 4)
    assert {chunk.usage for chunk in (first, *middle, last)} == {None}
    assert len({(chunk.id, chunk.created) for chunk in (first, *middle, last, usage)}) == 1
    assert {chunk.object for chunk in (first, last)} == {"chat.completion.chunk"}


def counts_of(pieces: list[Any]) -> list[Any]:
    """Each piece's usage, as (prompt, completion); null as None."""
    usages = [piece.usage for piece in pieces]
    assert all(not each or sum(counts(each)) == each.total_tokens for each in usages)
    return [each and counts(each) for each in usages]


def counts(usage: Any) -> tuple[int, int]:
    return usage.prompt_tokens, usage.completion_tokens


@pytest.mark.parametrize("continuous", [True, False, None])
@pytest.mark.parametrize("include", [True, False, None])
async def test_every_piece_may_have_the_counts_so_far(
    include: bool | None, continuous: bool | None
) -> None:
    """As vLLM has it: not without `include_usage`, and no tokens in the piece with the role."""
    options = {"include_usage": include, "continuous_usage_stats": continuous}
    given: Any = {name: value for name, value in options.items() if value is not None}
    async with serving(FakeEngine(saying("aé!"))) as world:  # é is two tokens
        chat, plain = world.client.chat.completions, world.client.completions
        streamed: Any = {"model": "base", "stream": True, "stream_options": given}
        chatted = [piece async for piece in await chat.create(messages=HI, **streamed)]
        completed = [piece async for piece in await plain.create(prompt="xyz", **streamed)]
    role = [(19, 0)]
    for pieces, prompt, first in ((chatted, 19, role), (completed, 3, [])):
        expected: list[Any] = [*first, (prompt, 1), (prompt, 3), (prompt, 4), (prompt, 4)]
        if not (include and continuous):
            expected = [None] * len(expected)
        if include:
            expected.append((prompt, 4))
            assert pieces[-1].choices == []
        assert counts_of(pieces) == expected


async def test_counts_so_far_are_those_of_the_pieces_own_sequence() -> None:
    """As in vLLM; the last piece has those of all."""
    engine = FakeEngine()
    async with serving(engine) as world:
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        creating = world.client.completions.create(
            model="base", prompt=["x", "four"], n=2, stream=True, stream_options=options
        )
        reading = asyncio.create_task(creating)
        await engine.asked(4)
        for tokens in engine.submitted:
            tokens.say("ab")
            tokens.end()
        pieces = [piece async for piece in await reading]
    *pieces, last = pieces
    for index in range(4):
        own = [piece for piece in pieces if piece.choices[0].index == index]
        prompt = 1 if index < 2 else 4
        assert counts_of(own) == [(prompt, 1), (prompt, 2), (prompt, 2)]
    assert counts_of([last]) == [(1 + 4, 4 * 2)]


async def test_a_streamed_completion_comes_as_it_is_made() -> None:
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
        pieces += [piece async for piece in stream]
    told = [(p.choices[0].index, p.choices[0].text, p.choices[0].finish_reason) for p in pieces]
    assert told == [(1, "b", None), (0, "a", None), (1, "", "length"), (0, "", "stop")]
    assert {piece.object for piece in pieces} == {"text_completion"}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_ends_before_its_stop_string(stream: bool) -> None:
    engine = FakeEngine(lambda tokens: tokens.say("one STOP two"))
    async with serving(engine) as world:
        create: Any = world.client.completions.create
        answer = await create(model="base", prompt="x", stop=["STOP", "zz"], stream=stream)
        pieces = [piece async for piece in answer] if stream else [answer]
        await engine.submitted[0].cancelled.wait()
    text = "".join(piece.choices[0].text for piece in pieces)
    assert (text, pieces[-1].choices[0].finish_reason) == ("one ", "stop")
    assert stream or pieces[-1].usage.completion_tokens == len("one STOP")
    async with serving(FakeEngine(saying("one ST"))) as world:  # which only looked like one
        answer = await world.client.completions.create(model="base", prompt="x", stop="STOP")
        assert answer.choices[0].text == "one ST"


def require_form(kind: type[BaseModel], told: Any) -> None:
    assert told.keys() <= kind.model_fields.keys()
    found = kind.model_validate(told, strict=True)
    for choice, said in zip(getattr(found, "choices", ()), told["choices"], strict=True):
        assert choice.model_extra == {}
        for part in (getattr(choice, "message", None), getattr(choice, "delta", None)):
            assert part is None or part.model_extra == {}
        assert said.keys() <= type(choice).model_fields.keys()
    usage = getattr(found, "usage", None)
    assert usage is None or usage.model_extra == {}


@pytest.mark.parametrize(
    ("path", "body", "kind", "piece"),
    [(CHATS, {"messages": HI, "n": 2}, ChatCompletion, ChatCompletionChunk), COMPLETION],
)
async def test_answers_and_pieces_have_the_packages_forms(
    path: str, body: Any, kind: type[BaseModel], piece: type[BaseModel]
) -> None:
    body = {"model": "base"} | body
    client, engine = DefaultAsyncHttpxClient(trust_env=False), FakeEngine(saying("aé!"))
    async with serving(engine) as world, client:
        whole = await world.ask("POST", path, body)
        assert (whole.status, whole.headers["content-type"]) == (200, "application/json")
        require_form(kind, whole.json)
        assert whole.json["id"].startswith("chatcmpl-" if kind is ChatCompletion else "cmpl-")
        assert whole.json["model"] == "base"
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        answer = await client.post(f"http://127.0.0.1:{world.port}{path}", json=body | streamed)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    for told in pieces:
        for choice in told["choices"] if piece is Completion else ():
            # The package says that a reason is there always; OpenAI sends null until it is.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        require_form(piece, told)
    CompletionUsage.model_validate(pieces[-1]["usage"], strict=True)
    ends = [choice["index"] for told in pieces for choice in told["choices"]][-8:]
    assert ends == [0, 1] * 4, "they take turns: a, é, ! and the end"


BACKEND = tokenizer().backend_tokenizer


@given(st.text(max_size=20), st.text(max_size=6))
def test_a_text_comes_back(text: str, prompt: str) -> None:
    reader = Detokenizer(BACKEND, tokens_of(prompt))
    assert "".join(map(reader.feed, tokens_of(text))) == text


@given(st.lists(st.integers(0, 300), max_size=20))
def test_any_tokens_are_read(tokens: list[int]) -> None:
    reader = Detokenizer(BACKEND, ())
    text = "".join(map(reader.feed, tokens))
    whole = BACKEND.decode(tokens, skip_special_tokens=True)
    assert whole.startswith(text) or "\N{REPLACEMENT CHARACTER}" in whole


def test_the_first_word_keeps_its_space() -> None:
    """Some decoders drop the space of a text's first word, which is not where an answer begins."""
    made = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    made.decoder = decoders.Metaspace()
    assert Detokenizer(made, [0]).feed(1) == " b"


def test_stop_strings_are_found_across_pieces() -> None:
    for stops, pieces, out in (
        ((), ["a", "b"], ["a", "b"]),
        (("STOP",), ["on", "e ST", "O", "P two"], ["on", "e ", "", ""]),
        (("STOP",), ["ST", "ST", "OP"], ["", "ST", ""]),
        (("ab", "b"), ["b"], [""]),
        (("abc", "b"), ["abc"], ["a"]),  # "b" is complete first
        (("xy",), ["x"], [""]),
    ):
        reader = StopStrings(stops)
        assert [reader.feed(piece) for piece in pieces] == out


@given(STOPS, st.text("ab", max_size=12), st.lists(st.integers(0, 12), max_size=4))
def test_where_a_text_is_cut_changes_nothing(stops: list[str], text: str, cuts: list[int]) -> None:
    """The oracle takes one character more at a time, until the text so far ends with a stop."""
    expected, hit = text, False
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            expected, hit = text[: end - max(map(len, ended))], True
            break
    reader, out = StopStrings(stops), ""
    bounds = [0, *sorted(cuts), len(text)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        out += reader.feed(text[begin:end])
        assert expected.startswith(out), "nothing of a stop string is let through"
    out += reader.end()
    assert (out, reader.hit) == (expected, hit)


async def test_texts_become_tokens_and_back_as_in_vllm() -> None:
    async with serving() as world:
        for body, text in (
            ({"prompt": "grüß"}, "grüß"),
            ({"model": "base", "messages": HI}, PROMPT),
            ({"prompt": "", "add_special_tokens": False}, ""),
        ):
            found = (await world.ask("POST", "/tokenize", body)).json
            assert found["tokens"] == tokens_of(text)
            assert (found["count"], found["max_model_len"]) == (len(tokens_of(text)), MAX_LENGTH)
            back = await world.ask("POST", "/detokenize", {"tokens": found["tokens"]})
            assert back.json == {"prompt": text}
        either = "the body is invalid: it has either prompt or messages"
        for path, wrong, said in (
            ("/tokenize", {}, either),
            ("/tokenize", {"prompt": "a", "messages": HI}, either),
            ("/tokenize", {"prompt": 5}, "prompt must be a text"),
            ("/detokenize", {"tokens": [1 << 20]}, "outside 0 … 256"),
            ("/detokenize", {"tokens": "a"}, "tokens is invalid: "),
        ):
            answer = await world.ask("POST", path, wrong)
            assert (answer.status, said in answer.error["message"]) == (400, True), answer.error
        assert (await world.ask("GET", "/ping")).status == 200
        told = (await world.ask("GET", "/version")).json
        assert told == {"version": importlib.metadata.version("lorax-async")}
