"""SmolLM2 with adapters attached, and the adapters behind a throttled link."""

from __future__ import annotations

import asyncio
import shutil
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from harness import SEED
from link import Link
from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.engines.transformers import AttachedModel, attach
from lorax_async.handle import AdapterHandle
from lorax_async.ids import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.server.transformers_decoder import cache_argument
from work_files import CONFIG, WEIGHTS

RANK = 16
CONNECTIONS = 4


class Base:
    """The model in float32, and adapters of all its linear layers: random weights in bfloat16."""

    def __init__(self, work: Path, adapters: int) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        quiet: Any = logging  # untyped in transformers
        quiet.disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(prepare_base(), dtype=torch.float32)
        self.model = model.eval()
        self.layout = layouts.from_module(self.model)
        self.folders = [self._written(work / f"adapter-{n}", n) for n in range(adapters)]
        self.nbytes = (self.folders[0] / WEIGHTS).stat().st_size
        """Of an adapter's file; in float32 it is twice as much."""

    def _written(self, folder: Path, number: int) -> Path:
        from peft import LoraConfig, get_peft_model

        given = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        with warnings.catch_warnings():  # of PEFT, about transformers
            warnings.simplefilter("ignore")
            wrapped: Any = get_peft_model(self.model, given)
        random = torch.Generator().manual_seed(SEED + number)
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if ".lora_" in name:
                    weight.normal_(0, 0.02, generator=random)
                    weight.data = weight.data.bfloat16()
        wrapped.save_pretrained(folder)
        wrapped.unload()
        return folder

    @contextmanager
    def link(self, rate: float, *, shared: bool) -> Iterator[Link]:
        """All adapters, each below its folder's name, at so many bytes per second for a load.

        The connections share the rate, or else each has its part of it.
        """
        files = {
            f"{folder.name}/{name}": folder / name
            for folder in self.folders
            for name in (WEIGHTS, CONFIG)
        }
        rate = rate if shared else rate / CONNECTIONS
        with Link(files, rate=rate, delay=0.0, shared=shared) as link:
            yield link

    def urls(self, link: Link) -> list[str]:
        return [link.url(folder.name) for folder in self.folders]

    @asynccontextmanager
    async def served(
        self, link: Link, cache: Path, *, io_threads: int, connections: int = CONNECTIONS
    ) -> AsyncIterator[tuple[AdapterLoader, AttachedModel]]:
        """By a loader that has never heard of the adapters, with an empty disk cache."""
        shutil.rmtree(cache, ignore_errors=True)
        room = len(self.folders) + 1
        config = LoaderConfig(
            dtype=torch.float32,
            device_bytes=room * (3 * self.nbytes),
            max_slots=room,
            io_threads=io_threads,
            connections=connections,
            cache_dir=cache,
            allow=(Allow("http", "127.0.0.1", link.port),),
        )
        async with AdapterLoader(self.layout, config) as loader:
            with attach(self.model, loader) as attached:
                yield loader, attached


class Decoding:
    """Rows that are computed together, a token of each at a time."""

    def __init__(self, model: Any, attached: AttachedModel, rows: Sequence[AdapterHandle]) -> None:
        self._model = model
        self._attached = attached
        self._rows = rows
        self._cache = {cache_argument(model): DynamicCache(config=model.config)}
        self.next = torch.arange(1000, 1000 + len(rows)).unsqueeze(1)

    async def prefill(self, tokens: int) -> None:
        """The same prompt for all rows."""
        self.next = torch.arange(1000, 1000 + tokens).repeat(len(self._rows), 1)
        await self.step()

    async def step(self) -> torch.Tensor:
        """The next token of each row."""

        def forward() -> torch.Tensor:
            with torch.no_grad():
                found = self._model(
                    input_ids=self.next, use_cache=True, logits_to_keep=1, **self._cache
                )
            next: torch.Tensor = found.logits[:, -1].argmax(dim=-1, keepdim=True)
            return next

        with self._attached.batch(self._rows):
            self.next = await asyncio.to_thread(forward)
        return self.next
