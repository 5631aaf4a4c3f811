"""Every answer and every piece of one, held against the forms of the `openai` package, strictly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import DefaultAsyncHttpxClient
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from common import Run
from server.world import FakeEngine, saying, serving

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "n": 2}
PLAIN = {"model": "base", "prompt": ["a", "b"]}


def require_form(kind: type[BaseModel], told: Any) -> None:
    """Nothing of another type, nothing missing, and nothing that has no name there."""
    assert told.keys() <= kind.model_fields.keys()
    found = kind.model_validate(told, strict=True)
    for choice, said in zip(getattr(found, "choices", ()), told["choices"], strict=True):
        assert choice.model_extra == {}
        for part in (getattr(choice, "message", None), getattr(choice, "delta", None)):
            assert part is None or part.model_extra == {}
        assert said.keys() <= type(choice).model_fields.keys()
    usage = getattr(found, "usage", None)
    assert usage is None or usage.model_extra == {}


def whole(run: Run, path: str, body: dict[str, Any]) -> Any:
    async def ask() -> Any:
        async with serving(FakeEngine(saying("aé!"))) as world:
            return await world.ask("POST", path, body)

    answer = run(ask())
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    return answer.json


def pieces(run: Run, path: str, body: dict[str, Any]) -> list[Any]:
    body = body | {"stream": True, "stream_options": {"include_usage": True}}

    async def ask() -> list[str]:
        async with (
            serving(FakeEngine(saying("aé!"))) as world,
            DefaultAsyncHttpxClient(trust_env=False) as client,
        ):
            answer = await client.post(f"http://127.0.0.1:{world.port}{path}", json=body)
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            return answer.text.split("\n\n")

    *events, done, end = run(ask())
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_whole_answers(run: Run) -> None:
    require_form(ChatCompletion, whole(run, "/v1/chat/completions", CHAT))
    require_form(Completion, whole(run, "/v1/completions", PLAIN))


def test_pieces_of_a_chat(run: Run) -> None:
    told = pieces(run, "/v1/chat/completions", CHAT)
    for piece in told:
        require_form(ChatCompletionChunk, piece)
    CompletionUsage.model_validate(told[-1]["usage"], strict=True)


def test_pieces_of_a_completion(run: Run) -> None:
    """Of these the package says that a reason is there always; OpenAI sends null until it is."""
    told = pieces(run, "/v1/completions", PLAIN)
    for piece in told:
        for choice in piece["choices"]:
            if choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
        require_form(Completion, piece)
    CompletionUsage.model_validate(told[-1]["usage"], strict=True)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/base"])
async def test_models(path: str) -> None:
    async def ask() -> Any:
        async with serving() as world:
            return (await world.ask("GET", path)).json

    told = await ask()
    card = told["data"][0] if path == "/v1/models" else told
    assert Model.model_validate(card, strict=True).id == "base"
    # As vLLM has them.
    assert card.keys() - Model.model_fields.keys() == {"parent", "max_model_len"}


async def test_seeds_of_several_sequences_stay_seeds() -> None:
    async def ask() -> Any:
        async with serving(FakeEngine(saying("x"))) as world:
            asked = {"model": "base", "prompt": "x", "n": 3, "seed": 2**63 - 2}
            answer = await world.ask("POST", "/v1/completions", asked)
            assert answer.status == 200
            return [tokens.generation.sampling.seed for tokens in world.engine.submitted]

    assert await ask() == [2**63 - 2, 2**63 - 1, -(2**63)]
