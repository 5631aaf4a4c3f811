"""Folders of adapters that vLLM loads by itself, where its server is not as the plug-in expects."""

from __future__ import annotations

import asyncio
import logging

from lorax_async.engines.plugin_settings import (
    BaseRequirements,
    FailureLog,
    PluginSettings,
    explain,
)
from lorax_async.errors import LoraxError
from lorax_async.runtime.folders import AdapterFolder
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterRef

_logger = logging.getLogger("vllm.lorax_async")  # vLLM writes what its children log


class CheckedFolders:
    """The folders that vLLM got. On the API server's event loop.

    Nothing tells when vLLM reads one for the last time: each stays leased until the end.
    """

    def __init__(
        self, settings: PluginSettings, store: AdapterStore, base: BaseRequirements
    ) -> None:
        self.settings = settings
        self._store = store
        self._base = base
        self._folders: dict[str, AdapterFolder] = {}
        self._failures = FailureLog(_logger)

    async def fetch(self, name: str, ref: AdapterRef) -> str:
        """Return the path of an adapter's folder, which is fetched and checked.

        Raise what `AdapterStore.checkout` raises, or `IncompatibleAdapterError`.
        """
        try:
            folder = await self._store.checkout(ref)
            try:
                await asyncio.to_thread(self._base.check, folder.path)
            except BaseException:
                folder.release()
                raise
        except LoraxError as error:
            located = explain(error.located(id=ref.text), ref)
            self._failures.note(name, located)
            raise located from error.__cause__
        self._failures.clear(name)
        path = str(folder.path)
        if self._folders.setdefault(path, folder) is not folder:
            folder.release()
        return path

    def close(self) -> None:
        """Release all folders, as the engine ends."""
        for folder in self._folders.values():
            folder.release()
        self._folders.clear()
