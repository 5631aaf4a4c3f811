"""Compute modules of bare parameters, such as fused experts and their routers, with an adapter.

An adapter's delta of expert e is `scale * B_e @ A_e`. PEFT adds it to the weights of all experts;
here each token's experts add `scale * B_e(A_e x)` to their outputs, which differs by rounding.
Source: peft 0.21.2, `ParamWrapper`; transformers 5, `integrations/moe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from lorax_async.errors import UsageError
from lorax_async.handle import ParameterWeights
from lorax_async.layouts import has_slabs, is_experts

Adapter = Mapping[str, ParameterWeights]
"""The parameters of a module that an adapter changes, by their names in the module."""


def compute(
    module: nn.Module, adapter: Adapter, inputs: tuple[torch.Tensor, ...]
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return what `module` computes for tokens that all have this adapter."""
    if has_slabs(module):
        return _compute_slabs(module, adapter, *inputs)
    if is_experts(module):
        return _compute_experts(module, adapter, *inputs)
    forward: Callable[..., torch.Tensor] = type(module).forward
    return forward(_with_deltas(module, adapter), *inputs)


def slabs_of(module: Any) -> int:
    """Return how often the module's inputs have all tokens: once, or once for each expert."""
    slabs: int = module.num_experts if has_slabs(module) else 1
    return slabs


def split_rows(module: Any, x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return inputs or outputs of a module as `[slabs, rows, …]`."""
    slabs = slabs_of(module)
    return x.reshape(slabs, rows, len(x) // (slabs * rows), *x.shape[1:])


def _first(module: Any) -> str:
    """Return the name of the parameter that experts compute with first."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _compute_experts(
    module: Any, adapter: Adapter, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sums of the experts' outputs `[tokens, features]`.

    `chosen` and `weights` are `[tokens, k]`: the experts of a token, and their shares.
    """
    if module._is_expert_parallel:  # noqa: SLF001 - transformers has no other name for it
        raise UsageError("experts of which a process has some are not adapted; load all of them")
    y = torch.zeros_like(x)
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=module.num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts[: module.num_experts]):
        places = order[start : start + count]
        start += count
        if not count:
            continue
        tokens = places // chosen.shape[1]
        inner = _project(module, _first(module), x[tokens], expert, adapter)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # noqa: SLF001
        own = _project(module, "down_proj", inner, expert, adapter)
        own = own * weights.flatten()[places].unsqueeze(1)
        y.index_add_(0, tokens, own.to(y.dtype))
    return y


def _compute_slabs(module: Any, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of experts that all get all tokens, `[experts * tokens, features]`."""
    outputs = []
    for expert, slab in enumerate(x.view(module.num_experts, -1, x.shape[-1])):
        gate, up = _project(module, "gate_up_proj", slab, expert, adapter).chunk(2, dim=-1)
        inner = up * module.act_fn(gate)
        outputs.append(_project(module, "down_proj", inner, expert, adapter))
    return torch.cat(outputs)


def _project(
    module: Any, name: str, x: torch.Tensor, expert: int, adapter: Adapter
) -> torch.Tensor:
    """Return the output of one expert's weight and bias, with the adapter's."""
    weight = getattr(module, name)[expert]
    biases = getattr(module, f"{name}_bias", None)
    bias = None if biases is None else biases[expert]
    if bias is not None and (pair := adapter.get(f"{name}_bias")) is not None:
        delta = pair.expert(0)
        bias = bias + delta.scale * (delta.b[expert] @ delta.a)
    transposed = has_slabs(module) or module.is_transposed
    y = linear(x, weight.T if transposed else weight, bias)
    if (pair := adapter.get(name)) is not None:
        own = pair.expert(expert)
        a, b = (own.b.T, own.a.T) if has_slabs(module) else (own.a, own.b)
        y = y + own.scale * linear(linear(x, a), b)
    return y


def _with_deltas(module: nn.Module, adapter: Adapter) -> nn.Module:
    """Return a copy of a module with other parameters, which shares everything else."""
    made = object.__new__(type(module))
    vars(made).update(vars(module))
    own = dict(vars(module)["_parameters"])
    for name, weights in adapter.items():
        pair, weight = weights.expert(0), own[name]
        if type(weight) is not nn.Parameter or weight.dtype != pair.a.dtype:
            raise UsageError(
                f"the adapter changes parameter {name!r} of a {type(module).__name__}, which is a"
                f" {type(weight).__name__} of {weight.dtype} and not plain {pair.a.dtype}; load the"
                " model with plain weights, or make the loader with another LoaderConfig.dtype"
            )
        own[name] = weight + pair.scale * (pair.b @ pair.a)
    vars(made)["_parameters"] = own
    vars(made).pop("forward", None)  # that of `attach`
    return made
