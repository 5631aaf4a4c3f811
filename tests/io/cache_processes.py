"""Disk caches in processes that end as they like: run as a script, it forks them and tells by JSON.

One Python starts and imports; its children are forks, each of them a process to the cache.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from counted_calls import CHANGES, Calls
from disk_cache_world import (
    CONFIG,
    KEY,
    NBYTES,
    SCOPE,
    begun,
    below,
    content_of,
    key,
    nothing_odd,
    put,
    sha256,
    weights,
)

from lorax_async.cache import maintenance
from lorax_async.cache.disk_cache import DiskCache, DiskDownload
from lorax_async.cache.records import CacheKey
from lorax_async.concurrency import FetchControl
from lorax_async.errors import CapacityError, FetchError
from lorax_async.formats.spans import ByteRange, SpanSet
from lorax_async.formats.split_weights import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.lifecycle.policies import policy

Tell = Callable[[object], None]

CONTENT = weights()
SPANS = [(400_000, 900_000), (10, 300_000), (NBYTES - 9, NBYTES), (0, 10), (300_000, 400_000)]
SPANS += [(900_000, NBYTES - 9)]
WRITE = os.write  # what a child tells is none of the calls that are counted


def fork(main: Callable[..., None], *given: Any) -> tuple[int, int]:
    """Run `main` in a process of its own, which may tell; its id, and where that is read."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        main(*given, lambda told: WRITE(writing, json.dumps(told).encode() + b"\n"))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, reading: int) -> tuple[int, list[Any]]:
    """How a process ended, and what it told."""
    with os.fdopen(reading, "rb") as pipe:
        told = [json.loads(line) for line in pipe]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told


def opened(folder: Path, nbytes: int = 1 << 30) -> DiskCache:
    return DiskCache(folder, nbytes, policy("lru"))


def fetch(folder: Path, tell: Tell) -> None:
    """Have the adapter, and tell each span that was missing."""
    cache = opened(folder)
    found = cache.begin(KEY, SCOPE, FetchControl())
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
    assert content_of(found) == CONTENT
    assert content_of(found, CONFIG_FILE) == CONFIG
    found.close()
    cache.close()


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
    """Kill a process after each of its calls that change something; a second one goes on."""
    outcomes: list[dict[str, Any]] = []
    for at in range(1, 10_000):
        folder = base / str(at)
        code, told = ended(*fork(fetch_until, folder, at))
        if code != -signal.SIGKILL:
            assert code == 0
            return outcomes
        second, then = ended(*fork(fetch, folder))
        nothing_odd(folder)
        outcomes.append(
            {
                "call": next(each["killed after"] for each in told if isinstance(each, dict)),
                "written": [each for each in told if isinstance(each, list)],
                "second": second,
                "fetched": then,
                "left": sorted(name for name in below(folder) if name.startswith("entries")),
            }
        )
    raise AssertionError("it never ended")


def leave(folder: Path, _: Tell) -> None:
    """Write all of it, and be killed."""
    download = begun(opened(folder))
    put(download.file(WEIGHTS_FILE, NBYTES), CONTENT, [(0, NBYTES)])
    os.kill(os.getpid(), signal.SIGKILL)


KEYS = 5
ADAPTERS = [weights(number, 200_000 + 90_000 * number) for number in range(KEYS)]
BUDGET = 1_000_000


def adventure(folder: Path, seed: int, tell: Tell) -> None:
    """Fetch what comes to mind, wait, give up, be killed."""
    draw = random.Random(seed)
    cache = opened(folder, BUDGET)
    for _ in range(12):
        number = draw.randrange(KEYS)
        try:
            one_fetch(cache, key(number), ADAPTERS[number], draw)
            tell("had")
        except (CapacityError, FetchError) as error:
            tell(error.problem)
    cache.close()


def one_fetch(cache: DiskCache, of: CacheKey, content: bytes, draw: random.Random) -> None:
    found = cache.begin(of, SCOPE, FetchControl())
    if isinstance(found, DiskDownload):
        try:
            file = found.file(WEIGHTS_FILE, len(content), sha256(content))
            for gap in pieces(file.missing(), draw):
                if draw.random() < 0.01:
                    os.kill(os.getpid(), signal.SIGKILL)
                if draw.random() < 0.01:
                    return
                put(file, content, [gap])
                time.sleep(draw.random() * 0.002)
            found = found.publish()
        finally:
            if isinstance(found, DiskDownload):
                found.close()
    assert content_of(found) == content
    time.sleep(draw.random() * 0.01)
    found.close()


def pieces(gaps: list[ByteRange], draw: random.Random) -> list[ByteRange]:
    found = [
        (at, min(stop, at + 30_000)) for start, stop in gaps for at in range(start, stop, 30_000)
    ]
    draw.shuffle(found)
    return found


def adventures(folder: Path, locks: str) -> None:
    """Six at a time, four times over; afterwards all that is there must be right."""
    codes, told, most = set[int](), set[str](), 0
    cache = opened(folder, BUDGET)
    for turn in range(4):
        for child in [fork(adventure, folder, 1 + 6 * turn + number) for number in range(6)]:
            code, each = ended(*child)
            codes.add(code)
            told |= {text for text in each if "do not fit" not in text}
            most = max(most, cache.used())
    assert codes == {0, -signal.SIGKILL}
    if locks == "flock":
        assert told == {"had"}
        assert most <= BUDGET
    else:
        assert "had" in told
        assert all("again" in text for text in told - {"had"}), told
        assert most <= BUDGET + 5 * max(map(len, ADAPTERS))
    assert [each.problem for each in maintenance.verify(cache) if each.problem] == []
    for path in (*(folder / "partials").rglob("*"), *(folder / "partials").iterdir()):
        os.utime(path, (0, 0))  # without locks, what was written to lately may be in use
    maintenance.gc(cache)
    assert cache.used() <= BUDGET
    assert not any(listed.is_partial for listed in maintenance.ls(cache))
    cache.close()
    nothing_odd(folder)


def main(what: str, base: Path, locks: str) -> object:
    if locks == "none":

        def unsupported(fd: int, how: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.flock = unsupported  # type: ignore[assignment]
    if what == "kills":
        return kills(base)
    if what == "left":
        return ended(*fork(leave, base))[0]
    adventures(base / "cache", locks)
    return None


if __name__ == "__main__":
    outcome = main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    sys.stdout.write(json.dumps(outcome))
