"""Storing in the standard hub cache: every call fails in turn, and a kill comes after every one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from counted_calls import CHANGES, LOOKS, Calls, failing
from disk_cache_world import open_below
from hub_cache_world import KEY, contents, hub_cache, stored, tree
from hub_world import ADAPTER, REPO
from huggingface_hub import scan_cache_dir, snapshot_download

from lorax_async.errors import CapacityError, FetchError, LoraxError

pytestmark = [pytest.mark.usefixtures("hub_client", "nothing_left"), pytest.mark.slow]

HERE = Path(__file__).parent
PATHS = [HERE, HERE.parent, HERE.parent / "http", HERE.parent.parent, HERE.parent.parent.parent]
LINKS = ("symlink", "replace", "fchmod", "readlink")
FULL = ("mkdir", "pwritev", "write", "posix_fallocate", "fsync", "symlink", "replace")


def fetched(folder: Path) -> None:
    with hub_cache(folder, write=True) as cache:
        cache.note_revision(REPO, "main", KEY.version)
        entry = cache.open(KEY, check=True) or stored(cache)
        assert contents(entry) == ADAPTER


def is_as_the_library_has_it(folder: Path) -> None:
    inventory = scan_cache_dir(folder)
    assert inventory.warnings == []
    assert not inventory.incomplete_files
    assert [each.refs for repo in inventory.repos for each in repo.revisions] == [{"main"}]
    place = Path(snapshot_download(REPO, cache_dir=folder, local_files_only=True))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == ADAPTER


@pytest.mark.parametrize(
    ("code", "names"),
    [(errno.EIO, CHANGES + LOOKS + LINKS), (errno.ENOSPC, FULL), (errno.EMFILE, ("open", "dup"))],
    ids=["EIO", "ENOSPC", "EMFILE"],
)
def test_whatever_call_fails_the_next_fetch_is_right(
    tmp_path: Path, code: int, names: tuple[str, ...]
) -> None:
    calls = Calls(names)
    with calls.counted():
        fetched(tmp_path / "first")
    is_as_the_library_has_it(tmp_path / "first")
    right = tree(tmp_path / "first")
    failed = 0
    for at, call in enumerate(calls.made, 1):
        folder = tmp_path / str(at)
        with failing(names, at, code).counted():
            try:
                fetched(folder)
            except LoraxError as error:
                failed += 1
                full = code == errno.ENOSPC and isinstance(error, CapacityError)
                assert full or isinstance(error, FetchError) or "cannot be opened" in str(error), (
                    at,
                    call,
                )
        assert open_below(folder) == [], (at, call)
        fetched(folder)
        assert tree(folder) == right, (at, call)
        is_as_the_library_has_it(folder)
    assert failed > len(calls.made) // 2


def test_killed_after_any_call_a_second_process_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "hub_cache_killed.py", tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    outcomes = json.loads(done.stdout)
    assert {"pwritev", "fsync", "fchmod", "replace", "symlink", "unlink"} <= {
        outcome["call"] for outcome in outcomes
    }
    assert [outcome["whole"] for outcome in outcomes] == sorted(o["whole"] for o in outcomes)
    for number, outcome in enumerate(outcomes, 1):
        assert outcome["second"] == 0, outcome
        if outcome["whole"]:
            assert outcome["brought"] == [], "it was there already"
        is_as_the_library_has_it(tmp_path / str(number))
        place = f".locks/lorax-async-{os.geteuid()}"
        undone = tuple(f"{place}/{kind}/" for kind in ("partials", "locks", "trash"))
        assert not any(name.startswith(undone) for name in outcome["left"]), outcome
    assert not outcomes[-1]["brought"]
