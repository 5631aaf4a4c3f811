"""The warm list: a file with the adapters on the device, for the next server."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiofiles.tempfile

from lorax_async.errors import ConfigError, UsageError
from lorax_async.loader import AdapterLoader
from lorax_async.types import AdapterId, AdapterRef, Ref, as_ref

MAX_ADAPTERS = 1024  # the least recently used are forgotten
MAX_BYTES = 16 << 20
_logger = logging.getLogger("lorax_async")


@asynccontextmanager
async def keep_warm_list(
    path: Path, loader: AdapterLoader, listed: Sequence[AdapterRef], pause: float = 1.0
) -> AsyncIterator[Callable[[AdapterId], None]]:
    """Prefetch `listed`; keep a file with the adapters on the device, the last used first.

    Yield the function to call with each adapter that is used. The file is replaced when the list
    has changed, at most every `pause` seconds. Tokens are never written.
    """
    used, changed, ended = dict.fromkeys(reversed(listed)), asyncio.Event(), asyncio.Event()
    prefetch = loader.prefetch(coming := listed[: loader.config.max_slots])

    def record_use(adapter: AdapterId) -> None:
        ref = as_ref(adapter)
        if isinstance(ref, AdapterRef) and ref.token is None:
            used.pop(ref, None)
            used[ref] = None
            if len(used) > MAX_ADAPTERS:
                del used[next(iter(used))]
            changed.set()

    async def keep() -> None:
        written, is_last = b"", False
        while not is_last:
            await changed.wait()
            changed.clear()
            is_last = ended.is_set()
            content = _encode(loader, reversed(used), () if prefetch.done else coming)
            try:
                if content != written:
                    await _replace(path, content)
                written = content
            except OSError as error:
                _logger.warning("the warm list %s could not be written: %s", path, error)
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), pause)

    unsubscribe = loader.subscribe(lambda _: changed.set())
    task = asyncio.create_task(keep(), name="lorax warm list")
    try:
        yield record_use
    finally:
        unsubscribe()
        ended.set()
        changed.set()
        await asyncio.shield(task)  # a write may be in progress
        prefetch.cancel()


def _encode(loader: AdapterLoader, used: Iterable[AdapterRef], coming: Sequence[Ref]) -> bytes:
    """Return the file's content: those of `used` that are on the device, or coming."""
    placement, rows = loader.placement(), list[dict[str, object]]()
    near = placement.nearest(loader.config.max_slots)
    wanted = {*coming, *(key for key, where in near.items() if where.tier == "device")}
    for ref in used:
        if not wanted:
            break  # do not look up all remembered names on the event loop
        if not wanted.isdisjoint(meanings := {ref, placement.key(ref)}):
            wanted -= meanings
            name = "path" if isinstance(ref.id, Path) else "id"
            row = {name: ref.text, "source": ref.source, "revision": ref.revision}
            rows.append({**row, "use_token": ref.use_token})
    return json.dumps({"adapters": rows}, indent=1).encode()


async def _replace(path: Path, content: bytes) -> None:
    """Replace the file atomically, once the content is on disk."""
    async with aiofiles.tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            await file.write(content)
            await file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(os.replace, str(file.name), path)
        finally:
            with suppress(FileNotFoundError):  # it has its name
                os.unlink(str(file.name))


def read_warm_list(path: Path) -> list[AdapterRef]:
    """Return the adapters of a warm list; none without a file. Blocks; raises `ConfigError`."""
    if path.parent.is_dir() and not os.path.lexists(path):
        return []
    try:  # without O_NONBLOCK, opening a FIFO waits for a writer
        with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
            match json.loads(file.read(MAX_BYTES)):
                case {"adapters": [*rows]}:
                    return [_as_ref(**row) for row in rows]
        raise ValueError("it has no list named adapters")
    except (OSError, TypeError, KeyError, ValueError, RecursionError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        text = f"the warm list {path} cannot be read ({reason}); delete it, or name another file"
        raise ConfigError(text) from error


def _as_ref(
    source: Any, revision: Any, use_token: Any = False, id: Any = None, path: Any = None
) -> AdapterRef:
    return AdapterRef(id if path is None else Path(path), source, revision, use_token=use_token)
