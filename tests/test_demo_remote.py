"""`lorax-async demo-remote`: layers over a slow link; its server, and its picture."""

from __future__ import annotations

import hashlib
import io
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import ADAPTERS, base, output
from lorax_async import layouts
from lorax_async.cli import main
from lorax_async.commands.demo_remote import COLUMNS, RATE, picture, run_remote_demo, smollm2_layout
from lorax_async.commands.slow_server import Link, SlowServer
from lorax_async.commands.terminal import Screen
from lorax_async.core.layout import Module

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left")

Capture = pytest.CaptureFixture[str]
DATA = bytes(range(256)) * 100


def test_layers_come_one_after_the_other(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["demo-remote", "--json", "--adapters", str(ADAPTERS)]) == 0
    result = output(capsys)
    assert [row["name"] for row in result["adapters"]] == ["pirate", "shout", "json"]
    for row in result["adapters"]:
        assert (row["state"], row["error"]) == ("resident", None)
        times = row["layers_ms"]
        assert len(times) == len(row["layers"]) == (15 if row["name"] == "json" else 30)
        assert times == sorted(times)
        weights = (ADAPTERS / row["name"] / "adapter_model.safetensors").read_bytes()
        assert row["checked"] == {"kind": "sha256", "digest": hashlib.sha256(weights).hexdigest()}
        assert row["first_layer_ms"] == times[0] < times[-1] <= row["resident_ms"]
    files = [path for path in ADAPTERS.glob("*/adapter_*") if path.suffix != ".md"]
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    # A link lets nothing through faster than its rate.
    longest = max(row["resident_ms"] for row in result["adapters"])
    assert longest > result["bytes"] / RATE * 1e3
    assert not list(tmp_path.iterdir()), "the cache is gone"


def test_a_person_sees_a_picture() -> None:
    out, err = io.StringIO(), io.StringIO()
    from lorax_async.commands.demo_remote import _show

    _show(run_remote_demo(ADAPTERS, Screen(out, err), rate=50e6), Screen(out, err))
    lines = out.getvalue().splitlines()
    for name in ("pirate", "shout", "json"):
        rows = [line for line in lines if line.split()[:1] == [name]]
        assert len(rows) == 2
        drawn = rows[1].split()[1]
        assert len(drawn) == COLUMNS
        assert drawn.lstrip("·") == "".join(sorted(drawn.lstrip("·"))), "layers stay"
    assert "50 MB/s for all three" in out.getvalue()
    assert err.getvalue() == ""


def test_without_the_adapters_it_says_where_they_belong(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo-remote", "--adapters", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert text.startswith("ConfigError: ")
    assert "--adapters" in text


def test_a_picture_by_hand() -> None:
    # Column 25 of 50 ends at 0.5, column 37 at 0.74, column 38 at 0.76.
    drawn = "·" * 24 + "▄" * 13 + "▆" * 12 + "█"
    assert picture([0.5, 0.5, 0.75, 1.0], 1.0) == drawn
    assert picture([0.0] * 3, 2.0) == "█" * COLUMNS


def test_the_shapes_are_the_bases(tmp_path: Path) -> None:
    """As transformers builds it from the model's config."""
    real = layouts.from_pretrained(base(tmp_path / "base"))
    ours = smollm2_layout()
    assert {_shape(module) for module in ours.modules} == {
        _shape(module) for module in real.modules if ".layers." in module.name
    }
    assert (ours.num_layers, ours.dtype) == (real.num_layers, real.dtype)
    assert replace(real, modules=ours.modules) == ours


def _shape(module: Module) -> tuple[object, ...]:
    return module.name, module.in_features, module.out_features, module.layer, module.parallel


# -- the server -----------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[SlowServer]:
    with SlowServer({"/a/file": DATA}, 1e9) as server:
        yield server


def ask(server: SlowServer, target: str, **fields: str) -> tuple[int, dict[str, str], bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(server.url("a") + target, headers=fields)
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_it_serves_ranges_with_the_digest_of_all(server: SlowServer) -> None:
    status, fields, body = ask(server, "file")
    assert (status, body) == (200, DATA)
    digest = b64encode(hashlib.sha256(DATA).digest()).decode()
    assert fields["Repr-Digest"] == f"sha-256=:{digest}:"
    status, part, body = ask(server, "file", Range="bytes=10-19")
    assert (status, body) == (206, DATA[10:20])
    assert part["Content-Range"] == f"bytes 10-19/{len(DATA)}"
    assert part["ETag"] == fields["ETag"]
    assert ask(server, "file", Range="bytes=25590-99999")[2] == DATA[-10:]


def test_it_serves_nothing_else(server: SlowServer) -> None:
    assert ask(server, "other")[::2] == (404, b"")
    assert ask(server, "../a/file")[::2] == (404, b"")
    assert ask(server, "file", Range="bytes=25600-25601")[::2] == (416, b"")
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.settimeout(20)
        client.sendall(b"POST /a/file HTTP/1.1\r\n\r\n")
        assert b" 501 " in client.recv(1000)


def test_a_link_is_shared() -> None:
    link = Link(1e5)
    began = time.monotonic()
    threads = [threading.Thread(target=link.wait, args=(5_000,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began >= 0.2


def test_who_leaves_in_the_middle_stops_nothing() -> None:
    with SlowServer({"/a/file": DATA}, 1e3) as server:
        place = ("127.0.0.1", server.server_port)
        client = socket.create_connection(place, timeout=20)
        client.sendall(b"GET /a/file HTTP/1.1\r\n\r\n")
        assert client.recv(10) == b"HTTP/1.1 2"
        client.close()
    assert not [each for each in threading.enumerate() if "slow-server" in each.name]
