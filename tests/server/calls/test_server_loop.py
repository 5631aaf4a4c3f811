"""What of a request could hold the loop, on which all others are answered."""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lorax_async.commands import serve
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.prompts import Prompts
from lorax_async.server.calls.requests import Body, ChatBody, CompletionBody, parsed
from server.world import tokenizer

MANY = 3000
MEMBERS = {f"x{n}": 1 for n in range(MANY)}


def saying(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (CompletionBody, {"prompt": [1.5] * MANY}, "prompt"),
        (CompletionBody, {"prompt": [1] + [""] * MANY}, "prompt"),
        (CompletionBody, {"prompt": [[""] * 3] * MANY}, "prompt"),
        (CompletionBody, {"prompt": [[]] * MANY}, "prompt"),
        (CompletionBody, {"prompt": "x", "stop": [""] * MANY}, "stop"),
        (CompletionBody, {"prompt": "x"} | MEMBERS, "the body"),
        (ChatBody, {"messages": [{}] * MANY}, "messages.0.role"),
        (ChatBody, {"messages": saying("x")["messages"] * MANY}, "messages"),
        (ChatBody, {"messages": [{"role": "user", "content": "x"} | MEMBERS]}, "messages.0"),
        (ChatBody, saying([{}] * MANY), "messages.0.content"),
        (ChatBody, saying([{"type": "text", "text": "x"}] * MANY), "messages.0.content"),
        (ChatBody, saying([{"type": "text", "text": "x"} | MEMBERS]), "messages.0.content"),
    ],
)
def test_a_body_full_of_faults_is_refused_at_the_first_few(
    monkeypatch: pytest.MonkeyPatch, kind: type[Body], fields: Any, param: str
) -> None:
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
def unasked() -> Iterator[None]:
    """Nobody has to hand over the interpreter, who does not do so by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_others_run_while_a_long_text_becomes_tokens(kind: type[Body]) -> None:
    prompts, text = Prompts(tokenizer()), "what is ice " * 30_000
    fields = saying(text) if kind is ChatBody else {"prompt": text}
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


def test_what_lives_for_ever_is_not_looked_through_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    try:
        serve.as_application()
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()
