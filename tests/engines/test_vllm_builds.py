"""How vLLM's server learns that its workers have built an adapter: by a notice, without asking."""

import asyncio
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM, socket
from typing import Any

import pytest
from event_loops import until
from vllm_doubles import Engine, Gated, Lora, serving

from lorax_async import AdapterRef, UnsupportedAdapterError
from lorax_async.engines.vllm import engine_calls
from lorax_async.engines.vllm.notices import (
    AdapterLost,
    BuildEnded,
    Notice,
    receive_notices,
    send_notice,
)
from lorax_async.engines.vllm.served_adapters import ServedAdapters
from vllm_stage import write_adapter

pytestmark = pytest.mark.usefixtures("vllm", "builds_end")


class Refusing(Lora):
    def _load_adapter(self, lora_request: Any) -> Any:
        raise ValueError("this worker cannot read it")


def write(root: Path) -> AdapterRef:
    return AdapterRef(write_adapter(root / "a", rank=1, seed=1, layers=1))


def questions(engine: Engine) -> int:
    return [call[0] for call in engine.calls].count("lorax_prepared")


async def prepare(served: ServedAdapters, ref: AdapterRef) -> None:
    await served.discard(await served.prepare("a", ref))


@pytest.fixture
def lost_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_async.engines.vllm.worker.send_notice", lambda *_: None)


async def test_no_worker_is_asked_while_it_builds(tmp_path: Path) -> None:
    """A question waits for the steps in flight."""
    lora, ref = Gated(), write(tmp_path)
    engine = Engine(lora)
    async with serving(tmp_path, engine) as served:
        waiting = asyncio.create_task(prepare(served, ref))
        await until(lambda: lora.begun)
        await asyncio.sleep(0.2)
        lora.may_load.release()
        await waiting
        assert questions(engine) == 0
        await prepare(served, ref)
        assert (questions(engine), len(lora.begun)) == (0, 1), "it is built already"


async def test_weights_that_nobody_asked_for_are_reported_and_kept(tmp_path: Path) -> None:
    engine, ref = Engine(Lora()), write(tmp_path)
    async with serving(tmp_path, engine) as served:
        adapter = await served.prepare("a", ref)
        assert (await engine.collective_rpc("lorax_report", ()))[0]["built"].keys() == {
            adapter.path
        }
        await served.discard(adapter)
        assert (await engine.collective_rpc("lorax_report", ()))[0]["built"], "no copy was kept"


async def test_every_worker_is_waited_for(tmp_path: Path) -> None:
    slow, ref = Gated(), write(tmp_path)
    engine = Engine(Lora(), slow, Lora())
    async with serving(tmp_path, engine) as served:
        waiting = asyncio.create_task(prepare(served, ref))
        await until(lambda: slow.begun)
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        slow.may_load.release()
        await waiting
    assert questions(engine) == 0


async def test_an_error_of_one_worker_refuses_the_adapter(tmp_path: Path) -> None:
    engine, ref = Engine(Lora(), Refusing()), write(tmp_path)
    async with serving(tmp_path, engine) as served:
        with pytest.raises(UnsupportedAdapterError, match="this worker cannot read it"):
            await served.prepare("a", ref)
    assert questions(engine) == 0


async def test_a_notice_may_come_before_the_answer_to_the_call_that_began_it(
    tmp_path: Path,
) -> None:
    engine, ref = Engine(Lora()), write(tmp_path)
    call = engine.collective_rpc

    async def answer_late(method: str, args: Any) -> list[Any]:
        answer = await call(method, args)
        if method == "lorax_prepare":
            await asyncio.sleep(0.1)  # for its notice
        return answer

    engine.collective_rpc = answer_late  # type: ignore[method-assign]
    async with serving(tmp_path, engine) as served:
        await prepare(served, ref)
    assert questions(engine) == 0


async def test_a_notice_of_an_earlier_build_is_not_taken_for_that_of_a_later_one(
    tmp_path: Path,
) -> None:
    lora, ref = Gated(), write(tmp_path)
    engine = Engine(lora)
    async with serving(tmp_path, engine) as served:
        early = asyncio.create_task(prepare(served, ref))
        await until(lambda: lora.begun)
        early.cancel()
        with pytest.raises(asyncio.CancelledError):
            await early
        await until(lambda: "lorax_forget" in {call[0] for call in engine.calls})
        late = asyncio.create_task(prepare(served, ref))
        await until(lambda: [call[0] for call in engine.calls].count("lorax_prepare") == 2)
        lora.may_load.release()
        await until(lambda: len(lora.begun) == 2)
        done, _ = await asyncio.wait([late], timeout=0.2)
        assert not done
        lora.may_load.release()
        await late


@pytest.mark.usefixtures("lost_notices")
async def test_workers_whose_notices_are_lost_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_calls, "FIRST_QUESTION", 0.05)
    monkeypatch.setattr(engine_calls, "NEXT_QUESTION", 0.05)
    lora, ref = Gated(), write(tmp_path)
    engine = Engine(Lora(), lora)
    async with serving(tmp_path, engine) as served:
        waiting = asyncio.create_task(prepare(served, ref))
        await until(lambda: questions(engine) > 1)
        assert not waiting.done()
        lora.may_load.release()
        await waiting


@pytest.mark.usefixtures("lost_notices")
async def test_an_error_whose_notice_is_lost_refuses_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_calls, "FIRST_QUESTION", 0.05)
    engine, ref = Engine(Lora(), Refusing()), write(tmp_path)
    async with serving(tmp_path, engine) as served:
        with pytest.raises(UnsupportedAdapterError, match="this worker cannot read it"):
            await served.prepare("a", ref)


async def test_a_notice_without_the_key_is_ignored() -> None:
    notices: list[Notice] = []
    transport, (host, port, key) = await receive_notices("127.0.0.1", notices.append)
    send_notice((host, port, key[::-1]), AdapterLost("/forged", "gone"))
    with socket(AF_INET, SOCK_DGRAM) as stranger:
        stranger.sendto(b'["AdapterLost", "/forged", "gone"]', (host, port))
        stranger.sendto(b"", (host, port))
    expected: list[Notice] = [AdapterLost("/a", "its file has gone"), BuildEnded("7f", None)]
    for notice in expected:
        send_notice((host, port, key), notice)
    await until(lambda: len(notices) == 2)
    assert notices == expected
    transport.close()
