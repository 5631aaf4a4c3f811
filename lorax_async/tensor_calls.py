"""The calls of an `AdapterLoader` that take tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from lorax_async.adapter import AdapterId, AdapterRef, Ref, as_ref
from lorax_async.config import LoaderConfig
from lorax_async.core.config_writing import GivenConfig, write_config
from lorax_async.errors import InvalidAdapterIdError, LoraxError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.runtime.machinery import Machinery
from lorax_async.runtime.tenancy import Lease


class _Loader(Protocol):
    """What these calls need of the loader."""

    config: LoaderConfig
    _machinery: Machinery

    def _check_open(self) -> None: ...
    def _handle(self, ref: Ref, lease: Lease) -> AdapterHandle: ...

    async def _give(
        self,
        ref: AdapterRef,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        timeout: float | None,
        *,
        priority: int,
        replaces: bool,
    ) -> AdapterHandle: ...


class TensorCalls:
    """For training loops that push weights, and for adapters that are in no file."""

    async def load_tensors(
        self: _Loader,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Load an adapter from tensors; from here on `name` is an id that means it.

        Its bytes are kept until `unload(name)` or a `replace`: in host memory, within
        `memory_bytes`, or, once newer ones need the room and with `spill`, in the disk cache. On
        the device it comes and goes as others do.

        Parameters
        ----------
        name
            Comes before what a source has by the same id, for a `str` id of every caller.
        tensors
            By the names that PEFT gives them in a file (`peft.get_peft_model_state_dict`), on any
            device, in F32, F16 or BF16. They are copied as they are, in a thread: write to them
            again when the call is through.
        config
            A dict as in `adapter_config.json`, or a `peft.LoraConfig`.
        timeout, priority
            As for `load`.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            As `load` does; `CapacityError` also if `memory_bytes` has no room and others cannot
            make any, `IntegrityError` if a tensor was written to meanwhile, `UsageError` if the
            name means other tensors (equal ones join). The name then means what it did.
        """
        self._check_open()
        if not isinstance(name, str) or not name:
            raise InvalidAdapterIdError("a name for tensors is a str that is not empty")
        return await self._give(
            AdapterRef(name), tensors, config, timeout, priority=priority, replaces=False
        )

    async def replace(
        self: _Loader,
        adapter_id: AdapterId,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Let an id mean these tensors instead of what it means, be that of a source or of memory.

        They are loaded beside the old version. Once they are resident, and in one step, every new
        request for the id is one for them, and its pins are theirs. Who holds or waits for the old
        version keeps it; it leaves when nobody does any more. Calls for one id come to pass in the
        order in which they began.

        Parameters
        ----------
        adapter_id
            A `str`, a `pathlib.Path` or an `AdapterRef`, whether or not it was loaded before. What
            is replaced without a token is replaced for every token.
        tensors, config, timeout, priority
            As for `load_tensors`.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            As `load_tensors` does. The id then means what it did. `CapacityError` also if there is
            no room beside an old version that is pinned.
        """
        self._check_open()
        ref = as_ref(adapter_id)
        if not isinstance(ref, AdapterRef):
            raise UsageError("a key or a Merge says which bytes it is; replace an id")
        return await self._give(ref, tensors, config, timeout, priority=priority, replaces=True)

    async def _give(
        self: _Loader,
        ref: AdapterRef,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        timeout: float | None,
        *,
        priority: int,
        replaces: bool,
    ) -> AdapterHandle:
        seconds = self.config.seconds(timeout)
        try:
            content = write_config(config)
        except LoraxError as error:
            raise error.located(id=ref.text) from None
        giving = self._machinery.giving
        lease = await giving.give(
            ref, tensors, content, seconds, priority=priority, replaces=replaces
        )
        return self._handle(ref, lease)
