"""Who gets no answer, is told why: the right status, in the form that clients know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

import lorax_async as la
from lorax_async import LoraxError
from lorax_async.server.calls.errors import INTERNAL, refusal_of
from server.world import (
    FakeEngine,
    FakeTokens,
    failing,
    serving,
)

PLAIN = {"model": "base", "prompt": "x"}

STATUSES = (
    (la.AdapterNotFoundError, 404, "model_not_found"),
    (la.AccessDeniedError, 403, "model_access_denied"),
    (la.InvalidAdapterIdError, 400, "invalid_model_id"),
    (la.AdapterFormatError, 422, "adapter_malformed"),
    (la.UnsupportedAdapterError, 422, "adapter_unsupported"),
    (la.IncompatibleAdapterError, 422, "adapter_incompatible"),
    (la.CapacityError, 429, "over_capacity"),
    (la.LoaderClosedError, 503, "closing"),
    (la.HandleClosedError, 503, "closing"),
    (la.AdapterTimeoutError, 504, "timeout"),
    (la.FetchTimeoutError, 504, "timeout"),
    (la.FetchError, 502, "fetch_failed"),
    (la.IntegrityError, 502, "adapter_altered"),
    (la.EvictedError, 503, "evicted"),
    (la.AdapterInUseError, 409, "adapter_in_use"),
    (la.UsageError, 400, "invalid_request"),
    (la.TransferError, 500, "transfer_failed"),
    (la.InternalError, 500, "internal_error"),
)


def test_every_error_of_the_library_has_a_status() -> None:
    """By its own row, or by that of the class above it, which says the same."""
    told = {kind for kind, _, _ in STATUSES}
    inherited = {la.AdapterError, la.ConfigError, la.InvalidTransitionError, LoraxError}
    every = {e for e in vars(la).values() if isinstance(e, type) and issubclass(e, LoraxError)}
    assert every == told | inherited


@pytest.mark.parametrize(("kind", "status", "code"), STATUSES)
def test_statuses(kind: type[LoraxError], status: int, code: str) -> None:
    refusal = refusal_of(kind("the reason", id="org/x"), 2.5)
    assert (refusal.status, refusal.code) == (status, code)
    hidden = kind is la.InternalError
    assert ("the reason" in refusal.message) is not hidden
    assert hidden == (refusal.message == INTERNAL)
    comes_back = status in {429, 503, 504} or code in {"fetch_failed", "adapter_altered"}
    assert ("retry-after" in refusal.response().headers) == comes_back
    if comes_back:
        assert refusal.response().headers["retry-after"] == "3"


def test_a_source_says_itself_when_to_come_back() -> None:
    error = la.FetchError("busy", retry_after=40.2)
    assert refusal_of(error, 1).response().headers["retry-after"] == "41"
    for_good = la.FetchError("gone", retryable=False)
    assert "retry-after" not in refusal_of(for_good, 1).response().headers


def test_strangers_learn_nothing_of_a_fault() -> None:
    assert refusal_of(RuntimeError("a secret"), 1).message == INTERNAL


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (la.AdapterNotFoundError("nothing there", id="org/x"), openai.NotFoundError),
        (la.AccessDeniedError("not allowed", id="org/x"), openai.PermissionDeniedError),
        (la.UnsupportedAdapterError("DoRA", id="org/x"), openai.UnprocessableEntityError),
        (la.CapacityError("full"), openai.RateLimitError),
        (la.LoaderClosedError("closing"), openai.InternalServerError),
    ],
)
async def test_the_official_client_raises(
    error: LoraxError, kind: type[openai.APIStatusError], stream: bool
) -> None:
    """A stream that has not begun is refused with a status, too."""

    async def ask() -> openai.APIStatusError:
        async with serving(FakeEngine(failing(error))) as world:
            create: Any = world.client.completions.create
            with pytest.raises(kind) as raised:
                await create(model="org/x", prompt="x", stream=stream)
            return raised.value

    told = await ask()
    assert error.problem in told.message
    assert told.param == ("model" if error.id else None)


async def test_an_operators_path_stays_hidden(tmp_path: Path) -> None:
    error = la.AdapterFormatError("no JSON", id=str(tmp_path))

    async def ask() -> str:
        async with serving(FakeEngine(failing(error)), adapters={"mine": tmp_path}) as world:
            answer = await world.ask("POST", "/v1/completions", PLAIN | {"model": "mine"})
            return str(answer.error["message"])

    assert await ask() == "adapter 'mine', stage verify: no JSON"


async def test_an_error_in_the_midst_is_the_last_event() -> None:
    def rule(tokens: FakeTokens) -> None:
        tokens.say("half")
        tokens.fail(la.AdapterTimeoutError("too slow", id="org/x"))

    async def ask() -> Any:
        async with serving(FakeEngine(rule)) as world:
            body = PLAIN | {"stream": True, "model": "org/x"}
            answer = await world.ask("POST", "/v1/completions", body)
            stream = await world.client.completions.create(model="org/x", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="too slow"):
                async for _ in stream:
                    pass
            return answer, world.engine.submitted

    answer, submitted = await ask()
    assert answer.status == 200
    events = [json.loads(line[6:]) for line in answer.body.splitlines() if line[:5] == b"data:"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "half"
    assert events[-1]["error"]["code"] == "timeout"
    assert b"[DONE]" not in answer.body
    assert all(tokens.cancelled.is_set() for tokens in submitted)


@pytest.mark.parametrize("begun", [False, True])
async def test_a_fault_in_the_engine_is_told_to_the_log(
    caplog: pytest.LogCaptureFixture, begun: bool
) -> None:
    def rule(tokens: FakeTokens) -> None:
        if begun:
            tokens.say("a")
        tokens.fail(RuntimeError("a secret"))

    async def ask() -> Any:
        async with serving(FakeEngine(rule)) as world:
            return await world.ask("POST", "/v1/completions", PLAIN | {"stream": True})

    answer = await ask()
    assert answer.status == (200 if begun else 500)
    assert INTERNAL.encode() in answer.body
    assert b"secret" not in answer.body
    assert "a secret" in caplog.text
