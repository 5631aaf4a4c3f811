"""Adapters in an engine of your own, row by row and by the kernels' tables: docs/engine.md.

python examples/own_engine.py
"""

import asyncio
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, layouts
from lorax_kernels import Plan, apply

Linear = Callable[[str, Any, Tensor], Tensor]
Rows = Sequence[AdapterHandle | None]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256, bias=False)
        self.down = nn.Linear(256, 64, bias=False)


def base_alone(name: str, base: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = base(x)
    return y


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(64, 100, bias=False)

    def forward(
        self,
        tokens: Tensor,
        linear: Linear = base_alone,
        enter: Callable[[int], None] = lambda number: None,
    ) -> Tensor:
        x = self.embed(tokens)
        for number, layer in enumerate(self.layers):
            enter(number)
            hidden = torch.relu(linear(f"layers.{number}.up", layer.up, x))
            x = x + linear(f"layers.{number}.down", layer.down, hidden)
        logits: Tensor = self.head(x)
        return logits


def by_modules(rows: Rows) -> Linear:
    def linear(name: str, base: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        for row, handle in enumerate(rows):
            if handle is not None and name in handle.modules:
                weights = handle.modules[name]
                y[row] += weights.scale * (x[row] @ weights.a.T) @ weights.b.T
        return y

    return linear


def by_tables(loader: AdapterLoader, rows: Rows, tokens_per_row: int) -> Linear:
    tables, layout = loader.tables, loader.layout  # ask for them on the loop, use them anywhere
    slots = [-1 if handle is None else handle.slot.index for handle in rows]  # -1: the base
    bounds = [tokens_per_row * row for row in range(len(rows) + 1)]
    plan = Plan.from_segments(bounds, slots)

    def linear(name: str, base: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        apply(flat_y, flat_x, plan, layout.index(name), tables)  # in place
        return y

    return linear


@torch.no_grad()
def compute(model: Decoder, tokens: Tensor, linear: Linear, handles: Rows) -> Tensor:
    def enter(number: int) -> None:
        for handle in handles:
            if handle is not None:
                handle.wait_layer(number)  # returns at once if the layer is there

    logits: Tensor = model(tokens, linear, enter)
    return logits


def train(model: Decoder, folder: Path, rank: int) -> PeftModel:
    """Save an adapter with random weights, as PEFT does after a training."""
    config = LoraConfig(r=rank, target_modules=["up", "down"], init_lora_weights=False)
    trained = get_peft_model(copy.deepcopy(model), config)
    trained.save_pretrained(str(folder))
    return trained


async def main() -> None:
    torch.manual_seed(0)
    model, tokens = Decoder(), torch.randint(0, 100, (3, 16))
    adapters = Path(tempfile.mkdtemp())
    one, two = train(model, adapters / "one", 4), train(model, adapters / "two", 8)
    with torch.no_grad():
        expected = torch.cat([one(tokens[:1]), model(tokens[1:2]), two(tokens[2:])])

    def report(way: str, logits: Tensor) -> None:
        print(f"{way}: as PEFT computes it: {torch.allclose(logits, expected, atol=1e-5)}")

    config = LoaderConfig(max_slots=8, device_bytes="64MiB", local_roots=(adapters,))
    async with AdapterLoader(layouts.from_module(model), config) as loader:
        async with loader.load("./one") as first, loader.load("./two") as second:
            rows = [first, None, second]
            for way, linear in (
                ("by modules", by_modules(rows)),
                ("by tables", by_tables(loader, rows, 16)),
            ):
                with first.use(), second.use():  # their memory is not reused meanwhile
                    report(way, await asyncio.to_thread(compute, model, tokens, linear, rows))

        await loader.unload("./two")
        async with loader.load("./one") as first, loader.stream("./two") as second:
            rows = [first, None, second]
            linear = by_tables(loader, rows, 16)
            with first.use(), second.use():
                report("streamed", await asyncio.to_thread(compute, model, tokens, linear, rows))


if __name__ == "__main__":
    asyncio.run(main())
