"""Bodies: what is taken, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.requests import Body, ChatBody, CompletionBody, parsed

PLAIN: dict[str, Any] = {"model": "m", "prompt": "p"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "c"}]}


def completion(**fields: Any) -> CompletionBody:
    return parsed(CompletionBody, json.dumps(PLAIN | fields).encode())


def chat(**fields: Any) -> ChatBody:
    return parsed(ChatBody, json.dumps(CHAT | fields).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], []),
    ],
)
def test_forms_of_prompts(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "neutral",
    [
        {"logprobs": None, "echo": False, "best_of": 1, "suffix": None, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "user": "u", "n": 1, "seed": -1},
        {"temperature": None, "top_p": None, "max_tokens": None, "stop": None, "stream": False},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_what_changes_nothing_is_taken(neutral: dict[str, Any]) -> None:
    assert completion(**neutral).prompts == ["p"]


def test_what_changes_nothing_in_a_chat_is_taken() -> None:
    chat(
        tools=[], tool_choice="auto", response_format={"type": "text"}, logprobs=False,
        metadata={"a": "b"}, service_tier="auto", store=False, modalities=["text"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: Any, param: str) -> None:
    for refuse in (completion, chat):
        with pytest.raises(Refusal, match=f"{param} is not implemented") as refused:
            refuse(**fields)
        assert (refused.value.status, refused.value.param) == (400, param)
        assert refused.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_token": 5}, "max_token"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": 5}, "stop"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ],
)
def test_wrong_values_are_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(Refusal) as refused:
        completion(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert param in refused.value.message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content"),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "messages.0.tool_calls"),
        ({"role": "user", "content": "x", "weight": 1}, "messages.0.weight"),
        ("x", "messages.0"),
    ],
)
def test_wrong_messages_are_refused_by_name(message: Any, param: str) -> None:
    with pytest.raises(Refusal) as refused:
        chat(messages=[message])
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"x", b"\xff", b"[]", b"null", b'"a"', b'{"model": NaN}', b'{"model": "\\ud800"}',
        b'{"a":' * 5000, b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_object_is_refused(kind: type[Body], content: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        parsed(kind, content)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(Refusal, match="Missing required parameter: prompt"):
        parsed(CompletionBody, b'{"model": "m"}')
    with pytest.raises(Refusal, match="Missing required parameter: model"):
        parsed(CompletionBody, b'{"prompt": "p"}')
    with pytest.raises(Refusal) as refused:
        parsed(ChatBody, b'{"model": "m", "messages": []}')
    assert refused.value.param == "messages"
