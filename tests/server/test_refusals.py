"""Requests that are refused: the right status, in the form that clients know, and by which limit."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

import lorax_async as la
import tiny
from lorax_async import ConfigError, LoraxError, UsageError
from lorax_async.server.calls.errors import INTERNAL, refusal_of
from lorax_async.server.settings import ServerSettings
from server.world import (
    COMPLETIONS,
    TOKEN,
    FakeEngine,
    FakeTokens,
    failing,
    loading,
    saying,
    serving,
    tokens_of,
)
from tiny_loaders import loader as tiny_loader

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
def test_an_error_has_its_status(kind: type[LoraxError], status: int, code: str) -> None:
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
    async with serving(FakeEngine(failing(error))) as world:
        create: Any = world.client.completions.create
        with pytest.raises(kind) as raised:
            await create(model="org/x", prompt="x", stream=stream)
    assert error.problem in raised.value.message
    assert raised.value.param == ("model" if error.id else None)


async def test_an_operators_path_stays_hidden(tmp_path: Path) -> None:
    error = la.AdapterFormatError("no JSON", id=str(tmp_path))
    async with serving(FakeEngine(failing(error)), adapters={"mine": tmp_path}) as world:
        answer = await world.ask("POST", COMPLETIONS, PLAIN | {"model": "mine"})
    assert answer.error["message"] == "adapter 'mine', stage verify: no JSON"


async def test_an_error_in_a_streams_midst_is_its_last_event() -> None:
    def rule(tokens: FakeTokens) -> None:
        tokens.say("half")
        tokens.fail(la.AdapterTimeoutError("too slow", id="org/x"))

    async with serving(FakeEngine(rule)) as world:
        answer = await world.ask("POST", COMPLETIONS, PLAIN | {"stream": True, "model": "org/x"})
        stream = await world.client.completions.create(model="org/x", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="too slow"):
            async for _ in stream:
                pass
        assert all(tokens.cancelled.is_set() for tokens in world.engine.submitted)
    assert answer.status == 200
    events = [json.loads(line[6:]) for line in answer.body.splitlines() if line[:5] == b"data:"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "half"
    assert events[-1]["error"]["code"] == "timeout"
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("begun", [False, True])
async def test_a_fault_in_the_engine_is_for_the_log_alone(
    caplog: pytest.LogCaptureFixture, begun: bool
) -> None:
    def rule(tokens: FakeTokens) -> None:
        if begun:
            tokens.say("a")
        tokens.fail(RuntimeError("a secret"))

    async with serving(FakeEngine(rule)) as world:
        answer = await world.ask("POST", COMPLETIONS, PLAIN | {"stream": True})
    assert answer.status == (200 if begun else 500)
    assert INTERNAL.encode() in answer.body
    assert b"secret" not in answer.body
    assert "a secret" in caplog.text


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "x" * 11}, "prompt"),
        ({"prompt": "x" * 10, "max_tokens": 91}, "max_tokens"),
        ({"prompt": [0, 257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": "x", "n": 5}, "n"),
        ({"prompt": ["x", "y"], "n": 3}, "prompt"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": tokens_of("x" * 10), "max_tokens": 90}, None),
    ],
)
async def test_what_can_never_be_computed_is_refused(fields: Any, param: str | None) -> None:
    """But not the longest that can."""
    engine = FakeEngine(saying("y"), max_length=100)
    async with serving(engine, max_prompt_tokens=10, max_choices=4) as world:
        answer = await world.ask("POST", COMPLETIONS, {"model": "base"} | fields)
    assert len(engine.submitted) == (param is None)
    if param is None:
        assert answer.status == 200
    else:
        assert (answer.status, answer.error["param"]) == (400, param)
        assert answer.error["type"] == "invalid_request_error"


async def test_a_template_refuses_in_its_own_words() -> None:
    async with serving() as world:
        body = {"model": "base", "messages": [{"role": "assistant", "content": "a"}]}
        answer = await world.ask("POST", "/v1/chat/completions", body)
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "the user speaks first" in answer.error["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1", 404), (COMPLETIONS, 405), ("/v1/models/nobody", 404), ("/v1/models/org/x", 404)],
)
async def test_unknown_calls_are_told(path: str, status: int) -> None:
    async with serving() as world:
        answer = await world.ask("GET", path)
    assert answer.status == status
    assert answer.error["message"]


async def test_a_full_queue_refuses() -> None:
    """Also more sequences than there is room for, of which none is queued; no prompt is read."""
    engine = FakeEngine()
    async with serving(engine, max_waiting=2, max_choices=2, retry_after=7) as world:
        first = world.completing(PLAIN)
        await engine.asked()
        two = await world.ask("POST", COMPLETIONS, PLAIN | {"n": 2})
        second = world.completing(PLAIN)
        await engine.asked(2)
        world.service.prompts.read = lambda body: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        one = await world.ask("POST", COMPLETIONS, PLAIN)
        assert len(engine.submitted) == 2
        for tokens in engine.submitted:
            tokens.end()  # it is computed, so that there is room again
        assert {(await first).status, (await second).status} == {200}
    for answer in (one, two):
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert answer.error["type"] == "rate_limit_error"


async def test_where_one_sequence_is_refused_all_are() -> None:
    engine = FakeEngine()

    def rule(_: FakeTokens) -> None:
        engine.alive = False

    engine.rule = rule
    async with serving(engine) as world:
        assert (await world.ask("POST", COMPLETIONS, PLAIN | {"n": 2})).status == 503
        assert engine.submitted[0].cancelled.is_set()
        assert engine.waiting == 0


async def test_the_engine_is_told_the_client() -> None:
    """By the key, else by the address; it shares its places between them."""
    async with serving() as world:
        for key in ("anna", "anna", "bert", None, None):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            await world.ask("POST", "/v1/completions", PLAIN, **headers)
        one, two, three, four, five = (
            tokens.generation.client for tokens in world.engine.submitted
        )
        assert one == two
        assert four == five
        assert len({one, three, four}) == 3
        assert "anna" not in repr(world.engine.submitted[0].generation)


async def test_a_client_has_a_number_of_adapters_under_way() -> None:
    """By its key, else by its address, which it cannot choose."""
    engine = FakeEngine()
    async with serving(engine, max_adapters_per_client=1) as world:

        async def status(model: str, key: str | None) -> int:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            headers["X-Forwarded-For"] = f"10.0.0.{len(engine.submitted)}"
            answer = await world.ask("POST", COMPLETIONS, PLAIN | {"model": model}, **headers)
            return answer.status

        asked = []
        for number, (model, key) in enumerate(
            [("org/a", "anna"), ("org/a", "anna"), ("base", "anna"), ("org/b", "bert")]
            + [("org/a", None)],
            1,
        ):
            asked.append(asyncio.create_task(status(model, key)))
            await engine.asked(number)
        assert await status("org/b", "anna") == 429
        assert await status("org/b", None) == 429
        engine.rule = FakeTokens.end
        for tokens in engine.submitted:
            tokens.end()
        assert await asyncio.gather(*asked) == [200] * 5
        assert await status("org/b", "anna") == 200, "the place is free again"


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    roots = tmp_path / "roots"
    tiny.write(tmp_path / "outside", 1)
    tiny.write(roots / "good", 0)
    tiny.write(roots / "deep", 0, layers=5)
    tiny.write(roots / "other", 0, peft_type="IA3")
    (tiny.write(roots / "torn", 0) / "adapter_config.json").write_text("{")
    return roots


async def test_ids_are_a_loaders(roots: Path) -> None:
    """Names of requests are local below the operator's roots only; what is there is told by status."""
    there, outside = tiny_loader(local_roots=(roots,), offline=True), roots.parent / "outside"
    async with serving(FakeEngine(loading(there)), there, adapters={"outside": outside}) as world:
        for model, status, said in (
            ("./good", 200, "loaded"),
            ("outside", 200, "loaded"),
            (str(outside), 403, "model_access_denied"),
            ("./nowhere", 404, "model_not_found"),
            ("./torn", 422, "adapter_malformed"),
            ("./deep", 422, "adapter_incompatible"),
            ("./other", 422, "adapter_unsupported"),
            ("s3://bucket/x", 403, "model_access_denied"),
            ("http://u:p@host/x", 400, "invalid_model_id"),
            ("a b", 400, "invalid_model_id"),
        ):
            answer = await world.ask("POST", COMPLETIONS, PLAIN | {"model": model})
            told = answer.json["choices"][0]["text"] if status == 200 else answer.error["code"]
            assert (answer.status, told) == (status, said), model


async def test_health() -> None:
    async with serving() as world:
        assert (await world.ask("GET", "/health")).status == 200
        world.engine.alive = False
        gone = await world.ask("GET", "/health")
        assert (gone.status, gone.error["code"]) == (503, "engine_gone")
        assert (await world.ask("POST", COMPLETIONS, PLAIN)).status == 503
        world.engine.alive = True
        world.service.under_way.close()
        closing = await world.ask("GET", "/health")
        assert (closing.status, closing.error["code"]) == (503, "closing")
        assert closing.headers["retry-after"] == "1"


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"admin_token": ""},
        {"admin_token": "two words"},
        {"max_body_bytes": 0},
        {"max_prompt_tokens": 0},
        {"max_waiting": 1},
        {"slow_client": 0},
        {"drain": -1},
        {"retry_after": "1"},
        {"base": ""},
        {"adapters": {"b": "x/y"}},
        {"adapters": {"": "x/y"}},
        {"adapters": {"a": 5}},
    ],
)
def test_settings_are_checked(wrong: Any) -> None:
    with pytest.raises((ConfigError, UsageError)):
        ServerSettings(**({"base": "b"} | wrong))


def test_settings_keep_their_own_names() -> None:
    names = {"a": "x/y"}
    settings = ServerSettings(base="b", adapters=names)
    names["c"] = "x/z"
    assert settings.adapters == {"a": "x/y"}
    with pytest.raises(TypeError):
        settings.adapters["d"] = "x/y"  # type: ignore[index]


def test_a_token_is_shown_nowhere() -> None:
    assert TOKEN not in repr(ServerSettings(base="b", admin_token=TOKEN))
