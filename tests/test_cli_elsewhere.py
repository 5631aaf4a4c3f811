"""`lorax-async load` and `inspect` of adapters that are not on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn

import split_files
from command_line import ADAPTERS, adapter, base, output, query
from lorax_async.adapter import AdapterRef
from lorax_async.cli import main
from lorax_async.commands.measure import loads_of
from lorax_async.commands.places import as_allow, as_place, settings_of
from lorax_async.config import Allow
from lorax_async.errors import UsageError
from lorax_async.ids.parsing import parsed
from served import contents, files_of, serving

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

Capture = pytest.CaptureFixture[str]


def test_load_takes_ids_and_folders(tmp_path: Path, capsys: Capture) -> None:
    with serving(files_of({"one": ADAPTERS / "pirate"})) as server:
        places = [server.url("/one/"), str(ADAPTERS / "json"), server.url("/none/")]
        options = ["--base", base(tmp_path / "base"), "--cache-dir", str(tmp_path / "cache")]
        assert main(["load", *places, *options, "--json"]) == 1
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["adapters"]
    assert [row["path"] for row in rows] == places
    assert [row["state"] for row in rows] == ["resident", "resident", "failed"]
    assert [row["name"] for row in rows] == [places[0], "json", places[2]]
    assert rows[0]["layers"] == list(range(30))
    assert 0 < rows[0]["first_layer_ms"] <= rows[0]["resident_ms"]
    assert rows[2]["error"]["type"] == "AdapterNotFoundError"
    assert len(list((tmp_path / "cache" / "entries").iterdir())) == 1


def test_inspect_asks_for_the_beginning_alone(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(ADAPTERS / "pirate"), "--json"]) == 0
    here = output(capsys)
    with HubStandIn() as hub:
        hub.put("org/name", contents(ADAPTERS / "pirate"))
        options = ["--hub-endpoint", hub.endpoint, "--allow", f"http://{hub.store_netloc}/"]
        assert main(["inspect", "org/name", "--json", *options]) == 0
        there = output(capsys)
        asked = [each.fields["range"] for each in hub.asked if each.at_store]
    assert there == here | {"path": "org/name"}
    assert asked == ["bytes=0-262143"]


def test_inspect_of_several_files_and_of_faults(tmp_path: Path, capsys: Capture) -> None:
    split = split_files.split(ADAPTERS / "json", tmp_path / "split")
    refused = Path(adapter(tmp_path / "refused", query(0), use_bdlora={}))
    there = files_of({"refused": refused})
    there |= {f"/split/{file.name}": file.read_bytes() for file in split.iterdir()}
    with serving(there) as server:
        assert main(["inspect", server.url("/split/"), "--json"]) == 0
        found = output(capsys)
        assert main(["inspect", str(split), "--json"]) == 0
        local = output(capsys)
        assert found == local | {"path": server.url("/split/")}
        assert main(["inspect", server.url("/refused/"), "--json"]) == 2
        assert [each["error"] for each in output(capsys)["problems"]] == ["UnsupportedAdapterError"]
        assert main(["inspect", server.url("/none/")]) == 1
    assert capsys.readouterr().err.startswith("AdapterNotFoundError: ")


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert as_place("org/name") == AdapterRef(Path("org/name"))
    assert as_place("org/other@v1") == parsed(AdapterRef("org/other@v1", use_token=True))
    for text in ("name", "./org/other", "org/other/more", "/org/other"):
        assert as_place(text) == AdapterRef(Path(text))
    assert as_place("S3://bucket/a").id == "s3://bucket/a/"
    with pytest.raises(argparse.ArgumentTypeError, match="password"):
        as_place("https://me:secret@host.example/a")


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
    settings = settings_of(arguments, [as_place(text) for text in [*texts, "."]])
    assert settings == {"allow": (*texts.values(), more), "cache_dir": "x"}
    assert more == Allow("https", "cdn.example", private=True)


def test_several_revisions_of_one_are_not_loaded_at_once() -> None:
    one, other = (as_place(f"org/name@{revision}") for revision in ("v1", "v2"))
    with pytest.raises(UsageError, match="several revisions"):
        loads_of([one, other])
    assert [load.name for load in loads_of([one, one])] == ["org/name", "org/name"]
