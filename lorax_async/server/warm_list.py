"""The warm list: a file with the adapters on the device, for the next server."""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterator
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
Admit = Callable[[AdapterRef], AdapterRef | None]


class WarmList:
    """Keep a file with the adapters on the device, the last used first; prefetch them on entering.

    It is replaced atomically when the list has changed, at most every `pause` seconds. Tokens are
    never written. The loader is open, and closed after it. `admit` returns an adapter of the file
    as it is to be loaded, or None to omit it. Entering raises `ConfigError`, as `read_warm_list`.
    """

    restored: Prefetch | None = None
    """The prefetch of the adapters in the file; None if it listed none."""

    def __init__(
        self, path: Path, loader: AdapterLoader, *, pause: float = 1.0, admit: Admit | None = None
    ) -> None:
        self._path, self._loader, self._pause, self._admit = path, loader, pause, admit
        self._used, self._written = dict[AdapterRef, None](), b""
        self._changed, self._ended = asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> Self:
        refs = await asyncio.to_thread(read_warm_list, self._path)
        admitted = refs if self._admit is None else map(self._admit, refs)
        listed = list(dict.fromkeys(filter(None, admitted)))
        for ref in reversed(listed):
            self.record_use(ref)
        self._restoring = listed[: self._loader.config.max_slots]
        if listed:
            self.restored = self._loader.prefetch(self._restoring)
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
        rows: list[dict[str, object]] = [
            {"path" if isinstance(ref.id, Path) else "id": ref.text, "source": ref.source}
            | {"revision": ref.revision, "use_token": ref.use_token}
            for ref in self._list_adapters()
        ]
        content = json.dumps({"adapters": rows}, indent=1).encode()  # pydantic takes UTF-8 only
        if content != self._written:
            try:
                await _replace(self._path, content)
                self._written = content
            except OSError as error:
                _logger.warning("the warm list %s could not be written: %s", self._path, error)

    def _list_adapters(self) -> Iterator[AdapterRef]:
        """Yield the adapters on the device or being restored, the last used first."""
        placement = self._loader.placement()
        wanted: set[object] = {
            key for key, where in placement.adapters.items() if where.tier == "device"
        }
        if self.restored is not None and not self.restored.done:
            wanted |= set(self._restoring)
        for ref in reversed(self._used):
            if not wanted:
                break  # do not look up all remembered names on the event loop
            if not wanted.isdisjoint(meanings := {ref, placement.key(ref)}):
                yield ref
            wanted -= meanings


async def _replace(path: Path, content: bytes) -> None:
    """Replace the file atomically, once the content is on disk."""
    async with aiofiles.tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
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
    try:  # without O_NONBLOCK, opening a FIFO waits for a writer
        with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
            match json.loads(file.read(_MAX_BYTES)):
                case {"adapters": [*rows]}:
                    return [_as_ref(**row) for row in rows]
        raise ValueError("it has no list named adapters")
    except FileNotFoundError:
        if path.parent.is_dir():
            return []
        raise ConfigError(f"no folder for the warm list: create the folder {path.parent}") from None
    except OSError as error:
        text = f"the warm list {path} cannot be read ({error.strerror}); name a file that can be"
        raise ConfigError(text) from error
    except (TypeError, KeyError, ValueError, RecursionError, UsageError) as error:
        text = f"{path} is not a warm list ({error}); delete it, or name another file"
        raise ConfigError(text) from error


def _as_ref(source: Any, revision: Any, use_token: Any = False, **name: Any) -> AdapterRef:
    id = Path(name["path"]) if "path" in name else name["id"]
    return AdapterRef(id, source, revision, use_token=use_token)
