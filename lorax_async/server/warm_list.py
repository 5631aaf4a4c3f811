"""The warm list: a file with the adapters on the device, for the next server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from lorax_async.errors import ConfigError, UsageError
from lorax_async.events import Event
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.acquire import Prefetch
from lorax_async.types import AdapterId, AdapterRef

_KEPT = 1024
"""Adapters to remember, those used last."""

_MOST_BYTES = 16 << 20

_logger = logging.getLogger("lorax_async")


class WarmList:
    """Keep a file with the adapters on the device, the last used first.

    On entering, begin to load what the file names, at the lowest priority. The file is written
    when the list has changed, at most every `pause` seconds, and replaced atomically. Tokens are
    never written.

    Parameters
    ----------
    path
        Its folder must exist; the file need not.
    loader
        Open; closed after it.
    pause
        Seconds between two writes.
    admits
        Return an adapter of the file as it is to be loaded, or None to omit it. By default each
        is loaded as it is.

    Raise `ConfigError` on entering, as `read_warm_list`.
    """

    def __init__(
        self,
        path: Path,
        loader: AdapterLoader,
        *,
        pause: float = 1.0,
        admits: Callable[[AdapterRef], AdapterRef | None] | None = None,
    ) -> None:
        self._path = path
        self._loader = loader
        self._pause = pause
        self._admits = admits
        self._used: dict[AdapterRef, None] = {}
        self._written: bytes | None = None
        self._coming: frozenset[AdapterRef] = frozenset()
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self.restored: Prefetch | None = None
        """The running load of what the file named; None if it named nothing."""

    async def __aenter__(self) -> Self:
        named = await asyncio.to_thread(read_warm_list, self._path)
        if self._admits is not None:
            admitted = map(self._admits, named)
            named = list(dict.fromkeys(ref for ref in admitted if ref is not None))
        if named:
            for ref in reversed(named):
                self.used(ref)
            fit = named[: self._loader.config.max_slots]
            self.restored, self._coming = self._loader.prefetch(fit), frozenset(fit)
        self._unsubscribe = self._loader.subscribe(self._on_event)
        self._task = asyncio.create_task(self._keep(), name="lorax warm list")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._unsubscribe()
        self._ended.set()
        self._changed.set()
        await asyncio.shield(self._task)  # a write may be in progress
        if self.restored is not None:
            self.restored.cancel()

    def used(self, adapter: AdapterId) -> None:
        """Note that an adapter is used now."""
        if isinstance(adapter, str | Path):
            adapter = AdapterRef(adapter)
        if not isinstance(adapter, AdapterRef) or adapter.token is not None:
            return
        self._used.pop(adapter, None)
        self._used[adapter] = None
        if len(self._used) > _KEPT:
            del self._used[next(iter(self._used))]
        self._changed.set()

    def _on_event(self, event: Event) -> None:  # noqa: ARG002 - any event may change the list
        self._changed.set()

    async def _keep(self) -> None:
        while not self._ended.is_set():
            await self._changed.wait()
            self._changed.clear()
            await self._write()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), self._pause)
        await self._write()

    async def _write(self) -> None:
        content = _as_json(self._current())
        if content == self._written:
            return
        try:
            await asyncio.to_thread(_replace, self._path, content)
        except OSError as error:
            _logger.warning("the warm list %s could not be written: %s", self._path, error)
        else:
            self._written = content

    def _current(self) -> list[AdapterRef]:
        """Return the adapters on the device or being restored, the last used first."""
        coming = set(self._coming) if self.restored and not self.restored.done else set()
        placement = self._loader.placement()
        on_device = {key for key, where in placement.adapters.items() if where.tier == "device"}
        found = list[AdapterRef]()
        for ref in reversed(self._used):
            if not coming and not on_device:
                break  # do not look up all remembered names on the event loop
            story = placement.story(ref)
            key = story[-1].key if story else None
            if ref in coming or key in on_device:
                found.append(ref)
            coming.discard(ref)
            on_device.discard(key)
        return found


def _as_json(refs: Sequence[AdapterRef]) -> bytes:
    # json, unlike pydantic, keeps paths that are not UTF-8.
    rows = [
        {
            "path" if isinstance(ref.id, Path) else "id": ref.text,
            "source": ref.source,
            "revision": ref.revision,
        }
        | ({"use_token": True} if ref.use_token else {})
        for ref in refs
    ]
    return json.dumps({"adapters": rows}, indent=1).encode()


def read_warm_list(path: Path) -> list[AdapterRef]:
    """Return the adapters of a warm list; none if the file does not exist. Blocks.

    Raise `ConfigError`, with the path, the reason and what to do.
    """
    try:
        content = _content(path)
    except OSError as error:
        raise ConfigError(
            f"the warm list {path} cannot be read ({error.strerror}); make it readable, or name"
            " another file"
        ) from error
    if content is None:
        return []
    try:
        return _refs_in(json.loads(content.decode()))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no warm list of this server ({_reason(error)}); delete it, or name another"
            " file"
        ) from error


def _content(path: Path) -> bytes | None:
    """Return None if there is no file, and one can be created. Raise as `read_warm_list`."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(
                f"the warm list {path} cannot be made: there is no folder {path.parent}; make it"
            ) from None
        return None
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise ConfigError(f"the warm list {path} is {what}; name a file")
        with open(number, "rb", closefd=False) as file:
            content = file.read(_MOST_BYTES + 1)
    finally:
        os.close(number)
    if len(content) > _MOST_BYTES:
        raise ConfigError(
            f"{path} is no warm list of this server: it has over {_MOST_BYTES:,} bytes; delete it,"
            " or name another file"
        )
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error)


def _refs_in(found: Any) -> list[AdapterRef]:
    """Return the adapters of the file's JSON. Raise `ValueError`."""
    rows = found.get("adapters") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise ValueError("it has no list called adapters")  # noqa: TRY004 - the file is wrong
    refs = []
    for number, row in enumerate(rows, 1):
        try:
            id = Path(row["path"]) if "path" in row else row["id"]
            use_token = row.get("use_token", False)
            refs.append(AdapterRef(id, row["source"], row["revision"], use_token=use_token))
        except (TypeError, KeyError, ValueError, UsageError) as error:
            raise ValueError(f"its adapter number {number} is none") from error
    return refs


def _replace(path: Path, content: bytes) -> None:
    """Replace the file atomically, once the content is on disk. Blocks."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
