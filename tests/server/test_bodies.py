"""Bodies of requests: what is taken, what is refused by name, and what reading one costs others."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.prompts import Prompts
from lorax_async.server.calls.requests import Body, ChatBody, CompletionBody, parsed
from server.world import serving, tokenizer

PLAIN: dict[str, Any] = {"model": "m", "prompt": "p"}


def messages(*given: Any) -> dict[str, Any]:
    return {"messages": list(given)}


def user(content: Any = "c", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


def completion(**fields: Any) -> CompletionBody:
    return parsed(CompletionBody, json.dumps(PLAIN | fields).encode())


def chat(**fields: Any) -> ChatBody:
    return parsed(ChatBody, json.dumps({"model": "m"} | messages(user()) | fields).encode())


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
def test_fields_that_change_nothing_are_taken(neutral: dict[str, Any]) -> None:
    assert completion(**neutral).prompts == ["p"]
    chat(
        tools=[], tool_choice="auto", response_format={"type": "text"}, logprobs=False,
        metadata={"a": "b"}, service_tier="auto", store=False, modalities=["text"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        *({"logprobs": 0}, {"logprobs": True}, {"echo": True}, {"best_of": 2}, {"suffix": "x"}),
        *({"logit_bias": {"5": 1}}, {"presence_penalty": 0.1}, {"frequency_penalty": -1}),
        *({"tools": [{}]}, {"response_format": {"type": "json_object"}}),
    ],
    ids=repr,
)
def test_what_is_not_implemented_is_refused_by_name(fields: Any) -> None:
    (param,) = fields
    for refuse in (completion, chat):
        with pytest.raises(Refusal, match=f"{param} is not implemented") as refused:
            refuse(**fields)
        assert (refused.value.status, refused.value.param) == (400, param)
        assert refused.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(({name: value}, name) for name, value in (
            ("max_token", 5), ("temperature", 2.1), ("temperature", -0.1), ("temperature", "1"),
            ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("n", 0), ("n", 1.5),
            ("max_tokens", 0), ("seed", 2**63), ("stop", ["a"] * 5), ("stop", ""),
            ("stop", "x" * 257), ("stop", 5), ("prompt", None), ("prompt", [1, "a"]),
            ("prompt", [[1], "a"]), ("prompt", {"a": 1}), ("model", ""), ("model", 5),
            ("stream", "yes"), ("stream_options", {"include_usage": True}),
        )),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(Refusal) as refused:
        completion(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert param in refused.value.message


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([user(None)], "messages.0.content"),
        ([user([{"type": "image_url"}])], "messages.0.content"),
        ([user(tool_calls=[{}])], "messages.0.tool_calls"),
        ([user(weight=1)], "messages.0.weight"),
        (["x"], "messages.0"),
    ],
)
def test_wrong_messages_are_refused_by_name(given: list[Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        chat(messages=given)
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


@pytest.mark.parametrize("missing", ["prompt", "model"])
def test_what_is_missing_is_named(missing: str) -> None:
    there = {name: value for name, value in PLAIN.items() if name != missing}
    with pytest.raises(Refusal, match=f"Missing required parameter: {missing}"):
        parsed(CompletionBody, json.dumps(there).encode())


@pytest.mark.parametrize("content", [b"{", b"null", b'{"model": "base"}'])
async def test_a_wrong_body_is_refused_over_a_socket(content: bytes) -> None:
    async with serving() as world:
        answer = await world.ask("POST", "/v1/completions", content)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


# -- the loop, on which all others are answered ---------------------------------------------------

MANY = 3000
MEMBERS = {f"x{n}": 1 for n in range(MANY)}
TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (CompletionBody, {"prompt": [1.5] * MANY}, "prompt"),
        (CompletionBody, {"prompt": [None] * MANY}, "prompt"),
        (CompletionBody, {"prompt": [[None] * MANY]}, "prompt"),
        (CompletionBody, {"prompt": [1] + [""] * MANY}, "prompt"),
        (CompletionBody, {"prompt": [[""] * 3] * MANY}, "prompt"),
        (CompletionBody, {"prompt": [[]] * MANY}, "prompt"),
        (CompletionBody, {"prompt": "x", "stop": [""] * MANY}, "stop"),
        (CompletionBody, {"prompt": "x"} | MEMBERS, "the body"),
        (ChatBody, messages(*[{}] * MANY), "messages.0.role"),
        (ChatBody, messages(*[1] * MANY), "messages.0"),
        (ChatBody, messages(*[user("x")] * MANY), "messages"),
        (ChatBody, messages(user("x") | MEMBERS), "messages.0"),
        (ChatBody, messages(user([{}] * MANY)), "messages.0.content"),
        (ChatBody, messages(user([TEXT] * MANY)), "messages.0.content"),
        (ChatBody, messages(user([TEXT | MEMBERS])), "messages.0.content"),
    ],
)
def test_a_body_full_of_faults_is_refused_at_the_first_few(
    monkeypatch: pytest.MonkeyPatch, kind: type[Body], fields: Any, param: str
) -> None:
    """A body of 1 MiB has room for half a million mistakes, which took seconds to list."""
    counts = list[int]()

    def validate(found: Any) -> Body:
        try:
            return kind(**found)
        except ValidationError as error:
            counts.append(error.error_count())
            raise

    monkeypatch.setattr(kind, "model_validate", validate)
    with pytest.raises(Refusal) as refused:
        parsed(kind, json.dumps({"model": "m"} | fields).encode())
    assert (refused.value.status, refused.value.param) == (400, param)
    assert max(counts) < 10


@pytest.fixture
def no_thread_is_interrupted() -> Iterator[None]:
    """Threads run when another one lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("no_thread_is_interrupted")
@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_other_threads_run_while_a_long_text_becomes_tokens(kind: type[Body]) -> None:
    prompts, text = Prompts(tokenizer()), "what is ice " * 30_000
    fields = messages(user(text)) if kind is ChatBody else {"prompt": text}
    body = parsed(kind, json.dumps({"model": "m"} | fields).encode())
    begun, read = threading.Event(), list[int]()

    def reading() -> None:
        begun.set()
        read.extend(map(len, prompts.read(body)))

    thread = threading.Thread(target=reading)
    thread.start()
    begun.wait()
    assert not read
    thread.join()
    assert read[0] >= len(text)


async def test_a_prompt_is_read_off_the_loop() -> None:
    threads = list[threading.Thread]()
    async with serving() as world:
        read = world.service.prompts.read

        def noted(body: Any) -> Any:
            threads.append(threading.current_thread())
            return read(body)

        world.service.prompts.read = noted  # type: ignore[method-assign]
        answer = await world.ask("POST", "/v1/completions", {"model": "base", "prompt": "x"})
        assert answer.status == 200
    assert len(threads) == 1
    assert threading.main_thread() not in threads
