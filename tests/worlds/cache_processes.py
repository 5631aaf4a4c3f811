"""Disk caches in processes that are killed. As a script: forks them, and reports in JSON."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing import Pipe, get_context
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from counted_calls import CHANGES, Calls
from disk_cache_world import (
    CONFIG,
    KEY,
    NBYTES,
    begin,
    begun,
    below,
    content_of,
    is_there,
    keep,
    key,
    nothing_odd,
    opened,
    put,
    read_back,
    sha256,
    weights,
)

from lorax_async.cache.disk_cache import DiskDownload, gc, verify
from lorax_async.cache.entries import DiskEntry
from lorax_async.errors import CapacityError
from lorax_async.formats.peft_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.formats.spans import SpanSet

SMALL = 1_000_000

Tell = Callable[[object], None]

CONTENT = weights()
ALL = [(0, NBYTES)]
SPANS = [(400_000, 900_000), (10, 300_000), (NBYTES - 9, NBYTES), (0, 10), (300_000, 400_000)]
SPANS += [(900_000, NBYTES - 9)]


def fork(main: Callable[..., None], *given: Any) -> tuple[int | None, list[Any]]:
    """Run `main` in a forked process; return its exit and what it reported."""
    reading, writing = Pipe(duplex=False)
    child = get_context("fork").Process(target=main, args=(*given, writing.send))
    child.start()
    writing.close()
    told: list[Any] = []
    with reading, suppress(EOFError):
        while True:
            told.append(reading.recv())
    child.join()
    while child.exitcode is None:  # another thread that starts one is just asking how it ended
        time.sleep(0.001)
    return child.exitcode, told


def fetch(folder: Path, tell: Tell) -> None:
    """Fetch the adapter, and report each span that was missing."""
    with opened(folder) as world:
        found = begin(world.cache, KEY)
        if isinstance(found, DiskDownload):
            config = found.file(CONFIG_FILE, len(CONFIG))
            file = found.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
            for start, stop in SPANS:
                for gap in SpanSet(SpanSet(file.missing()).missing(0, NBYTES)).missing(start, stop):
                    put(file, CONTENT, [gap])
                    tell(gap)
                file.hash_along()
            put(config, CONFIG, config.missing())
            found = found.publish()
        assert (content_of(found), content_of(found, CONFIG_FILE)) == (CONTENT, CONFIG)
        found.close()


def fetch_until(folder: Path, at: int, tell: Tell) -> None:
    calls = Calls(CHANGES)

    def kill(name: str) -> None:
        if len(calls.made) == at:
            tell({"killed after": name})
            os.kill(os.getpid(), signal.SIGKILL)

    calls.after = kill
    with calls.counted():
        fetch(folder, tell)


def kills(base: Path) -> list[dict[str, Any]]:
    """Kill a process after each of its calls that change files; let a second one continue."""
    outcomes: list[dict[str, Any]] = []
    for at in range(1, 10_000):
        folder = base / str(at)
        code, told = fork(fetch_until, folder, at)
        if code != -signal.SIGKILL:
            assert code == 0
            return outcomes
        second, then = fork(fetch, folder)
        nothing_odd(folder)
        outcomes.append(
            {
                "call": next(each["killed after"] for each in told if isinstance(each, dict)),
                "written": [each for each in told if isinstance(each, tuple)],
                "second": second,
                "fetched": then,
                "left": sorted(name for name in below(folder) if name.startswith("entries")),
            }
        )
    raise AssertionError("it never ended")


def leave(folder: Path, _: Tell) -> None:
    """Write the whole download, then kill this process."""
    with opened(folder) as world:
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, NBYTES), CONTENT, ALL)
        os.kill(os.getpid(), signal.SIGKILL)


def fill_a_small_disk(folder: Path) -> None:
    """Fill a disk of 2 MiB; written bytes stay, and the download continues once there is space."""
    with opened(folder / "cache") as world:
        keep(world.cache, key(0), bytes(500_000))
        download = begun(world.cache)
        with pytest.raises(CapacityError, match=r"ENOSPC.*disk is full"):
            download.file(WEIGHTS_FILE, 1_700_000)
        put(download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT)), CONTENT, ALL)
        with (folder / "other").open("wb", buffering=0) as other, suppress(OSError):
            while True:
                other.write(bytes(4096))
        with pytest.raises(CapacityError, match=r"publish.*ENOSPC"):
            download.publish()
        download.close()
        (folder / "other").unlink()
        download = begun(world.cache)
        assert download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT)).missing() == []
        download.publish().close()
        assert read_back(world.cache) == CONTENT
        assert is_there(world.cache, key(0))
    nothing_odd(folder / "cache")


def contend(folder: Path, seed: int, _: Tell) -> None:
    """Fetch adapters in random order with space for two; kill two of three processes at a call."""
    draw, calls = random.Random(seed), Calls(CHANGES)
    last = draw.randrange(10, 400) if seed % 3 else -1
    calls.after = lambda _: (
        os.kill(os.getpid(), signal.SIGKILL) if len(calls.made) == last else None
    )
    with opened(folder, SMALL) as world, calls.counted():
        for number in draw.choices(range(4), k=20):
            content = weights(number, 400_000)
            with suppress(CapacityError), ExitStack() as closes:
                found = begin(world.cache, key(number))
                closes.callback(found.close)
                if isinstance(found, DiskDownload):
                    file = found.file(WEIGHTS_FILE, len(content), sha256(content))
                    put(file, content, file.missing())
                    found = found.publish()
                    closes.callback(found.close)
                assert isinstance(found, DiskEntry)
                assert content_of(found) == content


def contended(base: Path) -> list[int | None]:
    """Run three processes at a time; return how each one ended."""
    codes = list[int | None]()

    def run(first: int) -> None:
        codes.extend(fork(contend, base, seed)[0] for seed in range(first, first + 5))

    threads = [Thread(target=run, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with opened(base, SMALL) as world:
        assert world.cache.budget.used() <= SMALL
        assert [each.problem for each in verify(world.cache) if each.problem] == []
        gc(world.cache)
    nothing_odd(base)
    return codes


def main(what: str, base: Path) -> None:
    sys.stdout.write(json.dumps(SCRIPTS[what](base)))


SCRIPTS: dict[str, Callable[[Path], object]] = {
    "contended": contended,
    "full": fill_a_small_disk,
    "kills": kills,
    "left": lambda base: fork(leave, base)[0],
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
