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
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.acquire import Prefetch
from lorax_async.types import AdapterId, AdapterRef, as_ref

_MAX_ADAPTERS = 1024  # the least recently used are forgotten
_MAX_BYTES = 16 << 20

_logger = logging.getLogger("lorax_async")


class WarmList:
    """Keep a file with the adapters on the device, the last used first; prefetch them on entering.

    It is replaced atomically when the list has changed, at most every `pause` seconds. Tokens are
    never written. The loader is open, and closed after it. `admit` returns an adapter of the file
    as it is to be loaded, or None to omit it. Entering raises `ConfigError`, as `read_warm_list`.
    """

    def __init__(
        self,
        path: Path,
        loader: AdapterLoader,
        *,
        pause: float = 1.0,
        admit: Callable[[AdapterRef], AdapterRef | None] = lambda ref: ref,
    ) -> None:
        self._path, self._loader, self._pause, self._admit = path, loader, pause, admit
        self._used: dict[AdapterRef, None] = {}
        self._written = b""
        self._changed, self._ended = asyncio.Event(), asyncio.Event()
        self.restored: Prefetch | None = None
        """The prefetch of the adapters in the file; None if it listed none."""

    async def __aenter__(self) -> Self:
        admitted = map(self._admit, await asyncio.to_thread(read_warm_list, self._path))
        listed = list(dict.fromkeys(ref for ref in admitted if ref is not None))
        for ref in reversed(listed):
            self.record_use(ref)
        self._restoring = frozenset(listed[: self._loader.config.max_slots])
        if listed:
            self.restored = self._loader.prefetch(listed[: self._loader.config.max_slots])
        self._unsubscribe = self._loader.subscribe(lambda _: self._changed.set())
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
        if isinstance(ref, AdapterRef) and ref.token is None:
            self._used.pop(ref, None)
            self._used[ref] = None
            if len(self._used) > _MAX_ADAPTERS:
                del self._used[next(iter(self._used))]
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
            {"path" if isinstance(ref.id, Path) else "id": ref.text, "source": ref.source}
            | {"revision": ref.revision}
            | ({"use_token": True} if ref.use_token else {})
            for ref in self._list_adapters()
        ]
        # json, unlike pydantic, keeps paths that are not UTF-8.
        content = json.dumps({"adapters": rows}, indent=1).encode()
        if content != self._written:
            try:
                await _replace(self._path, content)
                self._written = content
            except OSError as error:
                _logger.warning("the warm list %s could not be written: %s", self._path, error)

    def _list_adapters(self) -> list[AdapterRef]:
        """Return the adapters on the device or being restored, the last used first."""
        restoring = set(self._restoring if self.restored and not self.restored.done else ())
        placement, refs = self._loader.placement(), list[AdapterRef]()
        on_device = {key for key, where in placement.adapters.items() if where.tier == "device"}
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
        try:
            await file.write(content)
            await file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(os.replace, str(file.name), path)
        except BaseException:
            with suppress(FileNotFoundError):  # it was cancelled when the file had its name
                os.unlink(str(file.name))
            raise


def read_warm_list(path: Path) -> list[AdapterRef]:
    """Return the adapters of a warm list; none if the file does not exist. Blocks.

    Raise `ConfigError`, with the path, the reason and what to do.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"the warm list {path} is not a regular file; name a file")
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has over {_MAX_BYTES:,} bytes")
        return _parse_refs(content)
    except FileNotFoundError:
        if path.parent.is_dir():
            return []
        raise ConfigError(
            f"the warm list {path} cannot be created: create the folder {path.parent}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"the warm list {path} is a folder; name a file") from None
    except OSError as error:
        raise ConfigError(
            f"the warm list {path} cannot be read ({error.strerror}); make it readable, or name"
            " another file"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f"{path} is not a warm list ({reason}); delete it, or name another file"
        ) from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or opening a FIFO waits for a writer


def _parse_refs(content: bytes) -> list[AdapterRef]:
    """Return the adapters of the file. Raise `ValueError`."""
    try:
        members = json.loads(content.decode())
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
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
