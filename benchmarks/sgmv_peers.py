"""The kernels of other servers, where these are installed: vLLM's and SGLang's Triton ops.

Both take one stacked tensor of equal ranks; a batch of mixed ranks is not theirs. What they need
to know of a batch is made once, outside of the timer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from sgmv_work import Batch

Call = Callable[[Tensor, int], None]
"""Adds the adapters of a module to y."""


class NotMeasuredError(RuntimeError):
    """A peer cannot take part; the text says why."""


def vllm(batch: Batch) -> Call:
    _require("vllm", batch)
    ops = import_module("vllm.lora.ops.triton_ops")
    tokens, adapters = batch.size.tokens, len(batch.size.rows)
    meta = ops.LoRAKernelMeta.make(adapters, tokens, batch.x.device)
    rows = zip(range(adapters), batch.size.rows, strict=True)
    mapping = torch.tensor([slot for slot, count in rows for _ in range(count)])
    meta.prepare_tensors(mapping.to(batch.x.device))
    a, b = _stacked(batch)
    shape = (1, tokens, batch.size.ranks[0])
    shrunk = torch.empty(shape, dtype=torch.float32, device=batch.x.device)
    args = meta.meta_args(tokens, False)

    def call(y: Tensor, module: int) -> None:
        ops.lora_shrink(batch.x, [a[module]], shrunk, *args, batch.SCALE)
        ops.lora_expand(shrunk, [b[module]], y, *args, offset_start=0, add_inputs=True)

    return call


def sglang(batch: Batch) -> Call:
    _require("sglang", batch)
    ops = import_module("sglang.srt.lora.triton_ops")
    info_of = import_module("sglang.srt.lora.utils").LoRABatchInfo
    adapters, device = len(batch.size.rows), batch.x.device

    def integers(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    info = info_of(
        use_cuda_graph=True,
        bs=adapters,
        num_segments=adapters,
        max_len=max(batch.size.rows),
        seg_indptr=integers(batch.bounds),
        weight_indices=integers(list(range(adapters))),
        lora_ranks=integers(batch.size.ranks),
        scalings=torch.full((adapters,), batch.SCALE, device=device),
        seg_lens=integers([stop - start for start, stop in pairwise(batch.bounds)]),
        permutation=None,
    )
    a, b = (each.squeeze(2) for each in _stacked(batch))

    def call(y: Tensor, module: int) -> None:
        shrunk = ops.sgemm_lora_a_fwd(batch.x, a[module], info)
        ops.sgemm_lora_b_fwd(shrunk, b[module], info, y)

    return call


def _require(package: str, batch: Batch) -> None:
    if find_spec(package) is None:
        raise NotMeasuredError("not installed")
    if len(set(batch.size.ranks)) > 1:
        raise NotMeasuredError("takes equal ranks only")


def _stacked(batch: Batch) -> tuple[Tensor, Tensor]:
    """A `[modules, adapters, 1, rank, in]` and B `[modules, adapters, 1, out, rank]`."""
    return torch.stack(batch.a, 1)[:, :, None], torch.stack(batch.b, 1)[:, :, None]
