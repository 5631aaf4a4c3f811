"""Who gets no answer, is told why: the right status, in the form that clients know."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

import lorax_async as la
import tiny
from common import Run
from lorax_async import AdapterLoader, LoraxError
from lorax_async.server.errors import INTERNAL, refusal_of
from server.world import (
    TOKEN,
    FakeEngine,
    FakeTokens,
    World,
    failing,
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
def test_the_official_client_raises(
    run: Run, error: LoraxError, kind: type[openai.APIStatusError], stream: bool
) -> None:
    """A stream that has not begun is refused with a status, too."""

    async def ask() -> openai.APIStatusError:
        async with serving(FakeEngine(failing(error))) as world:
            create: Any = world.client.completions.create
            with pytest.raises(kind) as raised:
                await create(model="org/x", prompt="x", stream=stream)
            return raised.value

    told = run(ask())
    assert error.problem in told.message
    assert told.param == ("model" if error.id else None)


def test_an_operators_path_stays_hidden(run: Run, tmp_path: Path) -> None:
    error = la.AdapterFormatError("no JSON", id=str(tmp_path))

    async def ask() -> str:
        async with serving(FakeEngine(failing(error)), adapters={"mine": tmp_path}) as world:
            answer = await world.ask("POST", "/v1/completions", PLAIN | {"model": "mine"})
            return str(answer.error["message"])

    assert run(ask()) == "adapter 'mine', stage verify: no JSON"


def test_an_error_in_the_midst_is_the_last_event(run: Run) -> None:
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

    answer, submitted = run(ask())
    assert answer.status == 200
    events = [json.loads(line[6:]) for line in answer.body.splitlines() if line[:5] == b"data:"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "half"
    assert events[-1]["error"]["code"] == "timeout"
    assert b"[DONE]" not in answer.body
    assert all(tokens.cancelled.is_set() for tokens in submitted)


@pytest.mark.parametrize("begun", [False, True])
def test_a_fault_in_the_engine_is_told_to_the_log(
    run: Run, caplog: pytest.LogCaptureFixture, begun: bool
) -> None:
    def rule(tokens: FakeTokens) -> None:
        if begun:
            tokens.say("a")
        tokens.fail(RuntimeError("a secret"))

    async def ask() -> Any:
        async with serving(FakeEngine(rule)) as world:
            return await world.ask("POST", "/v1/completions", PLAIN | {"stream": True})

    answer = run(ask())
    assert answer.status == (200 if begun else 500)
    assert INTERNAL.encode() in answer.body
    assert b"secret" not in answer.body
    assert "a secret" in caplog.text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "base", "prompt": "x" * 11}, 400, "prompt"),
        ({"model": "base", "prompt": "x" * 10, "max_tokens": 91}, 400, "max_tokens"),
        ({"model": "base", "prompt": [0, 257]}, 400, "prompt"),
        ({"model": "base", "prompt": [-1]}, 400, "prompt"),
        ({"model": "base", "prompt": ""}, 400, "prompt"),
        ({"model": "base", "prompt": []}, 400, "prompt"),
        ({"model": "base", "prompt": ["x", ""]}, 400, "prompt"),
        ({"model": "base", "prompt": "x", "n": 5}, 400, "n"),
        ({"model": "base", "prompt": ["x", "y"], "n": 3}, 400, "prompt"),
        ({"model": "base", "prompt": "x", "echo": True}, 400, "echo"),
    ],
)
def test_what_can_never_be_computed_is_refused(
    run: Run, body: Any, status: int, param: str
) -> None:
    async def ask() -> Any:
        engine = FakeEngine(saying("y"), max_length=100)
        async with serving(engine, max_prompt_tokens=10, max_choices=4) as world:
            answer = await world.ask("POST", "/v1/completions", body)
            assert not engine.submitted
            return answer

    answer = run(ask())
    assert answer.status == status
    assert answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"


def test_the_longest_is_taken(run: Run) -> None:
    async def ask() -> Any:
        engine = FakeEngine(saying("y"), max_length=100)
        async with serving(engine, max_prompt_tokens=10) as world:
            body = {"model": "base", "prompt": tokens_of("x" * 10), "max_tokens": 90}
            return await world.ask("POST", "/v1/completions", body)

    assert run(ask()).status == 200


def test_a_template_refuses_in_its_own_words(run: Run) -> None:
    async def ask() -> Any:
        async with serving() as world:
            body = {"model": "base", "messages": [{"role": "assistant", "content": "a"}]}
            return await world.ask("POST", "/v1/chat/completions", body)

    answer = run(ask())
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "the user speaks first" in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/org/x", 404),
    ],
)
def test_unknown_calls(run: Run, method: str, path: str, status: int) -> None:
    async def ask() -> Any:
        async with serving() as world:
            return await world.ask(method, path)

    answer = run(ask())
    assert answer.status == status
    assert answer.error["message"]


def test_a_full_queue_refuses(run: Run) -> None:
    """Also where one request has more sequences than there is room for; none of them is queued."""

    async def ask() -> Any:
        engine = FakeEngine()
        async with serving(engine, max_waiting=2, max_choices=2, retry_after=7) as world:
            first = asyncio.create_task(world.ask("POST", "/v1/completions", PLAIN))
            tokens = await engine.asked()
            two = await world.ask("POST", "/v1/completions", PLAIN | {"n": 2})
            second = asyncio.create_task(world.ask("POST", "/v1/completions", PLAIN))
            other = await engine.asked(2)
            one = await world.ask("POST", "/v1/completions", PLAIN)
            assert len(engine.submitted) == 2
            tokens.end()  # it is computed, so that there is room again
            other.end()
            assert {(await first).status, (await second).status} == {200}
            return one, two

    for answer in run(ask()):
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert answer.error["type"] == "rate_limit_error"


def test_a_client_has_so_many_adapters_under_way(run: Run) -> None:
    async def ask() -> None:
        engine = FakeEngine()
        async with serving(engine, max_adapters_per_client=1) as world:

            async def status(model: str, key: str) -> int:
                body = PLAIN | {"model": model}
                headers = {"Authorization": f"Bearer {key}"}
                return (await world.ask("POST", "/v1/completions", body, **headers)).status

            asked = [asyncio.create_task(status("org/a", "anna"))]
            await engine.asked(1)
            assert await status("org/b", "anna") == 429
            others = [("org/a", "anna"), ("base", "anna"), ("org/b", "bert")]
            for number, (model, key) in enumerate(others, 2):
                asked.append(asyncio.create_task(status(model, key)))
                await engine.asked(number)
            for tokens in engine.submitted:
                tokens.end()
            assert await asyncio.gather(*asked) == [200] * 4
            asked = [asyncio.create_task(status("org/b", "anna"))]
            (await engine.asked(5)).end()
            assert await asked[0] == 200, "the place is free again"

    run(ask())


def test_without_keys_an_address_is_a_client(run: Run) -> None:
    async def ask() -> tuple[int, int]:
        engine = FakeEngine()
        async with serving(engine, max_adapters_per_client=1) as world:
            body = PLAIN | {"model": "org/a"}
            first = asyncio.create_task(world.ask("POST", "/v1/completions", body))
            tokens = await engine.asked()
            forged = {"X-Forwarded-For": "10.0.0.1"}
            second = await world.ask("POST", "/v1/completions", PLAIN | {"model": "b/c"}, **forged)
            tokens.end()
            return (await first).status, second.status

    assert run(ask()) == (200, 429)


class Loading(FakeEngine):
    """Answers once the adapter was loaded, as an engine does."""

    def __init__(self, loader: AdapterLoader) -> None:
        super().__init__(self._load)
        self._loader = loader
        self._tasks: set[asyncio.Task[None]] = set()

    def _load(self, tokens: FakeTokens) -> None:
        self._tasks.add(asyncio.create_task(self._answer(tokens)))

    async def _answer(self, tokens: FakeTokens) -> None:
        adapter = tokens.generation.adapter
        try:
            if adapter is not None:
                (await self._loader.load(adapter)).release()
        except LoraxError as error:
            tokens.fail(error)
        else:
            saying("loaded")(tokens)


def test_ids_are_a_loaders(run: Run, tmp_path: Path) -> None:
    """Names of requests are local below the operator's roots only; what is there is told by status."""
    roots, outside = tmp_path / "roots", tiny.write(tmp_path / "outside", 1)
    tiny.write(roots / "good", 0)
    tiny.write(roots / "deep", 0, layers=5)
    tiny.write(roots / "other", 0, peft_type="IA3")
    (tiny.write(roots / "torn", 0) / "adapter_config.json").write_text("{")

    async def ask() -> list[tuple[int, str]]:
        loader = tiny_loader(local_roots=(roots,), offline=True)
        async with serving(Loading(loader), loader, adapters={"outside": outside}) as world:

            async def answer(model: str) -> tuple[int, str]:
                found = await world.ask("POST", "/v1/completions", PLAIN | {"model": model})
                if found.status == 200:
                    return 200, str(found.json["choices"][0]["text"])
                return found.status, str(found.error["code"])

            return [
                await answer("./good"),
                await answer("outside"),
                await answer(str(outside)),
                await answer("./nowhere"),
                await answer("./torn"),
                await answer("./deep"),
                await answer("./other"),
                await answer("s3://bucket/x"),
                await answer("http://u:p@host/x"),
                await answer("a b"),
            ]

    assert run(ask()) == [
        (200, "loaded"),
        (200, "loaded"),
        (403, "model_access_denied"),
        (404, "model_not_found"),
        (422, "adapter_malformed"),
        (422, "adapter_incompatible"),
        (422, "adapter_unsupported"),
        (403, "model_access_denied"),
        (400, "invalid_model_id"),
        (400, "invalid_model_id"),
    ]


async def _health(world: World) -> Any:
    return await world.ask("GET", "/health")


def test_health(run: Run) -> None:
    async def ask() -> None:
        async with serving() as world:
            assert (await _health(world)).status == 200
            world.engine.alive = False
            gone = await _health(world)
            assert (gone.status, gone.error["code"]) == (503, "engine_gone")
            refused = await world.ask("POST", "/v1/completions", PLAIN)
            assert refused.status == 503
            world.engine.alive = True
            world.service.under_way.close()
            closing = await _health(world)
            assert (closing.status, closing.error["code"]) == (503, "closing")
            assert closing.headers["retry-after"] == "1"

    run(ask())


def test_a_token_is_shown_nowhere() -> None:
    from lorax_async.server.settings import ServerSettings

    assert TOKEN not in repr(ServerSettings(base="b", admin_token=TOKEN))
