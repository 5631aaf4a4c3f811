"""q, k and v, and gate and up, are given the same input: it is shrunk for all of them at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.variants import EVERY, PEFT_WARNING, llama, logits_of, prompt, save, serving
from lorax_async.core.layout import Module, Parallel
from lorax_async.engines.shared_inputs import groups_of

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING)]


def module(name: str, in_features: int = 8) -> Module:
    return Module(name, in_features, 8, 0, Parallel.REPLICATED)


def test_modules_below_one_parent_that_get_the_same_input() -> None:
    names = ["a.q_proj", "a.o_proj", "a.v_proj", "b.q_proj", "b.k_proj", "m.up_proj", "m.gate_proj"]
    assert groups_of(map(module, names)) == {
        0: (0, 2),
        2: (0, 2),
        3: (3, 4),
        4: (3, 4),
        5: (5, 6),
        6: (5, 6),
    }


def test_other_sizes_and_single_ones_are_no_group() -> None:
    modules = [module("a.q_proj"), module("a.k_proj", 16), module("b.up_proj"), module("head")]
    assert groups_of(modules) == {}


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_a_batch_shrinks_once_for_each_input(tmp_path: Path) -> None:
    """Two layers of seven modules: 14 shrinks in a first pass, 8 where it pays to have fewer."""
    small = llama().bfloat16()
    adapter = save(llama(), EVERY, tmp_path / "every")

    def counted() -> tuple[int, torch.Tensor]:
        products = Products()
        with products:
            logits = logits_of(small, prompt(2))
        return products.count["aten::mm"], logits

    async def main() -> None:
        async with serving(small, dtype="bfloat16") as (loader, attached):
            handle = await loader.load(adapter)
            with attached.batch([handle, handle]):
                (first, logits), _, (third, again) = counted(), counted(), counted()
            with attached.batch([None, None]):
                _, base = counted()
            handle.release()
        assert first - third == 6
        torch.testing.assert_close(again, logits)
        assert (again - base).abs().max() > 10 * (again - logits).abs().max()

    asyncio.run(main())
