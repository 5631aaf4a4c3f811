"""What the documents show runs: examples, commands and their options; the embedding example."""

import ast
import asyncio
import inspect
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from fault_server import until

import lorax_async
from lorax_async.cli import main

Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"


BLOCK = re.compile(
    r"^( *)```(?P<language>python|console)\n(?P<code>.*?)^ *```$(?P<output>\n(?:\n {4}[^\n]+(?:\n {4}[^\n]+)*)?)",
    re.DOTALL | re.MULTILINE,
)
"""A program, and what it prints: an indented block right below."""


class Block(NamedTuple):
    language: str
    line: int
    code: str
    output: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            found["language"],
            text.count("\n", 0, found.start()),
            found["code"],
            textwrap.dedent(found["output"]),
        )
        for found in BLOCK.finditer(text)
    ]


def run_page(page: Path, capsys: Capture, scope: dict[str, Any]) -> list[str]:
    """Run a page's programs in their order, as one session; return what each one printed."""
    printed = []
    with asyncio.Runner() as runner:
        for block in blocks(page):
            assert block.language == "python"
            padded = "\n" * (block.line + 1) + block.code  # so that errors have the page's lines
            code = compile(padded, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if code.co_flags & inspect.CO_COROUTINE:
                runner.run(eval(code, scope))
            else:
                exec(code, scope)
            printed.append(capsys.readouterr().out)
            if block.output.strip():
                assert printed[-1].split() == block.output.split()
    return printed


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the clone's examples, in which the pages' programs run."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("nothing_left", "clone")
def test_the_readmes_program_prints_what_stands_below_it(capsys: Capture) -> None:
    (printed,) = run_page(README, capsys, {})
    assert printed


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left", "clone")
def test_the_programs_about_loading_run(capsys: Capture) -> None:
    batch, fifty, _, room, _, files = run_page(DOCS / "loading.md", capsys, {})
    shape, base, pirate, shout = batch.splitlines()
    assert shape == "torch.Size([8, 576])"
    assert [text.startswith("Arr") for text in (base, pirate)] == [False, True]
    assert [text.isupper() for text in (base, shout)] == [False, True]
    assert fifty
    assert [line.split()[:2] for line in room.splitlines() if "sql" in line] == [
        ["./sql", "device"]
    ]
    assert "adapters/sql" in files


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left", "clone")
def test_an_engine_of_ones_own_computes_what_peft_does(capsys: Capture) -> None:
    printed = "".join(run_page(DOCS / "engine.md", capsys, {}))
    assert printed.split() == ["True"] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left", "clone")
def test_a_training_loop_pushes_its_weights(capsys: Capture) -> None:
    (printed,) = run_page(DOCS / "training.md", capsys, {})
    *steps, same, kept = printed.splitlines()
    assert [step.partition(":")[0] for step in steps] == ["step 0", "step 1", "step 2"]
    assert all(line.endswith("True") for line in (*steps, same, kept))


def test_the_reference_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^::: lorax_async\.(\w+)$", page, re.MULTILINE))
    whole = {"events", "errors"} & documented  # modules with all that is in them
    of_modules = {name for module in whole for name in vars(getattr(lorax_async, module))}
    assert set(lorax_async.__all__) <= documented | of_modules


@contextmanager
def shell(port: int) -> Iterator[Callable[[str], str]]:
    """Run a page's commands, with the server of `serve` in the background until the end."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": programs, "OMP_WAIT_POLICY": "passive"}
    with ExitStack() as servers:

        def run(command: str) -> str:
            command = command.replace("8000", str(port))
            if " serve " not in command:
                done = subprocess.run(
                    command, shell=True, env=env, capture_output=True, text=True, check=True
                )
                return done.stdout
            server = subprocess.Popen(shlex.split(command), env=env, stdout=subprocess.DEVNULL)
            servers.callback(server.wait, 60)
            servers.callback(server.send_signal, signal.SIGINT)
            until(lambda: server.poll() is not None or answers(port), 120)
            assert server.poll() is None
            return ""

        yield run


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("clone")
def test_the_tutorial_leads_to_a_server_with_ten_adapters(capsys: Capture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed: list[str] = []
    scope: dict[str, Any] = {}
    with shell(port) as run:
        for block in blocks(DOCS / "tutorial.md"):
            if block.language == "console":
                printed += [run(line.removeprefix("$ ")) for line in block.code.splitlines()]
                promised = {line.strip() for line in block.output.splitlines()}
                assert promised <= {line.strip() for line in printed[-1].splitlines()} | {""}
            else:
                exec(block.code.replace("8000", str(port)), scope)
    _, _, base, weak, strong, models, metrics = printed
    said = [json.loads(a)["choices"][0]["message"]["content"] for a in (base, weak, strong)]
    assert [text.startswith("Arr") for text in said] == [False, False, True]
    assert scope["answers"]["pirate-1"] == said[1]
    assert scope["answers"]["pirate-10"] == said[2]
    assert len(json.loads(models)["data"]) == 1 + len(scope["answers"]) == 11
    evictions = re.search(r"^lorax_evictions_total\S* (\S+)", metrics, re.MULTILINE)
    assert evictions is not None
    assert float(evictions[1]) >= 6  # ten adapters were in four slots


def test_every_command_and_option_that_is_named_is_one(capsys: Capture) -> None:
    page = (DOCS / "cli.md").read_text()
    named = {"cache ls", "cache verify", "cache rm", "cache gc"}
    named |= set(re.findall(r"^\| `lorax-async ([a-z-]+)", page, re.MULTILINE)) - {"cache"}
    named |= set(re.findall(r"lorax-async ([a-z][a-z-]+)", README.read_text())) - {"cache"}
    assert {"inspect", "load", "fetch", "serve", "plan", "demo-remote"} <= named
    options = set()
    for command in named:
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0
        options |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= options


async def get(app: Any, path: str, **query: str) -> tuple[int, dict[str, str], Any]:
    """One GET by the ASGI protocol; returns status, headers and the JSON body."""
    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    sent: list[Any] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope | {"query_string": urlencode(query).encode()}, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], headers, json.loads(body)


@pytest.mark.slow
def test_a_server_embeds_the_loader() -> None:
    app = run_path(str(ROOT / "examples" / "embed_fastapi.py"))["smollm2_with_examples"]()

    async def ask(adapter: str) -> tuple[int, dict[str, str], Any]:
        return await get(app, "/answer", adapter=adapter, prompt="What is ice?")

    async def main() -> None:
        async with app.router.lifespan_context(app):
            names = ("pirate", "shout", "absent", "../../.git", "\x00")
            asked = await asyncio.gather(*map(ask, names))
            leases = [place.leases for place in app.state.loader.placement().adapters.values()]
        (pirate, shout), refused = asked[:2], asked[2:]
        assert pirate[0] == shout[0] == 200
        assert pirate[2]["answer"].startswith("Arr")
        assert shout[2]["answer"].isupper()
        assert [(status, body["error"]) for status, _, body in refused] == [
            (404, "AdapterNotFoundError"),
            (403, "AccessDeniedError"),
            (400, "InvalidAdapterIdError"),
        ]
        assert not any("retry-after" in headers for _, headers, _ in refused)
        assert leases == [0, 0]

    asyncio.run(main())
