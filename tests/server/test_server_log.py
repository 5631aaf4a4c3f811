"""What the server logs: of requests, adapters and its own life, for people and for programs."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from event_loops import until
from openai import DefaultHttpxClient, NotFoundError, OpenAI
from peft_adapters import PEFT_WARNING, save
from server_world import (
    COMPLETIONS,
    FakeEngine,
    FakeTokens,
    failing,
    llama_config,
    loading,
    request,
    serving,
    tokenizer,
)
from tiny_loaders import ONE, fails
from tiny_loaders import loader as tiny_loader
from transformers import LlamaForCausalLM

from lorax_async.errors import AdapterTimeoutError, CapacityError, LoraxError
from lorax_async.server.server_log import log_adapters

PLAIN = {"model": "base", "prompt": "abc"}
Log = pytest.LogCaptureFixture


@pytest.fixture
def log(caplog: Log) -> Log:
    caplog.set_level(logging.DEBUG, "lorax_async.server")
    return caplog


def events(log: Log, *names: str) -> list[dict[str, Any]]:
    records = [vars(each) for each in log.records if each.name == "lorax_async.server"]
    return [each for each in records if each["event"] in (names or {"request"})]


async def test_each_request_is_a_line(log: Log, tmp_path: Path) -> None:
    handlers = logging.getLogger().handlers[:]
    one, there = tiny.write(tmp_path / "one"), tiny_loader()
    async with serving(FakeEngine(loading(there)), there, adapters={"sql": one}) as world:
        for body in (
            *(PLAIN, PLAIN | {"model": "sql"}, PLAIN | {"model": "sql", "stream": True}),
            *(PLAIN | {"model": "no\nsuch=one"}, PLAIN | {"n": 1000}),
        ):
            await world.ask("POST", COMPLETIONS, body, Authorization="Bearer a-secret-key")
        await world.ask("GET", "/health")
        await until(lambda: len(events(log)) == 6)
    seen = events(log)
    for name, values in {
        "call": [COMPLETIONS] * 5 + ["/health"],
        "status": [200, 200, 200, 404, 400, 200],
        "model": ["base", "sql", "sql", "no\N{REPLACEMENT CHARACTER}such=one", "base", None],
        "start": ["base", "cold", "warm", None, None, None],
        "stream": [False, False, True, False, False, None],
        "prompt_tokens": [3, 3, 3, None, None, None],
        "tokens": [6, 6, 6, None, None, None],
        "error": [None] * 3 + ["Refusal"] * 2 + [None],
        "client": ["127.0.0.1"] * 6,
        "levelname": ["INFO"] * 5 + ["DEBUG"],
    }.items():
        assert [each.get(name) for each in seen] == values, name
    for each in seen[:3]:
        assert each["id"].startswith("cmpl-")
        assert 0 <= each["first_token_ms"] <= each["total_ms"]
    assert 'model="no\N{REPLACEMENT CHARACTER}such=one"' in seen[3]["message"]
    assert len(seen[3]["message"].splitlines()) == 1
    assert "a-secret-key" not in log.text
    assert logging.getLogger().handlers == handlers


async def test_texts_that_may_hold_a_secret_are_left_out(log: Log) -> None:
    async with serving() as world:
        for id in ("https://user:5ecret@host/x", "https://host/x?token=5ecret"):
            await world.ask("POST", COMPLETIONS, PLAIN | {"model": id})
            await world.admin("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": id})
            await world.ask("GET", f"/v1/models/{id}")
        await until(lambda: len(events(log)) == 6)
    assert [each["status"] for each in events(log)] == [404, 400, 404] * 2
    assert "5ecret" not in log.text


async def test_failures_have_the_operators_text(log: Log) -> None:
    """Also in the midst of a stream, of a client that has gone, and of a server without room."""

    def begin(error: LoraxError) -> Any:
        def rule(tokens: FakeTokens) -> None:
            tokens.say("half")
            tokens.fail(error)

        return rule

    late = AdapterTimeoutError("too late; raise max_slots", id="org/x")
    for rule, body in (
        (failing(CapacityError("full")), PLAIN),
        (begin(late), PLAIN | {"stream": True}),
    ):
        async with serving(FakeEngine(rule)) as world:
            await world.ask("POST", COMPLETIONS, body)
    engine = FakeEngine()
    async with serving(engine) as world:
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(request(PLAIN))
        await engine.asked()
        writer.close()
        await until(lambda: len(events(log)) == 3)
    found = [(each["status"], each["error"], each["tokens"]) for each in events(log)]
    assert found[:2] == [(429, "CapacityError", 0), (200, "AdapterTimeoutError", 4)]
    assert found[2][:2] == (499, "ClientDisconnect")
    assert events(log)[1]["reason"].endswith("too late; raise max_slots")


async def test_loads_failures_and_departures_are_lines(log: Log, tmp_path: Path) -> None:
    one, two = tiny.write(tmp_path / "one"), tiny.write(tmp_path / "two")
    deep = tiny.write(tmp_path / "deep", layers=9)
    async with tiny_loader(max_slots=1) as there:
        with log_adapters(there):
            for folder in (one, two):
                (await there.load(folder)).release()
            await fails(there.load(deep), LoraxError)
            await there.unload(two)
        (await there.load(one)).release()  # no longer of the log's
    seen = events(log, "loaded", "left the device", "load failed")
    assert [(each["event"], Path(each["adapter"]).name) for each in seen] == [
        *(("loaded", "one"), ("left the device", "one"), ("loaded", "two")),
        *(("load failed", "deep"), ("left the device", "two")),
    ]
    assert (seen[0]["bytes"], seen[0]["slot"]) == (ONE, 0)
    assert seen[0]["load_ms"] >= 0
    assert (seen[3]["levelname"], seen[3]["error"]) == ("WARNING", "IncompatibleAdapterError")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(llama_config())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name in ("one", "two"):
        save(model, {"r": 2, "target_modules": ["q_proj"]}, folder / "loras" / name)
    return folder


def test_what_takes_long_to_import_is_a_step_of_the_log() -> None:
    """A plain line that says so would be no JSON."""
    program = "import sys; sys.modules['torch'] = None; from lorax_async.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--base=x", "--log-format=json", "--json"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(process.stderr.splitlines()[0])["step"] == "importing the server"


@pytest.mark.slow
@pytest.mark.filterwarnings(PEFT_WARNING)
def test_a_process_tells_its_life_in_json(base: Path) -> None:
    """The one line of --json stays alone on stdout."""
    options = ["--base", str(base), "--adapters", str(base / "loras"), "--max-slots", "1"]
    options += ["--port", "0", "--json", "--log-format", "json", "--served-model-name", "tiny"]
    options += ["--eviction", "lfu", "--verify", "before_use", "--max-rank", "4", "--timeout", "9"]
    (base / "template").write_text("{{ messages[0].content }}!")
    options += ["--chat-template", str(base / "template"), "--immutable-root", str(base / "loras")]
    env = os.environ | {"LORAX_API_KEY": "a-secret-key", "OMP_WAIT_POLICY": "passive"}
    command, pipe = [sys.executable, "-m", "lorax_async", "serve", *options], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["models"] == ["tiny", "one", "two"]
        http, url = DefaultHttpxClient(trust_env=False), f"{told['url']}/v1"
        with OpenAI(base_url=url, api_key="a-secret-key", http_client=http) as client:
            for model in ("one", "two", "tiny"):
                client.completions.create(model=model, prompt="x", max_tokens=2)
            client.completions.create(model="./one", prompt="x", max_tokens=2)
            chat: Any = [{"role": "user", "content": "four"}]
            answer = client.chat.completions.create(model="tiny", messages=chat, max_tokens=2)
            assert answer.usage
            assert answer.usage.prompt_tokens == len("four!")
            with pytest.raises(NotFoundError):
                client.completions.create(model="three", prompt="x")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "a-secret-key" not in err
    lines = [json.loads(line) for line in err.splitlines()]
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    serving = [line["event"] for line in lines].index("serving")
    waits = zip(times[: serving + 1], times[1 : serving + 1], strict=False)
    assert max((after - before).total_seconds() for before, after in waits) < 5
    rest = [line["event"] for line in lines[serving:]]
    assert rest[:2] == ["serving", "loaded"]
    assert [rest.count(name) for name in ("request", "loaded", "left the device")] == [6, 3, 2]
    assert rest[-3:] == ["closing", "closed", "stopped"]
    steps = {line["step"] for line in lines if line["event"] == "starting"}
    assert {"importing the server", "loading the base model"} <= steps
    assert any("opening 1 slots in" in step for step in steps)
