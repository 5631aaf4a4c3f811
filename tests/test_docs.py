"""What the documents show runs: examples, commands and their options; the embedding example."""

import asyncio
import json
import os
import re
import textwrap
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from hub_stand_in import HubStandIn
from user_loads import at, contents

import lorax_kernels
import tiny
from lorax_async import AdapterStore, StoreConfig
from lorax_async.cli import main
from lorax_async.config import LocalRoot
from tiny_loaders import ONE, loader

Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^ *```python\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.usefixtures("nothing_left")
async def test_the_lines_about_room_run(tmp_path: Path, capsys: Capture) -> None:
    _, lines, *_ = python_blocks(README)
    scope: dict[str, Any] = {}
    exec("async def play(loader):\n" + textwrap.indent(lines, "    "), scope)
    for name in ("sql", "chat"):
        tiny.write(tmp_path / name)
    async with loader(local_roots=(LocalRoot(tmp_path, immutable=True),)) as there:
        await scope["play"](there)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sql" in line]
    file_bytes = os.path.getsize(tmp_path / "sql" / "adapter_model.safetensors")
    assert line.split()[1:] == ["device", str(ONE), str(file_bytes)]


@pytest.mark.usefixtures("nothing_left", "hub_client")
async def test_the_lines_about_files_run(tmp_path: Path, capsys: Capture) -> None:
    _, _, lines, _ = python_blocks(README)
    with HubStandIn() as hub:
        commit = hub.put("org/name", contents(tiny.write(tmp_path / "a")))
        given: Any = {"hub_endpoint": hub.endpoint, "allow": (at(hub.store_netloc),)}
        given |= {"hub_cache": "off", "cache_dir": tmp_path / "cache"}
        scope: dict[str, Any] = {"AdapterStore": AdapterStore}
        scope["StoreConfig"] = lambda: StoreConfig(**given)
        exec("async def play():\n" + textwrap.indent(lines, "    "), scope)
        await scope["play"]()
    assert commit in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_left")
async def test_the_lines_about_tensors_run(capsys: Capture) -> None:
    *_, lines = python_blocks(README)
    steps = iter((1, 2))
    scope: dict[str, Any] = {
        "model": SimpleNamespace(peft_config={"default": tiny.config()}),
        "get_peft_model_state_dict": lambda _: tiny.tensors(next(steps)),
    }
    exec("async def play(loader):\n" + textwrap.indent(lines, "    "), scope)
    async with loader() as there:
        await scope["play"](there)
    assert capsys.readouterr().out.splitlines() == ["policy 4", "True"]


@pytest.mark.usefixtures("nothing_left")
async def test_the_lines_about_kernels_run(tmp_path: Path) -> None:
    """Against the delta in float64, on the rows with an adapter; the others keep their bits."""
    (lines,) = python_blocks(DOCS / "adapters.md")
    folder, module = tiny.write(tmp_path / "a"), "model.layers.0.mlp.up_proj"
    assert module in lines
    async with loader() as there, there.load(folder) as handle:
        x, before = torch.randn(8, tiny.HIDDEN), torch.randn(8, 2 * tiny.HIDDEN)
        scope = {"Plan": lorax_kernels.Plan, "apply": lorax_kernels.apply, "torch": torch}
        scope |= {"loader": there, "handle": handle, "x": x, "y": (y := before.clone())}
        exec(textwrap.dedent(lines), scope)
        weights = handle.modules[module]
        delta = weights.scale * (x.double() @ weights.a.double().T) @ weights.b.double().T
        torch.testing.assert_close(y[:3].double(), (before + delta)[:3], atol=1e-5, rtol=1e-5)
        assert torch.equal(y[3:], before[3:])


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_the_readmes_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    example, *_ = python_blocks(README)
    monkeypatch.chdir(ROOT)
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    shape, base, pirate, shout = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([8, 576])"
    assert [text.startswith("Arr") for text in (base, pirate)] == [False, True]
    assert [text.isupper() for text in (base, shout)] == [False, True]


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
