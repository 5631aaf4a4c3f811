"""The load generator of the benchmarks against the real server."""

import asyncio
import json
from pathlib import Path

import pytest
from server_world import FakeEngine, failing, saying, serving

import bench_serve
from lorax_async.errors import AdapterNotFoundError


@pytest.mark.parametrize("error", [None, "404"])
async def test_every_request_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: str | None
) -> None:
    gone = AdapterNotFoundError("no such adapter")
    engine, models = FakeEngine(failing(gone) if error else saying("hello you")), ("base", "one")
    async with serving(engine, adapters={"one": tmp_path / "one"}) as world:
        given = [f"http://127.0.0.1:{world.port}/v1", "--models", *models, "--json"]
        given += ["--rate", "60", "--seconds", "0.5", "--new-tokens", "5", "--prompt-tokens", "3"]
        status = await asyncio.to_thread(bench_serve.main, given)
    found = json.loads(capsys.readouterr().out)
    every, cold = found["all"], found["cold"]
    assert every["requests"] == found["warm"]["requests"] + cold["requests"] > 10
    bench_serve.show(found)
    if error is not None:
        assert status == 1
        assert every["errors"] == {error: every["requests"]}
        return
    assert (status, every["errors"]) == (0, {})
    assert every["complete"] == every["requests"] == len(engine.submitted)
    assert len(models) <= cold["requests"]
    # A token is a byte: "hello" of "hello you".
    assert every["tokens"] == 5 * every["requests"]
    assert 0 < every["ttft_ms"]["p50"] <= every["ttft_ms"]["p90"] <= every["ttft_ms"]["p99"]
    assert engine.submitted[0].generation.max_new_tokens == 5
    assert "tokens/s" in capsys.readouterr().out
