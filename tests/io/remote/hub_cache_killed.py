"""Processes that store an adapter in the standard hub cache, killed after every call in turn.

Run as a script: one Python starts and imports, its children are forks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache_inputs import put
from cache_processes import KILLED, ended, fork
from counted_calls import CHANGES, Calls
from hub_cache_world import KEY, ROLES, contents, digest_of, tree
from hub_world import ADAPTER, REPO

from lorax_async.io.ports import Demand
from lorax_async.io.remote.hub_cache import HubCache
from lorax_async.io.remote.hub_download import HubDownload

STORING = (*CHANGES, "symlink", "replace", "fchmod")


def fetch(folder: Path, tell: Callable[[object], None]) -> None:
    """Have the adapter, and tell what had to be brought."""
    cache = HubCache(folder, str, write=True)
    cache.note_revision(REPO, "main", KEY.version)
    found = cache.begin(KEY, "", Demand())
    if isinstance(found, HubDownload):
        for name, content in ADAPTER.items():
            file = found.file(ROLES[name], len(content), digest_of(name, content))
            for gap in file.missing():
                put(file, content, [gap])
                tell(name)
        found = found.publish()
    assert contents(found) == ADAPTER
    assert cache.open(KEY, check=True) is not None
    cache.close()


def fetch_until(folder: Path, at: int, tell: Callable[[object], None]) -> None:
    calls = Calls(STORING)

    def kill(name: str) -> None:
        if len(calls.made) == at:
            tell({"call": name})
            os.kill(os.getpid(), signal.SIGKILL)

    calls.after = kill
    with calls.counted():
        fetch(folder, tell)


def main(base: Path) -> list[dict[str, Any]]:
    outcomes: list[dict[str, Any]] = []
    for at in range(1, 10_000):
        folder = base / str(at)
        code, told = ended(*fork(lambda tell, f=folder, n=at: fetch_until(f, n, tell)))  # type: ignore[misc]
        if code != KILLED:
            assert code == 0
            return outcomes
        # Nobody may take for an adapter what is not whole, other tools included.
        linked = {name.rpartition("/")[2] for name in tree(folder, "") if "/snapshots/" in name}
        assert "adapter_config.json" not in linked or linked.issuperset(ADAPTER)
        cache = HubCache(folder, str)
        left = cache.open(KEY, check=True)
        assert left is None or contents(left) == ADAPTER
        second, then = ended(*fork(lambda tell, f=folder: fetch(f, tell)))  # type: ignore[misc]
        outcomes.append(
            {
                "call": next(each["call"] for each in told if isinstance(each, dict)),
                "whole": left is not None,
                "second": second,
                "brought": then,
                "left": sorted(tree(folder, "")),
            }
        )
    raise AssertionError("it never ended")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
