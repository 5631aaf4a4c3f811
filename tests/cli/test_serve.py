"""`lorax-async serve` as its operator meets it: its options, its files, a process, its signals."""

import argparse
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
import transformers
from fault_server import until
from hub_stand_in import HubStandIn
from huggingface_hub import close_session
from openai import DefaultHttpxClient, OpenAI
from peft_adapters import PEFT_WARNING, save
from safetensors.torch import load_file
from server_world import llama_config, tokenizer

from lorax_async.cli import main, serve
from lorax_async.cli.command_line import as_source, base_folder
from lorax_async.cli.serve import (
    ADMIN_TOKEN,
    find_adapters,
    request_sources,
    server_loader_settings,
)
from lorax_async.config import Limits, LoaderConfig, LocalRoot
from lorax_async.errors import ConfigError
from lorax_async.ids import Allow
from lorax_async.server.engine import Sampling
from lorax_async.server.service import ServedModel

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
TOKEN = "a-token"


@contextmanager
def served(*more: str) -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
    command = [sys.executable, "-m", "lorax_async", "serve", "--base", "smollm2", "--port", "0"]
    env, pipe = {**os.environ, ADMIN_TOKEN: TOKEN, "OMP_WAIT_POLICY": "passive"}, subprocess.PIPE
    process = subprocess.Popen([*command, "--json", *more], stdout=pipe, env=env, text=True)
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


ICE: Any = {"messages": [{"role": "user", "content": "What is ice?"}], "temperature": 0}


def answer(client: OpenAI, model: str) -> str:
    found = client.chat.completions.create(model=model, **ICE)
    return str(found.choices[0].message.content)


def on_device(client: OpenAI) -> set[str]:
    found = client.get("/adapters", cast_to=object)
    assert isinstance(found, dict)
    return {name for row in found["data"] if row["tier"] == "device" for name in row["names"]}


def listed(path: Path) -> set[str]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["adapters"] if path.exists() else []
    return {Path(row["path"]).name for row in rows}


@pytest.mark.slow
def test_killed_it_comes_back_with_the_adapters_that_it_had(examples: Path, tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    options = ("--adapters", str(examples), "--warm", str(warm))
    with served(*options) as (process, client):
        models = [model.id for model in client.models.list()]
        assert models == ["smollm2", "json", "pirate", "shout"]
        assert answer(client, "pirate").startswith("Arr")
        assert answer(client, "shout").isupper()
        until(lambda: listed(warm) == {"pirate", "shout"}, 60)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    with served(*options) as (process, client):
        until(lambda: on_device(client) == {"pirate", "shout"}, 60)
        chunks = iter(client.chat.completions.create(model="pirate", stream=True, **ICE))
        text = [next(chunks).choices[0].delta.content or ""]
        process.send_signal(signal.SIGTERM)
        text += [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(text).endswith("matey!"), "what is under way is finished"
        assert process.wait(30) == 0
    assert listed(warm) == {"pirate", "shout"}


def test_adapters_have_names(tmp_path: Path) -> None:
    one = tiny.write(tmp_path / "one")
    two = tiny.write(tmp_path / "all" / "two")
    (tmp_path / "all" / "no adapter").mkdir()
    hub, web = "org/sql@v1", "https://files.example/loras/chat/"
    given = [str(one), f"another={one}", str(tmp_path / "all"), hub, web, f"mine={hub}"]
    found = find_adapters(given)
    ids = {name: getattr(adapter, "id", adapter) for name, adapter in found.items()}
    others = {"sql": "org/sql", "chat": web, "mine": "org/sql"}
    assert ids == {"one": one, "another": one, "two": two} | others


def test_adapters_that_have_no_name_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "below" / "deep" / "one")
    none = (["{0}/../.."], "is not an adapter, and contains none")
    two, no_place = (
        (["{0}", "{0}"], "two adapters are named 'one'"),
        (["x=ftp://host/a"], "--adapters"),
    )
    for given, said in (none, two, no_place):
        with pytest.raises(ConfigError, match=said):
            find_adapters([text.format(folder) for text in given])


def test_sources_are_places_that_requests_may_name(tmp_path: Path) -> None:
    https, s3 = "https://files.example/loras/", "s3://bucket/loras/"
    given = [as_source(text) for text in (str(tmp_path), https, s3)]
    immutable = [LocalRoot(tmp_path, immutable=True)]
    arguments = argparse.Namespace(source=given, immutable_root=immutable)
    found = server_loader_settings(arguments, [])
    assert found["local_roots"] == (tmp_path, *immutable)
    web = Allow("https", "files.example", prefix="loras/", private=True)
    places = (web, Allow("s3", "bucket", prefix="loras/"))
    assert request_sources(arguments) == places
    assert set(found["allow"]) == {*places, Allow("hub")}, "the operator may name all of the hub"


def test_options_that_are_none_are_refused(capsys: Capture) -> None:
    for text in ("hub:org", "no/such/folder", "ftp://host/"):
        with pytest.raises(argparse.ArgumentTypeError):
            as_source(text)
    for option in (
        "--immutable-root=no/such",
        "--timeout=0",
        "--timeout=nan",
        "--max-rank=0",
        "--host-bytes=-1",
        "--verify=x",
        "--max-slots=65537",
        *(f"--max-{name}=0" for name in ("slots", "sequences", "length", "share")),
    ):
        with pytest.raises(SystemExit):
            main(["serve", "--base", "smollm2", option])
        assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err
    for port in ("65536", "-1", "x", "²", ""):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--base", "smollm2", f"--port={port}"])
        assert ended.value.code == 2
        assert "argument --port: " in capsys.readouterr().err


def test_what_lives_for_ever_is_not_looked_through_again_and_again(monkeypatch: Patch) -> None:
    for module, name in ((sys, "setswitchinterval"), (torch, "set_num_threads")):
        monkeypatch.setattr(module, name, lambda number: None)
    try:
        serve.tune_process()
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> Callable[..., str]:
    """Start a server with these options; returns the line that it ends with."""

    def start(*options: str) -> str:
        command = ["serve", "--base", str(tmp_path), "--port", "0", "--json", *options]
        assert main(command) == 1
        told = capsys.readouterr()
        assert told.out == ""
        line = told.err.splitlines()[-1]
        assert line.startswith("ConfigError: ")
        return line

    loaded = Mock(side_effect=AssertionError("the base model was loaded"))
    monkeypatch.setattr(ServedModel, "load", loaded)
    return start


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def _holds(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


NO_LISTS = (b"[]", b"{}", b'{"adapters": 5}', b'{"adapters": {}}')
NO_ROWS = [
    b'{"adapters": [%s]}' % row
    for row in (
        *(b"5", b'{"id": 1, "source": null}', b'{"id": "a/b", "source": 5, "revision": null}'),
        b'{"id": "a/b", "source": null, "revision": null, "use_token": 1}',
        *(b'{"source": null, "revision": null}', b'{"source": null, "revision": null, "id": null}'),
        b'{"id": "a/b", "source": null, "revision": null, "later": 1}',
    )
]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, r"cannot be read \(Is a directory\); delete it, or name another file"),
        (os.mkfifo, "cannot be read .*line 1 column 1.*; delete it"),
        (_socket, "cannot be read"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read .*; delete it"),
        (_large, "cannot be read .*; delete it"),
        (_holds(b'{"adapters": ['), "cannot be read .*line 1 column 15.*; delete it"),
        *((_holds(text), "cannot be read .*; delete it") for text in (b"", b"\x00")),
        (_holds(b"\xff\xfe{"), "can't decode byte.*; delete it"),
        (_holds(b"[" * 100_000), "maximum recursion depth.*; delete it"),
        *((_holds(content), "it has no list named adapters.*; delete it") for content in NO_LISTS),
        *((_holds(content), "cannot be read .*; delete it") for content in NO_ROWS),
    ],
)
def test_no_warm_list_is_left_alone(refused: Any, tmp_path: Path, make: Any, reason: str) -> None:
    path = tmp_path / "warm"
    make(path)

    def status() -> tuple[int, int, int, int]:
        """What changes if it is written to or replaced; reading changes its atime."""
        found = path.lstat()
        return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns

    before, found = status(), list[str]()
    start = threading.Thread(target=lambda: found.append(refused("--warm", str(path))))
    start.start()
    start.join(60)
    assert not start.is_alive(), "it waits for somebody to write"
    assert str(path) in found[0]
    assert re.search(reason, found[0]), found[0]
    assert status() == before


def test_missing_files_and_places_are_told(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = tiny.write(tmp_path / "all" / "whole")
    broken = tiny.write(tmp_path / "all" / "broken")
    (broken / "adapter_model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    pointer = tiny.write(tmp_path / "pointer")
    (pointer / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    for option, given, said in (
        ("--adapters", "{0}/missing", "there is no folder {0}/missing"),
        ("--adapters", "sql={0}/missing", "there is no folder {0}/missing"),
        ("--adapters", "sql={0}/empty", "{0}/empty: .*adapter_config.json"),
        ("--adapters", str(pointer), "{0}/pointer: .* is a Git LFS pointer"),
        *(("--adapters", text, "'' is not a folder or an id") for text in ("", "sql=")),
        ("--served-model-name", "", "the name of the base model"),
        ("--adapters", str(broken), "{0}/all/broken: .*adapter_model.safetensors"),
        ("--adapters", "{0}/all", "{0}/all/broken: .*adapter_model.safetensors"),
        ("--adapters", str(whole / "adapter_config.json"), "there is no folder"),
        ("--adapters", "all/whoel", "there is no folder all/whoel"),  # it could be on the hub
        ("--chat-template", "{0}/none", "{0}/none cannot be read"),
        ("--chat-template", "{0}/empty", "{0}/empty cannot be read"),
        ("--root-path", "llm", "root_path must be a path as /llm"),
        ("--warm", "{0}/none/warm", r"cannot be read \(No such file or directory\)"),
        ("--warm", "{0}/file/warm", r"cannot be read \(Not a directory\)"),
        ("--cache-dir", "{0}/file", "'{0}/file' is not a folder"),
        ("--host", "", "the host is empty"),
        ("--host", "a..b", "the host is not a valid name"),
    ):
        told = refused(option, given.format(tmp_path))
        assert re.search(said.format(tmp_path), told), told
    monkeypatch.setenv("LORAX_API_KEY", "")
    assert "LORAX_API_KEY is empty" in refused()
    monkeypatch.setenv("LORAX_API_KEY", "a-key")
    assert "api_keys" in refused("--api-key", "")
    monkeypatch.setenv(ADMIN_TOKEN, "a-key")
    told = refused()
    assert "a-key" not in told
    assert {"LORAX_API_KEY", ADMIN_TOKEN} <= {*re.findall("[A-Z_]+", told)}
    monkeypatch.delenv(ADMIN_TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = f"127.0.0.1:{port}: Address already in use; choose another --port, or 0 for a free"
        assert said in refused("--port", port)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model: Any = transformers.LlamaForCausalLM(llama_config())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _says(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _file(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def _only_config(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "the folder does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (_says(num_hidden_layers=2), "it lacks 9 weights"),
        (_says(vocab_size=100), ""),
        (_says(hidden_size="x"), ""),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), ""),
        (_file("model.safetensors", ""), ""),
        (_file("config.json", "[]"), ""),
        (_file("generation_config.json", '{"top_p": 5.0}'), ".*top_p"),
        (_file("generation_config.json", '{"eos_token_id": [[1]]}'), "eos_token_id"),
        (_file("tokenizer.json", "{}"), ""),
        (_only_config, "(?!.*safetensors).*tokenizer"),
        (_file("tokenizer_config.json", "[]"), ""),
    ],
)
def test_a_folder_of_no_base_is_told(whole: Path, tmp_path: Path, change: Any, said: str) -> None:
    """The tokenizer is read before the weights; transformers' own words are restored."""
    folder = tmp_path / "changed"
    shutil.copytree(whole, folder)
    change(folder)
    logging: Any = transformers.utils.logging
    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        with pytest.raises(ConfigError) as told:
            ServedModel.load(folder, dtype="float32", device="cpu")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before)
        if not shown:
            logging.disable_progress_bar()
    reason = str(told.value).replace(str(folder), "")
    assert re.match(rf" is not a base model that can be served: {said}", reason), reason
    assert "\n" not in reason


def test_a_base_is_loaded_onto_a_device_that_is_there(
    whole: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    base = ServedModel.load(whole, dtype="float32", device="cpu")
    assert base.max_length == 64
    assert not base.model.training
    assert base.sampling == Sampling()
    folder = shutil.copytree(whole, tmp_path / "with defaults")
    for said, top_k in ((7, 7), (-1, 0)):
        config = {"temperature": 0.3, "top_k": said}
        (folder / "generation_config.json").write_text(json.dumps(config))
        found = ServedModel.load(folder, dtype="float32", device="cpu").sampling
        assert found == Sampling(temperature=0.3, top_k=top_k)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no cuda device"):
        ServedModel.load(whole, dtype="float32", device="cuda")


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_adapters_have_a_quarter_of_what_is_free_at_most_what_slots_can_use(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    model: Any = transformers.LlamaForCausalLM(llama_config())
    largest = save(model, {"r": 64, "target_modules": "all-linear"}, tmp_path / "largest")
    nbytes = sum(each.nbytes for each in load_file(largest / "adapter_model.safetensors").values())
    limits = Limits(max_rank=64)  # a higher one, only one slot may have
    config = LoaderConfig(dtype="float32", max_slots=1000, limits=limits)
    for free in (8 << 20, 1 << 40):
        monkeypatch.setattr(serve, "free_bytes", lambda device, free=free: free)
        chosen = serve.choose_device_bytes(model, config)
        assert chosen == free // 4 if free < 1 << 30 else nbytes * 1000 <= chosen < free // 4
    monkeypatch.undo()
    memory = Path("/proc/meminfo").read_text()
    total = int(memory.split("MemTotal:")[1].split()[0]) << 10
    assert 0 < serve.free_bytes("cpu") < total


@pytest.mark.parametrize(
    ("groups", "limits", "free"),
    [
        ("0::/", {"": (600, 500, 300)}, 400),  # a container that has just read the base's files
        ("0::/", {"": ("max", 500, 300)}, 1000),
        ("0::/", {"": (600, 700, 0)}, 0),
        ("0::/system.slice/a:b", {"system.slice": (900, 100, 0), "system.slice/a:b": (600, 500, 0)}, 100),
        ("0::/system.slice/a", {"system.slice": (150, 100, 0), "system.slice/a": (600, 500, 0)}, 50),
        ("4:cpu:/\n3:memory:/docker/1", {"memory": (600, 500, 200)}, 300),
        ("3:cpu,memory:/a", {"memory": (2**53, 5, 2), "memory/a": (600, 500, 200)}, 300),
    ],
)  # fmt: skip
def test_free_memory_is_what_control_groups_leave_with_the_caches_that_give_way(
    tmp_path: Path, groups: str, limits: dict[str, Any], free: int
) -> None:
    """Files as the kernel writes them, of KiB: `limits` are limit, use and files by group."""
    first = "memory" in limits
    for group, (limit, used, files) in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
        for name, size in zip(names, (limit, used), strict=True):
            text = size if isinstance(size, str) else size << 10
            (folder / f"memory.{name}").write_text(f"{text}\n")
        total, half = "total_" if first else "", files << 9
        fields = f"anon 1\n{total}inactive_file {half}\n{total}active_file {half}\n"
        (folder / "memory.stat").write_text(fields)
    (tmp_path / "proc/self").mkdir(parents=True)
    with pytest.raises(ConfigError, match="give --device-bytes"):
        serve.free_bytes("cpu", tmp_path)
    memory = "MemTotal:  2000 kB\nMemAvailable:    1000 kB\nHugePages_Total:  0\n"
    (tmp_path / "proc/meminfo").write_text(memory)
    assert serve.free_bytes("cpu", tmp_path) == 1000 << 10
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    assert serve.free_bytes("cpu", tmp_path) == free << 10


@pytest.fixture
def until_ready(monkeypatch: Patch) -> None:
    """A server ends as soon as it is ready."""

    async def serve_nobody(service: object, listener: object, *, ready: Callable[[], None]) -> None:
        ready()

    monkeypatch.setattr(serve, "tune_process", lambda: None)
    monkeypatch.setattr("lorax_async.server.app.serve", serve_nobody)


@pytest.mark.usefixtures("hub_client", "until_ready")
def test_a_base_of_the_hub_is_served(whole: Path, capsys: Capture, monkeypatch: Patch) -> None:
    with HubStandIn() as hub:
        hub.put("org/base", {path.name: path.read_bytes() for path in whole.iterdir()})
        # huggingface_hub reads HF_ENDPOINT when it is imported.
        here = partial(base_folder, endpoint=hub.endpoint, offline=False)
        monkeypatch.setattr(serve, "base_folder", lambda base, report, **_: here(base, report))
        command = ["serve", "--port", "0", "--json", "--device-bytes", "1MiB", "--base"]
        assert main([*command, "org/base@main"]) == 0
        assert json.loads(capsys.readouterr().out)["models"] == ["base"]
        assert main([*command, "org/none"]) == 1
        assert "no 'org/none'" in capsys.readouterr().err
        assert main([*command, "./org/base"]) == 1
        assert "there is no folder ./org/base" in capsys.readouterr().err
    close_session()  # that of huggingface_hub


@pytest.mark.usefixtures("until_ready")
@pytest.mark.parametrize(
    ("options", "warned"),
    [([], False), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", "k"], False)],
)
def test_a_server_open_to_other_machines_is_warned_of(
    whole: Path, capsys: Capture, options: list[str], warned: bool
) -> None:
    assert main(["serve", "--base", str(whole), "--port", "0", "--json", *options]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["models"] == [whole.name]
    assert ("LORAX_API_KEY sets one" in told.err) is warned


def test_a_template_that_is_none_is_told(
    whole: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def start(running: Any) -> None:
        running.close()
        raise ConfigError("it would run")

    monkeypatch.setattr(serve, "tune_process", lambda: None)
    monkeypatch.setattr(serve, "run_on_uvloop", start)
    template = tmp_path / "template"
    options = ["--port", "0", "--json", "--chat-template", str(template)]
    for text, said in (
        ("{{ raise_exception('never') }}", "it would run"),  # it can be compiled
        ("\n{% for m in %}", f"{template}, line 2: "),
    ):
        template.write_text(text)
        assert main(["serve", "--base", str(whole), *options]) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
