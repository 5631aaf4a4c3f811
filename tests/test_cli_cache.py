"""`lorax-async cache`: what people see of the disk cache, and what they can do to it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_inputs import CONFIG, begun, below, is_there, keep, put, stored
from disk_cache_world import DiskWorld, nothing_odd, opened

from command_line import output
from lorax_async.cli import main
from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey

pytestmark = pytest.mark.usefixtures("nothing_left")

Capture = pytest.CaptureFixture[str]
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


# -- ls -------------------------------------------------------------------------------------------


def test_where_there_is_none_it_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
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
    digest = {"kind": "transport", "value": hashlib.sha256(b"abc").hexdigest()}
    assert {"file": "adapter_model.safetensors", "bytes": 3, "digest": digest} in old["files"]

    held = world.cache.open(OTHER)
    assert held is not None
    os.truncate(world.entry(OLD) / "record.json", 3)
    assert cache(world, "ls") == 0
    held.close()
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line.split()[1:] for line in lines if line[1:2].isalnum()}
    whole = " ".join(by_name[NEW.name[:12]])
    assert whole == f"org/name {'b' * 11}… whole 24 B 1 min ago"
    assert by_name[OTHER.name[:12]][:3] == ["https://host.example/one/", "etags", "in"]
    assert by_name[OLD.name[:12]] == ["damaged", "24", "B", "8", "min", "ago"]
    assert ["partial", "5", "B", "0", "s", "ago"] in by_name.values()
    assert lines[-1] == f"{3 * SIZE + 5} B in {world.folder}"


# -- verify ---------------------------------------------------------------------------------------


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


# -- rm -------------------------------------------------------------------------------------------


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
def test_rm_removes_what_is_called_so(
    world: DiskWorld, capsys: Capture, name: str, gone: list[CacheKey]
) -> None:
    filled(world)
    assert cache(world, "rm", name, "--json") == 0
    found = output(capsys)
    assert {each["name"] for each in found["removed"]} == {key.name for key in gone}
    assert found["bytes"] == SIZE * len(gone)
    assert [key for key in (OLD, NEW, OTHER) if not is_there(world.cache, key)] == gone


def test_a_name_has_its_partial_downloads_too(world: DiskWorld, capsys: Capture) -> None:
    left(world, OLD)
    assert cache(world, "rm", OLD.name[:8]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"removed {OLD.name[:12]} (partial)",
        f"removed: 5 B from {world.folder}",
    ]
    assert not below(world.folder)


def test_rm_says_what_it_did_not_do(world: DiskWorld, capsys: Capture) -> None:
    filled(world)
    held = world.cache.open(OTHER)
    assert held is not None
    secret = "https://user:pa55@host.example/one"
    names = [OTHER.name, OLD.name, "org/absent", "0123", "abc", secret]
    assert cache(world, "rm", *names) == 1
    held.close()
    captured = capsys.readouterr()
    assert captured.err.splitlines()[:3] == [
        f"{OTHER.name[:12]} is in use, and stays",
        "nothing in the cache is called 'org/absent'",
        "nothing in the cache is called '0123'",
    ]
    assert "'abc' is no entry's name, and no id" in captured.err
    assert "pa55" not in captured.out + captured.err
    assert f"removed {OLD.name[:12]} (org/name)" in captured.out
    assert [is_there(world.cache, key) for key in (OTHER, OLD, NEW)] == [True, False, True]


def test_rm_does_not_choose(world: DiskWorld, capsys: Capture) -> None:
    first: dict[str, CacheKey] = {}
    for number in range(10_000):
        key = CacheKey("org/name", str(number))
        other = first.setdefault(key.name[:4], key)
        if other is not key:
            break
    for each in (key, other):
        keep(world.cache, each, b"abc")
    assert cache(world, "rm", key.name[:4]) == 1
    assert "begins several names" in capsys.readouterr().err
    assert is_there(world.cache, key)
    assert is_there(world.cache, other)


# -- gc -------------------------------------------------------------------------------------------


def test_gc_removes_partials_and_keeps_a_budget(world: DiskWorld, capsys: Capture) -> None:
    filled(world)
    left(world, CacheKey("org/half", "c"))
    assert cache(world, "gc", "--json") == 0
    removed = {"entries": 0, "partials": 1, "bytes": 5}
    assert output(capsys) == {"folder": str(world.folder), "removed": removed, "bytes": 3 * SIZE}
    assert cache(world, "gc", "--bytes", str(2 * SIZE)) == 0
    told = f"removed: {SIZE} B (entries: 1, partial downloads: 0); left: {2 * SIZE} B in"
    assert capsys.readouterr().out == f"{told} {world.folder}\n"
    assert [is_there(world.cache, key) for key in (OLD, OTHER, NEW)] == [False, True, True]


def test_gc_says_what_it_cannot_free(world: DiskWorld, capsys: Capture) -> None:
    held = stored(world.cache, OLD, b"abc")
    keep(world.cache, NEW, b"abc")
    assert cache(world, "gc", "--bytes", "1") == 1
    held.close()
    assert capsys.readouterr().err == f"{SIZE} B are in use, and more than 1 B\n"
    assert [is_there(world.cache, key) for key in (OLD, NEW)] == [True, False]


# -- folders that are no cache --------------------------------------------------------------------


def test_what_is_no_cache(world: DiskWorld, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert main(["cache", "ls", "--dir", str(tmp_path / "file")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    world.folder.chmod(0o777)
    assert cache(world, "ls") == 1
    world.folder.chmod(0o700)
    assert capsys.readouterr().err.startswith("ConfigError: others may write to")
