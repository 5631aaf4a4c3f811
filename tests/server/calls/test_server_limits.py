"""Limits, of one request and of one client; names, which are a loader's; and health."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import tiny
from lorax_async import AdapterLoader, LoraxError
from server.world import TOKEN, FakeEngine, FakeTokens, World, saying, serving, tokens_of
from tiny_loaders import loader as tiny_loader

PLAIN = {"model": "base", "prompt": "x"}


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
async def test_what_can_never_be_computed_is_refused(body: Any, status: int, param: str) -> None:
    async def ask() -> Any:
        engine = FakeEngine(saying("y"), max_length=100)
        async with serving(engine, max_prompt_tokens=10, max_choices=4) as world:
            answer = await world.ask("POST", "/v1/completions", body)
            assert not engine.submitted
            return answer

    answer = await ask()
    assert answer.status == status
    assert answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"


async def test_the_longest_is_taken() -> None:
    async def ask() -> Any:
        engine = FakeEngine(saying("y"), max_length=100)
        async with serving(engine, max_prompt_tokens=10) as world:
            body = {"model": "base", "prompt": tokens_of("x" * 10), "max_tokens": 90}
            return await world.ask("POST", "/v1/completions", body)

    assert (await ask()).status == 200


async def test_a_template_refuses_in_its_own_words() -> None:
    async def ask() -> Any:
        async with serving() as world:
            body = {"model": "base", "messages": [{"role": "assistant", "content": "a"}]}
            return await world.ask("POST", "/v1/chat/completions", body)

    answer = await ask()
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "the user speaks first" in answer.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/org/x", 404),
    ],
)
async def test_unknown_calls(method: str, path: str, status: int) -> None:
    async def ask() -> Any:
        async with serving() as world:
            return await world.ask(method, path)

    answer = await ask()
    assert answer.status == status
    assert answer.error["message"]


async def test_a_full_queue_refuses() -> None:
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

    for answer in await ask():
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert answer.error["type"] == "rate_limit_error"


async def test_the_engine_is_told_whose_a_sequence_is() -> None:
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


async def test_a_client_has_so_many_adapters_under_way() -> None:
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


async def test_without_keys_an_address_is_a_client() -> None:
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

    assert await ask() == (200, 429)


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


async def test_ids_are_a_loaders(tmp_path: Path) -> None:
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

    assert await ask() == [
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


async def test_health() -> None:
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


def test_a_token_is_shown_nowhere() -> None:
    from lorax_async.server.settings import ServerSettings

    assert TOKEN not in repr(ServerSettings(base="b", admin_token=TOKEN))
