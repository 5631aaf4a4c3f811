"""The command line and adapters from elsewhere: `fetch`, the disk cache; `load` and `inspect` by id."""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import tiny
from command_line import ADAPTERS, base, output
from disk_cache_world import CONFIG, DiskWorld, begun, is_there, keep, nothing_odd, opened, put
from fault_server import Asked, Client, FaultServer
from hub_stand_in import HubStandIn, sha256
from huggingface_hub import close_session

from lorax_async import AdapterRef, StoreConfig, UsageError
from lorax_async.cache.base import CacheKey
from lorax_async.cli import main
from lorax_async.cli.cache_commands import AT_ONCE, FetchRow, fetch_all
from lorax_async.cli.command_line import as_allow, as_folder_or_id, base_folder, loader_settings
from lorax_async.cli.load import create_loads
from lorax_async.formats.peft_names import WEIGHTS_FILE
from lorax_async.ids import Allow, parse_ref

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Fetch = Callable[..., int]
TOKEN = "hf_AbcDefGhi5ecre7"

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def files_of(folders: Mapping[str, Path]) -> dict[str, bytes]:
    """By target, of folders by theirs."""
    return {
        f"/{where}/{name}": data
        for where, folder in folders.items()
        for name, data in contents(folder).items()
    }


def right(files: Mapping[str, bytes]) -> Callable[[Asked, Client], None]:
    """What a good server of these files answers."""

    def behave(asked: Asked, client: Client) -> None:
        data = files.get(asked.target)
        if data is None:
            client.head("404 Not Found", "Content-Length: 0")
        else:
            etag = f'"{hashlib.md5(data).hexdigest()}"'
            FaultServer(data, etag=etag).right(asked, client)

    return behave


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[FaultServer]:
    with FaultServer(b"", right(files)) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "adapter", rank=64)


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Into a cache of the test's own."""
    return lambda *arguments: main(["fetch", *arguments, "--cache-dir", str(tmp_path / "cache")])


def at(hub: HubStandIn) -> list[str]:
    """Options for a hub on loopback, whose large files lie at another port."""
    return ["--hub-endpoint", hub.endpoint, "--allow", f"http://{hub.store_netloc}/"]


def test_from_the_hub(folder: Path, fetch: Fetch, tmp_path: Path, capsys: Capture) -> None:
    with HubStandIn() as hub:
        commit = hub.put("org/name", contents(folder))
        assert fetch("org/name", "--json", *at(hub)) == 0
        (row,) = output(capsys)["adapters"]
        begun = len(hub.asked)
        assert fetch("org/name", "--json", *at(hub)) == 0
        (again,) = output(capsys)["adapters"]
        assert all(asked.method == "HEAD" for asked in hub.asked[begun:])
    assert (row["id"], row["source"], row["state"]) == ("org/name", "hub", "fetched")
    assert (row["version"], row["error"]) == (commit, None)
    weights = contents(folder)["adapter_model.safetensors"]
    assert row["digest"] == {"kind": "sha256", "value": sha256(weights)}
    assert row["bytes"] == sum(map(len, contents(folder).values()))
    assert row["seconds"] > 0
    assert Path(row["place"]).parent == tmp_path / "cache" / "entries"
    assert contents(Path(row["place"])) == contents(folder)
    assert again["state"] == "here already"
    assert [again[name] for name in ("place", "digest")] == [row["place"], row["digest"]]


@pytest.mark.usefixtures("hub_client")
def test_a_base_by_its_hub_id(folder: Path, capsys: Capture) -> None:
    """Commands need its config alone; a server gets its weights, and no other formats of them."""
    config = {"model_type": "llama", "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 4, "head_dim": 16, "intermediate_size": 64}
    files = {"config.json": json.dumps(config | {"dtype": "float32"}).encode()}
    files |= {"model.safetensors": b"weights", "pytorch_model.bin": b"", "tokenizer.json": b"{}"}
    with HubStandIn() as hub:
        hub.put("org/base", files)
        options = [str(folder), "--json", "--hub-endpoint", hub.endpoint]
        assert main(["inspect", *options, "--base", "org/base"]) == 0
        assert main(["load", *options, "--base", "org/base@main"]) == 0
        assert not hub.asked_for("GET", "model.safetensors")
        capsys.readouterr()
        assert main(["load", *options, "--base", "org/none"]) == 1
        assert "no 'org/none' without a token" in capsys.readouterr().err
        base = base_folder("org/base", lambda _: None, endpoint=hub.endpoint)
        assert {path.name for path in base.iterdir()} == files.keys() - {"pytorch_model.bin"}
    assert base_folder("org/base", lambda _: None, endpoint=hub.endpoint, offline=True) == base
    close_session()  # that of huggingface_hub


def test_some_come_and_one_fails(folder: Path, fetch: Fetch, capsys: Capture) -> None:
    with serving(files_of({"one": folder, "two": folder})) as server:
        urls = [server.url(f"/{name}/") for name in ("one", "none", "two")]
        assert fetch(urls[0], urls[0].removesuffix("/")) == 0
        captured = capsys.readouterr()
        assert fetch(*urls, "--json") == 1
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 5, "one adapter by two spellings is one"
    assert lines[0] == f"{urls[0]}: fetched"
    assert lines[2] == f"  digest  transport {sha256(contents(folder)[NAMES[1]])}"
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["adapters"]
    assert [row["state"] for row in rows] == ["here already", "failed", "fetched"]
    assert rows[1]["error"]["type"] == "AdapterNotFoundError"
    assert (rows[1]["place"], rows[1]["digest"]) == (None, None)
    assert captured.err.startswith(f"AdapterNotFoundError: adapter '{urls[1]}'")


def test_two_revisions_of_one_id_are_refused(fetch: Fetch, capsys: Capture) -> None:
    assert fetch("org/name@v1", "--revision", "v2") == 1
    assert "name different revisions" in capsys.readouterr().err
    one, other = (as_folder_or_id(f"org/name@{revision}") for revision in ("v1", "v2"))
    with pytest.raises(UsageError, match="several revisions"):
        create_loads([one, other])
    assert [load.name for load in create_loads([one, one])] == ["org/name", "org/name"]
    paths = [Path("/one/sql"), Path("/two/sql"), Path("/three/chat")]
    assert [load.name for load in create_loads(paths)] == ["/one/sql", "/two/sql", "chat"]


def test_what_is_named_is_allowed_and_no_more(folder: Path, fetch: Fetch, capsys: Capture) -> None:
    files = files_of({"one": folder})
    with serving(files) as other, serving({}) as server:

        def elsewhere(asked: Asked, client: Client) -> None:
            client.head("302 Found", f"Location: {other.url(asked.target)}", "Content-Length: 0")

        server.behave = elsewhere
        url = server.url("/one/")
        assert fetch(url) == 1
        assert not other.asked
        assert "AccessDeniedError: " in capsys.readouterr().err
        assert fetch(url, "--allow", other.url("/two/")) == 1
        assert not other.asked
        assert fetch(url, "--allow", other.url("/one/")) == 0


def test_the_token_is_that_of_the_environment(
    folder: Path, fetch: Fetch, monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    with HubStandIn() as hub:
        commit = hub.put("org/name", contents(folder), private_token=TOKEN)
        assert fetch("org/name", *at(hub)) == 1
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert fetch("org/name", "--revision", commit, *at(hub)) == 0
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    for path in (tmp_path / "cache").rglob("*"):
        assert TOKEN not in path.name
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.slow
def test_ctrl_c_ends_a_fetch_which_can_be_begun_again(tmp_path: Path) -> None:
    files, stalled = files_of({"one": tiny.write(tmp_path / "adapter")}), threading.Event()

    def stalls(asked: Asked, client: Client) -> None:
        if not asked.target.endswith(NAMES[1]):
            right(files)(asked, client)
            return
        stalled.set()
        client.stall()

    with FaultServer(b"", stalls) as server:
        arguments = ["fetch", server.url("/one/"), "--cache-dir", str(tmp_path / "cache")]
        command = [sys.executable, "-m", "lorax_async", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                assert stalled.wait(60)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        assert (process.returncode, out, err.splitlines()[-1]) == (130, b"", b"interrupted")
        server.behave = right(files)
        assert main(arguments) == 0


async def test_a_few_at_a_time(tmp_path: Path) -> None:
    """Bytes are counted as they land; the last one fails, and shows how far it came."""
    names = [f"n{number}" for number in range(2 * AT_ONCE + 1)]
    folder, last = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", rank=128)
    files = files_of(dict.fromkeys(names, folder) | {names[-1]: last})
    gate, begun = threading.Event(), threading.Event()
    states, sizes, resolving = dict[int, str](), dict[int, tuple[int, int | None]](), list[int]()

    def show(number: int, _: str, done: int, total: int | None, state: str) -> None:
        """Nobody is answered before it has been seen twice who asks."""
        states[number], sizes[number] = state, (done, total)
        if number == len(names) - 1:
            resolving.append(list(states.values()).count("resolving"))
            if resolving[-2:] == [max(resolving)] * 2 and resolving[-1]:
                gate.set()
            if done:
                begun.set()

    def behave(asked: Asked, client: Client) -> None:
        assert gate.wait(30)
        rest = asked.target == f"/{names[-1]}/{NAMES[1]}" and asked.span and asked.span[0]
        right({} if rest and begun.wait(30) else files)(asked, client)

    with FaultServer(b"", behave) as server:
        allowed = (Allow("http", "127.0.0.1", server.port),)
        config = StoreConfig(cache_dir=tmp_path / "cache", allow=allowed)
        rows = [FetchRow(parse_ref(AdapterRef(server.url(f"/{name}/")))) for name in names]
        await fetch_all(config, rows, show)
    size = sum(map(len, contents(folder).values()))
    assert list(states.values()) == ["fetched"] * (len(names) - 1) + ["failed"]
    done, total = sizes.pop(len(names) - 1)
    assert 0 < done < (total or 0) == len(contents(last)[NAMES[1]])
    assert set(sizes.values()) == {(size, size)}
    assert len({row.as_json()["place"] for row in rows}) == len(names)
    assert max(resolving) == AT_ONCE


def test_load_takes_ids_and_folders(tmp_path: Path, capsys: Capture) -> None:
    with serving(files_of({"one": ADAPTERS / "pirate"})) as server:
        places = [server.url("/one/"), str(ADAPTERS / "json"), server.url("/none/")]
        options = ["--base", base(tmp_path / "base"), "--cache-dir", str(tmp_path / "cache")]
        assert main(["load", *places, *options, "--json"]) == 1
        assert main(["inspect", places[2]]) == 1
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["adapters"]
    assert [row["path"] for row in rows] == places
    assert [row["state"] for row in rows] == ["resident", "resident", "failed"]
    assert [row["name"] for row in rows] == [places[0], "json", places[2]]
    assert rows[0]["layers"] == list(range(30))
    assert 0 < rows[0]["first_layer_ms"] <= rows[0]["resident_ms"]
    assert rows[2]["error"]["type"] == "AdapterNotFoundError"
    assert "AdapterNotFoundError: " in captured.err
    assert len(list((tmp_path / "cache" / "entries").iterdir())) == 1


def test_inspect_asks_for_the_beginning_alone(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(ADAPTERS / "pirate"), "--json"]) == 0
    here = output(capsys)
    with HubStandIn() as hub:
        hub.put("org/name", contents(ADAPTERS / "pirate"))
        assert main(["inspect", "org/name", "--json", *at(hub)]) == 0
        there = output(capsys)
        asked = [each.fields["range"] for each in hub.asked if hub.is_at_store(each)]
    assert there == here | {"path": "org/name"}
    assert asked == ["bytes=0-262143"]


def test_inspect_refuses_weights_in_several_files(tmp_path: Path, capsys: Capture) -> None:
    """In a folder they are one of the problems; elsewhere nothing is there to inspect."""
    shutil.copytree(ADAPTERS / "json", folder := tmp_path / "split")
    (folder / WEIGHTS_FILE).rename(folder / f"{WEIGHTS_FILE}.index.json")
    assert main(["inspect", str(folder), "--json"]) == 2
    (problem,) = output(capsys)["problems"]
    assert problem["error"] == "UnsupportedAdapterError"
    assert "adapter_model.safetensors.index.json" in problem["text"]
    with serving({f"/split/{file.name}": file.read_bytes() for file in folder.iterdir()}) as server:
        assert main(["inspect", server.url("/split/"), "--json"]) == 1
    assert "adapter_model.safetensors.index.json" in capsys.readouterr().err


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert as_folder_or_id("org/name") == AdapterRef(Path("org/name"))
    assert (
        as_folder_or_id("org/other@v1")
        == parse_ref(AdapterRef("org/other@v1", use_token=True)).plain
    )
    for text in ("name", "./org/other", "org/other/more", "/org/other"):
        assert as_folder_or_id(text) == AdapterRef(Path(text))
    assert as_folder_or_id("S3://bucket/a").id == "s3://bucket/a/"
    with pytest.raises(argparse.ArgumentTypeError, match="password"):
        as_folder_or_id("https://me:secret@host.example/a")


def test_what_is_named_is_what_is_allowed() -> None:
    texts = {
        "org/name": Allow("hub", prefix="org/name/"),
        "org/name@refs/pr/1": Allow("hub", prefix="org/name/", pull_requests=True),
        "s3://bucket/a": Allow("s3", "bucket", prefix="a/"),
        "az://container/a/b": Allow("az", "container", prefix="a/b/"),
        "https://host.example/a": Allow("https", "host.example", prefix="a/", private=True),
        "http://localhost:8080/a": Allow("http", "localhost", 8080, "a/"),
        "http://127.0.0.1/a": Allow("http", "127.0.0.1", prefix="a/"),
        "http://[::1]:81/a": Allow("http", "::1", 81, "a/"),
    }
    more = as_allow("https://cdn.example")
    arguments = argparse.Namespace(allow=[more], hub_endpoint=None, cache_dir="x", other=1)
    settings = loader_settings(arguments, [as_folder_or_id(text) for text in [*texts, "."]])
    assert settings == {"allow": (*texts.values(), more), "cache_dir": "x"}
    assert more == Allow("https", "cdn.example", private=True)


OLD, NEW = CacheKey("org/name", "a" * 40), CacheKey("org/name", "b" * 40)
OTHER = CacheKey("https://host.example/one/", "etags")
SIZE = 3 + len(CONFIG)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")


def cache(world: DiskWorld, *arguments: str) -> int:
    return main(["cache", *arguments, "--dir", str(world.folder)])


def filled(world: DiskWorld) -> None:
    """Three entries of 3 bytes, OLD used the longest ago."""
    for seconds, key in ((500, OLD), (300, OTHER), (100, NEW)):
        keep(world.cache, key, b"abc")
        at = time.time() - seconds
        os.utime(world.entry(key), (at, at))


def left(world: DiskWorld, key: CacheKey) -> None:
    download = begun(world.cache, key)
    put(download.file(WEIGHTS_FILE, 5), b"abcde", [(0, 2)])
    download.close()


def test_no_cache_is_made_by_looking(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """By default it is the loader's; a folder of something else is left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for command in ("ls", "verify", "gc"):
        assert main(["cache", command]) == 0
        assert capsys.readouterr() == (f"there is no cache in {tmp_path}/lorax-async\n", "")
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis").mkdir()
    assert main(["cache", "ls", "--json", "--dir", str(tmp_path)]) == 0
    assert output(capsys) == {"folder": str(tmp_path), "entries": [], "bytes": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_ls_shows_what_is_there(world: DiskWorld, capsys: Capture) -> None:
    filled(world)
    left(world, CacheKey("org/half", "c"))
    assert cache(world, "ls", "--json") == 0
    found = output(capsys)
    assert (found["folder"], found["bytes"]) == (str(world.folder), 3 * SIZE + 5)
    partial, new, other, old = found["entries"]
    assert (partial["partial"], partial["state"], partial["adapter"]) == (True, "partial", None)
    assert [each["name"] for each in (new, other, old)] == [NEW.name, OTHER.name, OLD.name]
    assert (old["adapter"], old["version"], old["bytes"]) == ("org/name", "a" * 40, SIZE)
    assert old["age_s"] >= 500 > other["age_s"]
    digest = {"kind": "transport", "value": sha256(b"abc")}
    assert {"file": "adapter_model.safetensors", "bytes": 3, "digest": digest} in old["files"]

    held = world.cache.open(OTHER)
    assert held is not None
    os.truncate(world.entry(OLD) / "record.json", 3)
    assert cache(world, "ls") == 0
    held.close()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    used = ["whole", "24", "B", "1", "min", "ago"]
    assert [NEW.name[:12], "org/name", "b" * 11 + "…", *used] in lines
    assert [OTHER.name[:12], OTHER.source, "etags", "in"] in [line[:4] for line in lines]
    assert [OLD.name[:12], *["damaged", "24", "B", "8", "min", "ago"]] in lines
    assert ["partial", "5", "B", "0", "s", "ago"] in [line[1:] for line in lines]


def test_verify_finds_what_is_damaged(world: DiskWorld, capsys: Capture) -> None:
    filled(world)
    assert cache(world, "verify") == 0
    assert capsys.readouterr() == (f"entries: 3 hashed, 0 damaged, in {world.folder}\n", "")
    world.alter(OTHER, WEIGHTS_FILE, b"abd")
    assert cache(world, "verify", "--json") == 1
    out, err = capsys.readouterr()
    problems = {each["name"]: each["problem"] for each in json.loads(out)["entries"]}
    assert [problems[key.name] for key in (OLD, NEW)] == [None, None]
    assert "digest" in problems[OTHER.name]
    assert err.startswith(f"entry {OTHER.name[:12]} (https://host.example/one/) was removed")
    assert err.count("\n") == 1
    assert [is_there(world.cache, key) for key in (OTHER, OLD)] == [False, True]


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        (OTHER.name, [OTHER]),
        (OTHER.name[:6], [OTHER]),
        ("org/name", [OLD, NEW]),
        (f"org/name@{'b' * 40}", [NEW]),
        ("HTTPS://host.example:443/one", [OTHER]),
    ],
)
def test_rm_by_name(world: DiskWorld, capsys: Capture, name: str, gone: list[CacheKey]) -> None:
    filled(world)
    assert cache(world, "rm", name, "--json") == 0
    found = output(capsys)
    assert {each["name"] for each in found["removed"]} == {key.name for key in gone}
    assert found["bytes"] == SIZE * len(gone)
    assert [key for key in (OLD, NEW, OTHER) if not is_there(world.cache, key)] == gone


def test_rm_says_what_it_did_and_what_not(world: DiskWorld, capsys: Capture) -> None:
    filled(world)
    partial = CacheKey("org/half", "c")
    left(world, partial)
    held = world.cache.open(OTHER)
    assert held is not None
    secret = "https://user:pa55@host.example/one"
    names = [OTHER.name, OLD.name, partial.name[:8], "org/absent", "0123", "abc", secret]
    assert cache(world, "rm", *names) == 1
    held.close()
    out, err = capsys.readouterr()
    absent = [f"no entry in the cache matches '{name}'" for name in ("org/absent", "0123")]
    assert err.splitlines()[:3] == [f"{OTHER.name[:12]} is in use and was kept", *absent]
    assert "'abc' is neither an entry's name nor an id" in err
    assert "pa55" not in out + err
    assert f"removed {OLD.name[:12]} (org/name)" in out
    assert f"removed {partial.name[:12]} (partial)" in out
    assert [is_there(world.cache, key) for key in (OTHER, OLD, NEW)] == [True, False, True]


def test_rm_does_not_choose(world: DiskWorld, capsys: Capture) -> None:
    known: dict[str, CacheKey] = {}
    keys = (CacheKey("org/name", str(number)) for number in count())
    key = next(each for each in keys if known.setdefault(each.name[:4], each) is not each)
    for each in (key, known[key.name[:4]]):
        keep(world.cache, each, b"abc")
    assert cache(world, "rm", key.name[:4]) == 1
    assert "is a prefix of several names" in capsys.readouterr().err
    assert is_there(world.cache, key)


def test_gc_removes_partials_and_keeps_a_budget(world: DiskWorld, capsys: Capture) -> None:
    filled(world)
    left(world, CacheKey("org/half", "c"))
    assert cache(world, "gc", "--json") == 0
    removed = {"entries": 0, "partials": 1, "bytes": 5}
    assert output(capsys) == {"folder": str(world.folder), "removed": removed, "bytes": 3 * SIZE}
    assert cache(world, "gc", "--bytes", str(2 * SIZE)) == 0
    told = f"removed: {SIZE} B (entries: 1, partial downloads: 0); left: {2 * SIZE} B in"
    assert capsys.readouterr().out == f"{told} {world.folder}\n"
    held = world.cache.open(OTHER)
    assert held is not None
    assert cache(world, "gc", "--bytes", "1") == 1
    held.close()
    assert capsys.readouterr().err == f"{SIZE} B are in use, over the budget of 1 B\n"
    assert [is_there(world.cache, key) for key in (OLD, OTHER, NEW)] == [False, True, False]


def test_what_is_no_cache(world: DiskWorld, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert main(["cache", "ls", "--dir", str(tmp_path / "file")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert world.cache.budget.used() == 0
    world.folder.chmod(0o777)
    assert cache(world, "ls") == 1
    world.folder.chmod(0o700)
    assert capsys.readouterr().err.startswith("ConfigError: others may write to")
