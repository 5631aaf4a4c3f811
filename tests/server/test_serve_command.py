"""`lorax-async serve` as its operator meets it: a process, its signals, its warm list."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import DefaultHttpxClient, OpenAI

import tiny
from lorax_async import Allow, ConfigError, LoaderConfig
from lorax_async.cli import main
from lorax_async.commands import serve
from lorax_async.commands.places import as_place, as_source, opened, sources_of
from lorax_async.commands.serve import ADMIN_TOKEN, how_to_serve, named
from lorax_async.server import serving as serving_module
from lorax_async.server.assembly import Base, Capacity, assembled
from lorax_async.server.settings import ServerSettings

pytestmark = pytest.mark.slow

TOKEN = "a-token"


@contextmanager
def served(*more: str) -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
    """The process, and a client of it."""
    command = [sys.executable, "-m", "lorax_async", "serve", "--base", "smollm2", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json", *more],
        stdout=subprocess.PIPE,
        env={**os.environ, ADMIN_TOKEN: TOKEN, "OMP_WAIT_POLICY": "passive"},
        text=True,
    )
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        http = DefaultHttpxClient(trust_env=False)
        with OpenAI(base_url=f"{told['url']}/v1", api_key=TOKEN, http_client=http) as client:
            yield process, client
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


def answer(client: OpenAI, model: str) -> str:
    found = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What is ice?"}], temperature=0
    )
    return str(found.choices[0].message.content)


def on_device(client: OpenAI) -> set[str]:
    found = client.get("/adapters", cast_to=object)
    assert isinstance(found, dict)
    return {name for row in found["data"] if row["tier"] == "device" for name in row["names"]}


def until(condition: Callable[[], object]) -> None:
    late = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < late, "it never happened"
        time.sleep(0.02)


def listed(path: Path) -> set[str]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["adapters"] if path.exists() else []
    return {Path(row["path"]).name for row in rows}


def test_killed_it_comes_back_with_the_adapters_that_it_had(examples: Path, tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    options = ("--adapters", str(examples), "--warm", str(warm))
    with served(*options) as (process, client):
        assert [model.id for model in client.models.list()] == [
            "smollm2",
            "json",
            "pirate",
            "shout",
        ]
        assert answer(client, "pirate").startswith("Arr")
        assert answer(client, "shout").isupper()
        until(lambda: listed(warm) == {"pirate", "shout"})
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    with served(*options) as (process, client):
        until(lambda: on_device(client) == {"pirate", "shout"})
        stream = client.chat.completions.create(
            model="pirate",
            messages=[{"role": "user", "content": "What is ice?"}],
            temperature=0,
            stream=True,
        )
        chunks = iter(stream)
        text = [next(chunks).choices[0].delta.content or ""]
        process.send_signal(signal.SIGTERM)
        text += [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(text).endswith("matey!"), "what is under way is finished"
        assert process.wait(30) == 0
    assert listed(warm) == {"pirate", "shout"}


# -- arguments ------------------------------------------------------------------------------------


def test_names_of_adapters(tmp_path: Path) -> None:
    one = tiny.write(tmp_path / "one")
    two = tiny.write(tmp_path / "all" / "two")
    (tmp_path / "all" / "no adapter").mkdir()
    hub, web = "org/sql@v1", "https://files.example/loras/chat/"
    found = named([str(one), f"another={one}", str(tmp_path / "all"), hub, web, f"mine={hub}"])
    assert {name: getattr(adapter, "id", adapter) for name, adapter in found.items()} == {
        "one": one,
        "another": one,
        "two": two,
        "sql": "org/sql",
        "chat": web,
        "mine": "org/sql",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{0}", "{0}"], "two adapters are called 'one'"),
        (["{0}/.."], "is no adapter, and holds none"),
        (["x=ftp://host/a"], "--adapters"),
    ],
    ids=["twice", "empty", "no id"],
)
def test_adapters_that_have_no_name(tmp_path: Path, given: list[str], said: str) -> None:
    folder = tmp_path / "below" / "deep" / "one"
    tiny.write(folder)
    if "{0}/.." in given:
        folder = folder.parent
    with pytest.raises(ConfigError, match=said):
        named([text.format(folder) for text in given])


def test_places_that_requests_may_name(tmp_path: Path) -> None:
    https, s3 = "https://files.example/loras/", "s3://bucket/loras/"
    given = [as_source(text) for text in (str(tmp_path), https, s3)]
    arguments = argparse.Namespace(source=given)
    found = sources_of(arguments, [])
    assert found["local_roots"] == (tmp_path,)
    places = (
        Allow("https", "files.example", prefix="loras/", private=True),
        Allow("s3", "bucket", prefix="loras/"),
    )
    assert opened(arguments) == places
    assert set(found["allow"]) == {*places, Allow("hub")}, "the operator may name all of the hub"


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ([], ()),
        (["hub"], (Allow("hub"),)),
        (["hub:org/"], (Allow("hub", prefix="org/", use_token=True),)),
    ],
)
def test_the_hub_is_closed_unless_it_is_opened(
    given: list[str], allowed: tuple[Allow, ...]
) -> None:
    arguments = argparse.Namespace(source=[as_source(text) for text in given])
    assert opened(arguments) == allowed
    found = sources_of(arguments, [as_place("org/sql")])
    lending = [entry for entry in found["allow"] if entry.use_token]
    assert lending == [entry for entry in allowed if entry.prefix]


@pytest.mark.parametrize("text", ["hub:org", "no/such/folder", "ftp://host/"])
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        as_source(text)


def test_a_base_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--base", str(tmp_path), "--json"]) == 1
    assert "is no base model that can be served" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["65536", "-1", "x", "²", ""])
def test_ports_that_are_none(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--base", "smollm2", f"--port={port}"])
    assert ended.value.code == 2
    assert "is no port" in capsys.readouterr().err


async def test_only_what_goes_wrong_with_the_place_is_said_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: Any = argparse.Namespace(host="127.0.0.1", port=1, warm=None)
    monkeypatch.setattr(serving_module, "listen", refusing_to_listen)
    nothing: Any = None
    with pytest.raises(ConfigError, match="127.0.0.1:1: in use"):
        await serve._run(given, nothing, nothing, nothing, nothing, nothing)


def refusing_to_listen(host: str, port: int) -> Any:
    raise OSError("in use")


async def test_a_length_of_nothing_is_refused(small: Any) -> None:
    config = LoaderConfig(dtype="float32", device_bytes=1 << 20, max_slots=1)
    base, settings = Base(small, None, frozenset()), ServerSettings(base="base")
    with pytest.raises(ConfigError, match="max_length"):
        async with assembled(base, config, settings, Capacity(length=0)):
            pass


@pytest.mark.needs("curl")
def test_the_two_lines_that_the_demo_ends_with(examples: Path) -> None:
    serving, asking = how_to_serve(examples)
    program, *words = shlex.split(serving)
    assert Path(program).is_file()
    assert words == ["serve", "--base", "smollm2", "--adapters", str(examples)]
    with served("--adapters", str(examples)) as (_, client):
        line = asking.replace("127.0.0.1:8000", f"{client.base_url.host}:{client.base_url.port}")
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert said.startswith("Arr")
