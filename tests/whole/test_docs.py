"""What the documents show runs: examples, commands and their options; the embedding example."""

import ast
import asyncio
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple, Self

import pytest
import safetensors.torch
from fault_server import until as until_in_thread
from httpx2 import ASGITransport, AsyncClient
from hub_stand_in import HubStandIn
from peft_adapters import PEFT_WARNING, save
from server_world import llama_config, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from user_loads import at, contents
from web_servers import free_port

import lorax_async
from lorax_async import AdapterLoader, AdapterScheduler, LoaderConfig, layouts
from lorax_async.cli import main
from lorax_async.cli.serve import serve_commands
from lorax_async.server.service import ServedModel

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of the small models in the pages."""


BLOCK = re.compile(
    r"^( *)```(?P<language>python|console)\n(?P<code>.*?)^ *```$(?P<output>\n(?:\n+ {4}[^\n]+)*)",
    re.DOTALL | re.MULTILINE,
)
"""A program or commands, and what they print: an indented block right below."""


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


class Session:
    """Runs the programs of a page in their order, with the same names, as `IPython does."""

    def __init__(self, page: Path, capsys: Capture) -> None:
        self.page, self.names = page, dict[str, Any]()
        self._blocks = iter([it for it in blocks(page) if it.language == "python"])
        self._capsys = capsys
        self._runner = asyncio.Runner()
        self.run = self._runner.run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if "loader" in self.names:
            self.run(self.names["loader"].close())
        self._runner.close()

    def skip(self) -> Block:
        return next(self._blocks)

    def play(self) -> str:
        """Run the next program; return what it printed."""
        block = self.skip()
        source = "\n" * (block.line + 1) + textwrap.dedent(
            block.code
        )  # errors have the page's lines
        code = compile(source, str(self.page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            self.run(eval(code, self.names))
        else:
            exec(code, self.names)
        printed = self._capsys.readouterr().out
        assert not block.output.strip() or printed.split() == block.output.split()
        return printed

    def play_all(self) -> list[str]:
        printed = []
        while True:
            try:
                printed.append(self.play())
            except StopIteration:
                return printed


Opening = Callable[[Path], Session]


@pytest.fixture
def session(capsys: Capture) -> Iterator[Opening]:
    with ExitStack() as opened:
        yield lambda page: opened.enter_context(Session(page, capsys))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder with the clone's examples, in which the pages' programs run."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("nothing_left", "clone")
def test_the_readmes_program_prints_what_stands_below_it(session: Opening) -> None:
    (printed,) = session(README).play_all()
    assert printed


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left", "clone")
def test_the_programs_about_loading_run(session: Opening) -> None:
    page = session(DOCS / "loading.md")
    batch = page.play()
    assert page.skip().code.strip() in (ROOT / "examples" / "fifty_on_eight.py").read_text()
    _, room, files = page.play_all()
    shape, base, pirate, shout = batch.splitlines()
    assert shape == "torch.Size([8, 576])"
    assert [text.startswith("Arr") for text in (base, pirate)] == [False, True]
    assert [text.isupper() for text in (base, shout)] == [False, True]
    assert [line.split()[:2] for line in room.splitlines() if "sql" in line] == [
        ["./sql", "device"]
    ]
    assert "adapters/sql" in files


PRINTED = {
    "own_engine": [
        rf"{way}: as PEFT computes it: True" for way in ("by modules", "by tables", "streamed")
    ],
    "training_loop": [rf"step {n}: loss \d\.\d\d, another version: True" for n in range(3)]
    + ["as PEFT computes it: True", "the old handle kept its version: True"],
    "fifty_on_eight": ["100 answers, 50 adapters, 8 slots", r"evictions: \d+"],
    "prometheus": [r"lorax_moved_bytes_total 921600\.0"],
    "tensor_parallel": [rf"rank {n}: A \(4, 576\), B \(288, 4\)" for n in range(2)]
    + ["as on one device: True"],
    "slow_link": [
        *(
            rf"{name:6}  ·*[▁▂▃▄▅▆▇█]+  \d+ to \d+ ms, sha256"
            for name in ("pirate", "shout", "json")
        ),
        r"layers that are ready; a column is \d+ ms; the link has 1\.4 MB/s",
    ],
    "scheduler": [r"(\d rows of .*\n)+tokens: 4 4 4"],
}
"""What the examples print, as patterns."""


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(name: str, capsys: Capture, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name])
    run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert re.fullmatch("\n".join(PRINTED[name]) + "\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("page", "example"),
    [("engine", "own_engine"), ("fastapi", "embed_fastapi"), ("training", "training_loop")],
)
def test_a_page_shows_an_example(page: str, example: str) -> None:
    """In its order and as it is, so that what runs is what is read; and what it prints."""
    code, end = (ROOT / "examples" / f"{example}.py").read_text(), 0
    for block in blocks(DOCS / f"{page}.md"):
        if block.language == "python":
            end = code.index(block.code.strip(), end) + len(block.code.strip())
    shown = (DOCS / f"{page}.md").read_text()
    for line in PRINTED.get(example, ()):
        assert re.search(f"^    {line}$", shown, re.MULTILINE)


@pytest.mark.usefixtures("nothing_left", "clone")
@pytest.mark.parametrize("name", ["merging", "metrics", "tracing"])
def test_the_programs_of_a_page_run(session: Opening, name: str, clone: Path) -> None:
    assert session(DOCS / f"{name}.md").play_all()
    if name == "tracing":
        assert json.loads((clone / "load.json").read_text())["traceEvents"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch, hub_client: Path) -> Iterator[dict[str, str]]:
    """A stand-in for the hub, which new stores ask; the commits of its adapters, by name."""
    del hub_client
    variant = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    folder = save(LlamaForCausalLM(LlamaConfig(**SIZES)), variant, tmp_path / "adapter")
    with HubStandIn() as stand_in:
        names = ("org/sql-adapter", "org/chat", "org/json")
        yielded = {name: stand_in.put(name, contents(folder)) for name in names}
        given: Any = {"hub_endpoint": stand_in.endpoint, "allow": (at(stand_in.store_netloc),)}
        given |= {"hub_cache": "off", "cache_dir": tmp_path / "cache"}
        monkeypatch.setattr(lorax_async, "StoreConfig", partial(lorax_async.StoreConfig, **given))
        yield yielded


@pytest.mark.usefixtures("nothing_left", "clone")
def test_the_programs_about_sources_run(session: Opening, hub: dict[str, str], clone: Path) -> None:
    page = session(DOCS / "sources.md")
    *_, printed = page.play_all()
    trained, folder = page.names["trained"], clone / "large-adapter"
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    joined = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert joined.keys() == trained.keys()
    assert all(joined[name].equal(tensor) for name, tensor in trained.items())
    assert hub["org/sql-adapter"] in printed
    assert all(f"{name} " in printed for name in hub)


def test_the_programs_of_a_fleet_import_what_they_use(tmp_path: Path) -> None:
    """Running them takes Ray, and what a fleet has."""
    programs = [block.code for block in blocks(DOCS / "fleet.md") if block.language == "python"]
    for code in programs:
        compile(code, "fleet.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        (tmp_path / "program.py").write_text(code)
        ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823"]
        command = [*ruff, str(tmp_path / "program.py")]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    assert len(programs) == 4


@pytest.mark.usefixtures("nothing_left", "clone")
def test_the_programs_about_batches_run(session: Opening, tmp_path: Path) -> None:
    """One request with `serve`; the layer by layer ones are in tests/engines/test_layer_gate.py."""
    page = session(DOCS / "scheduler.md")
    page.play_all()
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    folder = save(model, {"r": 4, "target_modules": ["q_proj"]}, tmp_path / "adapter")

    async def play() -> None:
        layout, config = layouts.from_module(model), LoaderConfig(max_slots=2, device_bytes="8MiB")
        async with AdapterLoader(layout, config) as loader, AdapterScheduler(loader) as scheduler:
            serving = asyncio.create_task(page.names["serve"](scheduler, lambda _: set()))
            assert await page.names["answer"](scheduler, folder, 7) == 32
            serving.cancel()

    page.run(play())


@pytest.mark.usefixtures("nothing_left", "clone")
def test_a_server_is_made_from_its_parts(session: Opening) -> None:
    page = session(DOCS / "server.md")
    page.skip()  # the tutorial's server answers it
    page.play_all()
    model: Any = LlamaForCausalLM(llama_config())
    base = ServedModel(model.eval(), tokenizer(), frozenset())

    async def play() -> None:
        listener = page.names["listen"]("127.0.0.1", 0)
        port = listener.getsockname()[1]
        serving = asyncio.create_task(page.names["main"](base, listener))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"GET /v1/models/pirate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        response = asyncio.create_task(reader.readline())
        await asyncio.wait([response, serving], return_when=asyncio.FIRST_COMPLETED)
        assert not serving.done()
        assert b" 200 " in await response
        writer.close()
        serving.cancel()
        await asyncio.wait([serving])

    page.run(play())


def test_the_reference_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^::: lorax_async\.(\w+)$", page, re.MULTILINE))
    whole = {"events", "errors"} & documented  # modules with all that is in them
    of_modules = {name for module in whole for name in vars(getattr(lorax_async, module))}
    assert set(lorax_async.__all__) <= documented | of_modules


NOT_RUN = {
    r"(\.venv/bin/)?(pip (un)?install|python3 -m venv)": "a network",
    r"make ": "what the tests run in",
    r"lorax-async fetch org/": "the hub",
    r"(export LORAX_API_KEY|docker|curl \S+ -H \"Auth)": "Docker: see tests/server/test_container.py",
    r"(export|vllm|python -m vllm|sglang|curl localhost:)": "vLLM or SGLang: `make vllm` and `make sglang` run them",
}
"""Commands that are not run, and what they need. All others stand in blocks of `console`."""

PROGRAMS = "export|pip|python3?|make|docker|curl|vllm|sglang|uvicorn|lorax-async"
COMMAND = re.compile(rf"^ {{4}}((?:\$ )?(?:\.venv/bin/)?(?:{PROGRAMS}) .*)", re.MULTILINE)
FENCE = re.compile(r"^( *)```.*?^ *```$(?:\n+ {4}[^\n]+)*", re.DOTALL | re.MULTILINE)
PAGES = [README, *sorted(DOCS.glob("*.md"))]
PLANS, TUTORIAL = DOCS / "capacity.md", DOCS / "tutorial.md"
SHOWN = [page for page in PAGES if any(block.language == "console" for block in blocks(page))]


def test_a_command_is_run_or_needs_what_is_not_here() -> None:
    for page in PAGES:
        for command in COMMAND.findall(FENCE.sub("", page.read_text())):
            assert any(re.match(known, command) for known in NOT_RUN), f"{page.name}: {command}"


@contextmanager
def served(command: str, env: dict[str, str], output: Path) -> Iterator[str]:
    """A server in the background; yields what it said until it took requests."""
    with output.open("w") as file:
        process = subprocess.Popen(
            f"exec {command}", shell=True, env=env, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        ready = re.compile(r"(at|on) http://")
        until_in_thread(lambda: process.poll() is not None or ready.search(output.read_text()), 120)
        assert process.poll() is None, output.read_text()
        yield output.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


Run = Callable[[str], str]


@contextmanager
def shell(folder: Path, port: int) -> Iterator[Run]:
    """Run a page's commands. A server runs at `port`, until the next one or the end."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    caches = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    home = {"HOME": str(folder), "XDG_CACHE_HOME": caches}
    env = {**os.environ, **home, "PATH": programs, "OMP_WAIT_POLICY": "passive"}
    with ExitStack() as server:

        def run(command: str) -> str:
            command = command.replace("8000", str(port))
            if re.search(r"lorax-async serve |^uvicorn ", command):
                server.close()
                command += "" if "--port" in command else f" --port {port}"
                printed = server.enter_context(served(command, env, folder / "printed"))
            else:
                done = subprocess.run(
                    command, shell=True, env=env, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stderr
                printed = done.stdout
            return printed.replace(str(port), "8000")

        yield run


def play(block: Block, run: Run) -> list[str]:
    """Run the commands of a block; return what each printed."""
    printed = [run(command) for command in commands(block)]
    found = [line.split() for line in printed[-1].splitlines()]
    promised = [line.split() for line in block.output.splitlines() if "…" not in line]
    assert all(words in found for words in promised if words), printed[-1]
    return printed


@pytest.fixture
def shelled(clone: Path) -> Path:
    """A clone with its environment, benchmarks and a base of the pages."""
    (clone / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (clone / "benchmarks").symlink_to(ROOT / "benchmarks")
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336}
    llama |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    (clone / "llama-3-8b").mkdir()
    config = json.dumps(llama | {"vocab_size": 128256, "dtype": "bfloat16"})
    (clone / "llama-3-8b" / "config.json").write_text(config)
    return clone


def commands(block: Block) -> list[str]:
    return [line.removeprefix("$ ") for line in block.code.replace("\\\n", " ").splitlines()]


def test_the_demo_ends_with_commands_of_the_server_s_page() -> None:
    page = [block for block in blocks(DOCS / "server.md") if block.language == "console"]
    shown = [shlex.split(command) for block in page for command in commands(block)]
    serving, asking = map(shlex.split, serve_commands(Path("examples/adapters")))
    assert Path(serving[0]).is_file()
    assert ["lorax-async", *serving[1:]] in shown
    assert [asking[0], "-s", *asking[1:]] in shown


@pytest.mark.slow
@pytest.mark.needs("curl")
@pytest.mark.timeout(900)  # of README: seven programs that import torch, and a benchmark
@pytest.mark.parametrize(
    "page", [p for p in SHOWN if p not in {PLANS, TUTORIAL}], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_run(page: Path, shelled: Path) -> None:
    with shell(shelled, free_port()) as run:
        for block in blocks(page):
            if block.language == "console":
                play(block, run)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(block, marks=pytest.mark.soak if "1000000" in block.code else pytest.mark.slow)
        for block in blocks(PLANS)
    ],
    ids=lambda block: block.line,
)  # fmt: skip
def test_a_plan_is_what_the_page_shows(plan: Block, shelled: Path) -> None:
    with shell(shelled, 8000) as run:
        play(plan, run)


@pytest.mark.slow
@pytest.mark.needs("curl")
def test_the_tutorial_leads_to_a_server_with_ten_adapters(shelled: Path, capsys: Capture) -> None:
    port = free_port()
    printed: list[str] = []
    scope: dict[str, Any] = {}
    with shell(shelled, port) as run:
        for block in blocks(TUTORIAL):
            if block.language == "console":
                printed += play(block, run)
            else:
                exec(block.code.replace("8000", str(port)), scope)
        capsys.readouterr()
        client = next(
            block.code for block in blocks(DOCS / "server.md") if block.language == "python"
        )
        exec(client.replace("8000", str(port)).replace("shout", "pirate-10"), {})
        assert capsys.readouterr().out.startswith("Arr")
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
    assert {"inspect", "load", "fetch", "serve", "plan", "timeline"} <= named
    options = set()
    for command in named:
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0
        options |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= options


@pytest.mark.slow
def test_a_server_embeds_the_loader() -> None:
    app = run_path(str(ROOT / "examples" / "embed_fastapi.py"))["smollm2_with_examples"]()

    async def main() -> None:
        transport = ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            AsyncClient(transport=transport, base_url="http://x", trust_env=False) as client,
        ):
            names = ("pirate", "shout", "absent", "../../.git", "\x00")
            queries = ({"adapter": name, "prompt": "What is ice?"} for name in names)
            gets = (client.get("/answer", params=query, timeout=None) for query in queries)
            pirate, shout, *refused = await asyncio.gather(*gets)
            leases = [place.leases for place in app.state.loader.placement().adapters.values()]
        assert pirate.status_code == shout.status_code == 200
        assert pirate.json()["answer"].startswith("Arr")
        assert shout.json()["answer"].isupper()
        assert [(each.status_code, each.json()["error"]) for each in refused] == [
            (404, "AdapterNotFoundError"),
            (403, "AccessDeniedError"),
            (400, "InvalidAdapterIdError"),
        ]
        assert not any("retry-after" in each.headers for each in refused)
        assert leases == [0, 0]

    asyncio.run(main())
