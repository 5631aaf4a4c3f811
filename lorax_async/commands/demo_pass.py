"""Forward passes through a base model while the layers of its adapters come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_async.engines.smollm2 import prepare_base
from lorax_async.engines.transformers import attach
from lorax_async.identity import AdapterRef
from lorax_async.loader import AdapterLoader

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT_TOKENS = 96


def base_model(base: str, report: Callable[[str], None]) -> Any:
    """In float32, from a folder; "smollm2" is the demo's. Blocks; raises as a load of it does."""
    folder = prepare_base(progress=report) if base == "smollm2" else Path(base)
    report("loading the base")
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from lorax_async.commands.demo import without_bars  # noqa: PLC0415

    with without_bars():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in eval mode


async def stream_through(model: Any, loader: AdapterLoader, refs: Sequence[AdapterRef]) -> None:
    """One prompt after the other, each through the layers of its adapter as they come."""
    with attach(model, loader) as attached:
        for ref in refs:
            async with loader.stream(ref) as handle:
                with attached.batch([handle]):
                    await asyncio.to_thread(_compute, model)


def _compute(model: Any) -> None:
    import torch  # noqa: PLC0415

    ids = torch.arange(PROMPT_TOKENS).unsqueeze(0) % model.config.vocab_size
    with torch.inference_mode(), _one_torch_thread():
        model(ids, use_cache=False, logits_to_keep=1)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The server of the slow link, and the copies, have the other core."""
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
