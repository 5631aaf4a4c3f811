"""The warm list: a file with the adapters on the device, for the next server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import aiofiles.tempfile

from lorax_async.errors import ConfigError, UsageError
from lorax_async.events import Event
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.prefetch import Prefetch
from lorax_async.types import AdapterId, AdapterRef, as_ref

_MAX_ADAPTERS = 1024
"""Adapters to remember, last used first."""

_MAX_BYTES = 16 << 20

_logger = logging.getLogger("lorax_async")


class WarmList:
    """Keep a file with the adapters on the device, the last used first.

    On entering, prefetch the adapters in the file. The file is written when the list has changed,
    at most every `pause` seconds, and replaced atomically. Tokens are never written.

    The folder of `path` must exist; the file need not. The loader is open, and closed after it.
    `admit` returns an adapter of the file as it is to be loaded, or None to omit it; by default
    each is loaded as it is. Raise `ConfigError` on entering, as `read_warm_list`.
    """

    def __init__(
        self,
        path: Path,
        loader: AdapterLoader,
        *,
        pause: float = 1.0,
        admit: Callable[[AdapterRef], AdapterRef | None] | None = None,
    ) -> None:
        self._path = path
        self._loader = loader
        self._pause = pause
        self._admit = admit
        self._used: dict[AdapterRef, None] = {}
        self._written: bytes | None = None
        self._restoring: frozenset[AdapterRef] = frozenset()
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self.restored: Prefetch | None = None
        """The prefetch of the adapters in the file; None if it listed none."""

    async def __aenter__(self) -> Self:
        listed = await asyncio.to_thread(read_warm_list, self._path)
        if self._admit is not None:
            admitted = map(self._admit, listed)
            listed = list(dict.fromkeys(ref for ref in admitted if ref is not None))
        if listed:
            for ref in reversed(listed):
                self.record_use(ref)
            fit = listed[: self._loader.config.max_slots]
            self.restored, self._restoring = self._loader.prefetch(fit), frozenset(fit)
        self._unsubscribe = self._loader.subscribe(self._on_event)
        self._task = asyncio.create_task(self._run(), name="lorax warm list")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._unsubscribe()
        self._ended.set()
        self._changed.set()
        await asyncio.shield(self._task)  # a write may be in progress
        if self.restored is not None:
            self.restored.cancel()

    def record_use(self, adapter: AdapterId) -> None:
        """Move an adapter to the front of the list, unless it has a token."""
        ref = as_ref(adapter)
        if not isinstance(ref, AdapterRef) or ref.token is not None:
            return
        self._used.pop(ref, None)
        self._used[ref] = None
        if len(self._used) > _MAX_ADAPTERS:
            del self._used[next(iter(self._used))]
        self._changed.set()

    def _on_event(self, event: Event) -> None:  # noqa: ARG002 - any event may change the list
        self._changed.set()

    async def _run(self) -> None:
        while not self._ended.is_set():
            await self._changed.wait()
            self._changed.clear()
            await self._write()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), self._pause)
        await self._write()

    async def _write(self) -> None:
        rows = [
            {"path" if isinstance(ref.id, Path) else "id": ref.text}
            | {"source": ref.source, "revision": ref.revision}
            | ({"use_token": True} if ref.use_token else {})
            for ref in self._list_adapters()
        ]
        # json, unlike pydantic, keeps paths that are not UTF-8.
        content = json.dumps({"adapters": rows}, indent=1).encode()
        if content == self._written:
            return
        try:
            await _replace(self._path, content)
        except OSError as error:
            _logger.warning("the warm list %s could not be written: %s", self._path, error)
        else:
            self._written = content

    def _list_adapters(self) -> list[AdapterRef]:
        """Return the adapters on the device or being restored, the last used first."""
        restoring = set(self._restoring) if self.restored and not self.restored.done else set()
        placement = self._loader.placement()
        on_device = {key for key, where in placement.adapters.items() if where.tier == "device"}
        refs = list[AdapterRef]()
        for ref in reversed(self._used):
            if not restoring and not on_device:
                break  # do not look up all remembered names on the event loop
            story = placement.story(ref)
            key = story[-1].key if story else None
            if ref in restoring or key in on_device:
                refs.append(ref)
            restoring.discard(ref)
            on_device.discard(key)
        return refs


async def _replace(path: Path, content: bytes) -> None:
    """Replace the file atomically, once the content is on disk."""
    place: dict[str, Any] = {"dir": path.parent, "prefix": f".{path.name}.", "delete": False}
    async with aiofiles.tempfile.NamedTemporaryFile("wb", **place) as file:
        name = str(file.name)
        try:
            await file.write(content)
            await file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(os.replace, name, path)
        except BaseException:
            with suppress(FileNotFoundError):  # it was cancelled when the file had its name
                os.unlink(name)
            raise


def read_warm_list(path: Path) -> list[AdapterRef]:
    """Return the adapters of a warm list; none if the file does not exist. Blocks.

    Raise `ConfigError`, with the path, the reason and what to do.
    """
    try:
        content = _read_file(path)
        return [] if content is None else _parse_refs(json.loads(content.decode()))
    except OSError as error:
        raise ConfigError(
            f"the warm list {path} cannot be read ({error.strerror}); make it readable, or name"
            " another file"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        elif isinstance(error, json.JSONDecodeError):
            reason = f"it is not JSON: {error}"
        elif isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        raise ConfigError(
            f"{path} is not a warm list ({reason}); delete it, or name another file"
        ) from error


def _read_file(path: Path) -> bytes | None:
    """Return None if there is no file, and one can be created. Raise as `read_warm_list`."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(
                f"the warm list {path} cannot be created: create the folder {path.parent}"
            ) from None
        return None
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):  # opening a folder as a Python file fails
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError(f"the warm list {path} is {what}; name a file")
        with open(number, "rb", closefd=False) as file:
            content = file.read(_MAX_BYTES + 1)
    finally:
        os.close(number)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has over {_MAX_BYTES:,} bytes")
    return content


def _parse_refs(members: Any) -> list[AdapterRef]:
    """Return the adapters of the file's JSON. Raise `ValueError`."""
    rows = members.get("adapters") if isinstance(members, dict) else None
    if not isinstance(rows, list):
        raise ValueError("it has no list named adapters")  # noqa: TRY004 - the file is wrong
    refs = []
    for number, row in enumerate(rows, 1):
        try:
            id = Path(row["path"]) if "path" in row else row["id"]
            use_token = row.get("use_token", False)
            refs.append(AdapterRef(id, row["source"], row["revision"], use_token=use_token))
        except (TypeError, KeyError, ValueError, UsageError) as error:
            raise ValueError(f"its adapter number {number} is invalid") from error
    return refs
