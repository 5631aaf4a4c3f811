"""`lorax-async fetch`: adapters onto the disk, from wherever they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_server import Asked, Client, until
from hub_stand_in import HubStandIn, sha256
from safetensors.torch import save_file

import tiny
from command_line import on_a_terminal, output, read_until
from lorax_async.cli import main
from lorax_async.core.chunk_map import CHUNK_BYTES
from lorax_async.io.remote.fetch import COMPARED_BYTES
from served import NAMES, contents, etag, files_of, right, serving

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

Capture = pytest.CaptureFixture[str]
TOKEN = "hf_AbcDefGhi5ecre7"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "adapter", rank=64)


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., int]:
    """Into a cache of the test's own."""
    return lambda *arguments: main(["fetch", *arguments, "--cache-dir", str(tmp_path / "cache")])


def at(hub: HubStandIn) -> list[str]:
    """Options for a hub on loopback, whose large files lie at another port."""
    return ["--hub-endpoint", hub.endpoint, "--allow", f"http://{hub.store_netloc}/"]


def test_from_the_hub(
    folder: Path, fetch: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
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
    assert {name: (Path(row["place"]) / name).read_bytes() for name in NAMES} == contents(folder)
    assert again["state"] == "here already"
    assert [again[name] for name in ("place", "digest")] == [row["place"], row["digest"]]


def test_a_person_reads_what_came(folder: Path, fetch: Callable[..., int], capsys: Capture) -> None:
    with serving(files_of({"one": folder})) as server:
        url = server.url("/one/")
        assert fetch(url, url.removesuffix("/")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 5, "one adapter by two spellings is one"
    weights = contents(folder)["adapter_model.safetensors"]
    assert lines[0] == f"{url}: fetched"
    assert lines[1].startswith("  from     http, version ")
    assert lines[2] == f"  digest   transport {sha256(weights)}"
    assert lines[3].startswith("  size     194.0 KiB in ")


def test_one_that_fails_does_not_stop_the_others(
    folder: Path, fetch: Callable[..., int], capsys: Capture
) -> None:
    with serving(files_of({"one": folder, "two": folder})) as server:
        urls = [server.url(f"/{name}/") for name in ("one", "none", "two")]
        assert fetch(*urls, "--json") == 1
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["adapters"]
    assert [row["state"] for row in rows] == ["fetched", "failed", "fetched"]
    assert rows[1]["error"]["type"] == "AdapterNotFoundError"
    assert (rows[1]["place"], rows[1]["digest"]) == (None, None)
    assert captured.err.startswith(f"AdapterNotFoundError: adapter '{urls[1]}'")


def test_what_is_named_is_allowed_and_no_more(
    folder: Path, fetch: Callable[..., int], capsys: Capture
) -> None:
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


def test_into_the_standard_hub_cache(
    folder: Path, fetch: Callable[..., int], hub_client: Path, capsys: Capture
) -> None:
    from huggingface_hub import snapshot_download

    with HubStandIn() as hub:
        hub.put("org/name", contents(folder), "v1")
        assert fetch("org/name@v1", "--hub-cache", "write", "--json", *at(hub)) == 0
    (row,) = output(capsys)["adapters"]
    place = snapshot_download(
        "org/name", revision="v1", cache_dir=hub_client, local_files_only=True
    )
    assert row["place"] == place
    assert (Path(place) / NAMES[1]).read_bytes() == contents(folder)[NAMES[1]]


def test_the_token_is_that_of_the_environment(
    folder: Path,
    fetch: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Capture,
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


# -- Ctrl-C ---------------------------------------------------------------------------------------


def large(folder: Path) -> Path:
    """An adapter of several chunks."""
    folder.mkdir()
    (folder / NAMES[0]).write_text("{}")
    values = torch.arange(5 * CHUNK_BYTES // 4, dtype=torch.int32).view(torch.float32)
    save_file({"values": values}, folder / NAMES[1])
    return folder


def test_ctrl_c_leaves_what_the_next_one_goes_on_with(tmp_path: Path, capsys: Capture) -> None:
    files = files_of({"one": large(tmp_path / "adapter")})
    weights = files[f"/one/{NAMES[1]}"]
    cache = tmp_path / "cache"
    with serving(files) as server:

        def stalls(asked: Asked, client: Client) -> None:
            """Three chunks come, and then no more."""
            start, stop = asked.span or (0, 0)
            if stop <= 3 * CHUNK_BYTES:
                right(files)(asked, client)
                return
            client.part(start, stop, len(weights), f"ETag: {etag(weights)}")
            client.stall()

        server.behave = stalls
        arguments = ["fetch", server.url("/one/"), "--cache-dir", str(cache)]
        process = subprocess.Popen(
            [sys.executable, "-m", "lorax_async", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            until(lambda: landed(cache) >= 2, 60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, out, err) == (130, b"", b"interrupted\n")
        assert not list((cache / "entries").iterdir())
        assert main(["cache", "ls", "--json", "--dir", str(cache)]) == 0
        (left,) = output(capsys)["entries"]
        assert (left["state"], left["partial"]) == ("partial", True)

        server.behave = right(files)
        server.asked.clear()
        assert main([*arguments, "--json"]) == 0
    (row,) = output(capsys)["adapters"]
    assert (Path(row["place"]) / NAMES[1]).read_bytes() == weights
    later = [span[0] for span in server.spans if span is not None and span[0] > 0]
    assert later
    # Without a digest, the last of what is here comes once more, to be compared.
    assert min(later) >= 2 * CHUNK_BYTES - COMPARED_BYTES, "what is here is not asked for again"


def landed(cache: Path) -> int:
    """Whole chunks that a partial download's maps tell of."""
    maps = cache.glob("partials/*/adapter_model.safetensors.chunks")
    return sum(bits.bit_count() for path in maps for bits in path.read_bytes()[-1:])


def test_a_terminal_gets_bars(tmp_path: Path, folder: Path) -> None:
    with serving(files_of({"one": folder})) as server:
        arguments = ["fetch", server.url("/one/"), "--cache-dir", str(tmp_path / "cache")]
        process, terminal = on_a_terminal(arguments)
        text = read_until(terminal).decode()
        os.close(terminal)
    assert process.wait(60) == 0
    assert "━" in text
    assert "fetched" in text


# -- wrong usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: ID"),
        (["./adapter"], "is a local folder"),
        (["name"], "'name': it is neither org/name"),
        (["ftp://host/x"], "there is no such source"),
        ([f"https://me:{TOKEN}@host.example/x"], "no user name and no password"),
        (["org/name", "--allow", f"https://host.example/x?key={TOKEN}"], "no '?'"),
        (["org/name", "--allow", "s3://bucket/x"], "a URL is http(s)://host"),
        (["org/name", "--hub-cache", "maybe"], "invalid choice"),
        (["org/name", "--cache-bytes", "1TB"], "is no size"),
        (["org/name", "--token", "secret"], "unrecognized arguments"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fetch", *arguments])
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert TOKEN not in text


def test_two_revisions_of_one_id_are_refused(fetch: Callable[..., int], capsys: Capture) -> None:
    assert fetch("org/name@v1", "--revision", "v2") == 1
    assert "give one" in capsys.readouterr().err


def test_help_says_where_tokens_come_from(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fetch", "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "HF_TOKEN" in text
    assert "No token is taken on the command line" in text
