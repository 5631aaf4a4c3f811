"""LoRAX's layers in two processes against their definition in float64; `check.py` starts both.

Run as `processes.py RANK FILE`; the first one prints a JSON object: for each way and layer type how
far the output is from the definition, as a fraction of the largest. A process needs no CUDA.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed
from lorax_server.adapters.lora import LoraConfig
from lorax_server.layers import tensor_parallel
from lorax_server.layers.linear import FastLinear
from lorax_server.utils import layers
from measure import FUSED, ROW, TYPES, ServedModel, adapter_data, lorax_layers, use_kernels
from torch import Tensor

HIDDEN, KEY_VALUE, INTERMEDIATE = 64, 32, 96
OUTPUTS = {"q_proj": HIDDEN, "k_proj": KEY_VALUE, "v_proj": KEY_VALUE, "o_proj": HIDDEN}
SHAPES = {name: (outputs, HIDDEN) for name, outputs in OUTPUTS.items()}
SHAPES |= {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
SHAPES["down_proj"] = (HIDDEN, INTERMEDIATE)
RANKS = (4, 20)
TOKENS = [1, 1, 0, 2, 2, 1]
ALPHA = 18

Adapters = list[tuple[float, dict[str, tuple[Tensor, Tensor]]]]
"""Scale, and A and B by layer type, of each adapter."""


class Model(ServedModel):
    """One decoder layer, this process's share of it."""

    adapter_layers = TYPES[:-1]

    def __init__(self, weight: dict[str, Tensor], group: Any, rows: Any) -> None:
        column = {name for names in FUSED.values() for name in names}
        mine = {
            name: whole.chunk(group.size(), 0 if name in column else 1)[group.rank()].contiguous()
            for name, whole in weight.items()
        }
        head = tensor_parallel.TensorParallelHead(
            FastLinear(torch.zeros(8, HIDDEN), None), group, False
        )
        self.layers = lorax_layers(0, mine, group, rows)
        super().__init__([self.layers], head, torch.float32, group)

    def load(self, index: int, rank: int, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        names = {name: module for (_, name), (module, _) in self.target_to_layer.items()}
        tensors = {
            f"base_model.model.{names[name]}.lora_{part}.weight": tensor
            for name, pair in factors.items()
            for part, tensor in zip("AB", pair, strict=True)
        }
        config = LoraConfig("org/base", rank, [], False, ALPHA, False)
        modules = tuple(module for module, _ in self.target_to_layer.values())
        module_map, used = config.map_weights_for_model(tensors, modules)
        for name in self.adapter_layers:
            arguments = self, module_map, name, set(used), True
            weights = config.load_batched_adapter_weights(*arguments)
            self.layer_to_adapter_weights[name].add_adapter(index, weights)


def exact(x: Tensor, weight: Tensor, adapters: Adapters, name: str) -> Tensor:
    """Return a layer's output of all processes, in float64."""
    y = x.double() @ weight.double().T
    for row, index in enumerate(TOKENS):
        if index:
            scale, factors = adapters[index - 1]
            a, b = factors[name]
            y[row] += scale * (b.double() @ (a.double() @ x[row].double()))
    return y


def compare(group: Any, rows: Any, *, prefill: bool) -> dict[str, float]:
    torch.manual_seed(0)
    weight = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    model, adapters = Model(weight, group, rows), Adapters()
    for index, rank in enumerate(RANKS, 1):
        factors = {
            name: (torch.randn(rank, inputs), torch.randn(outputs, rank))
            for name, (outputs, inputs) in SHAPES.items()
        }
        model.load(index, rank, factors)
        adapters.append((ALPHA / rank, factors))
    data, found = adapter_data(model, TOKENS, prefill, None), dict[str, float]()
    size, place = group.size(), group.rank()
    for block, names in FUSED.items():
        for name in (*names, ROW[block]):
            x = torch.randn(len(TOKENS), SHAPES[name][1])
            expected = exact(x, weight[name], adapters, name)
            if name in names:  # this process has its columns of each part
                start = sum(SHAPES[other][0] for other in names[: names.index(name)])
                own = slice(start // size, (start + SHAPES[name][0]) // size)
                y = model.layers[block](x, data)[:, own]
                expected = expected.chunk(size, 1)[place]
            else:  # of the input it has its columns, and of the output all
                y = model.layers[name](x.chunk(size, 1)[place].contiguous(), data)
            far = (y - expected).abs().max() / expected.abs().max()
            torch.distributed.all_reduce(far, torch.distributed.ReduceOp.MAX, group=group)
            found[name] = float(far)
    return found


@torch.inference_mode()
def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, meeting = int(sys.argv[1]), f"file://{sys.argv[2]}"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    use_kernels(True)
    group = torch.distributed.group.WORLD
    found = {}
    for way, prefill in (("decode", False), ("prefill", True)):
        found[way] = compare(group, layers.TensorParallelRowLinear, prefill=prefill)
        of_gemma = tensor_parallel.TensorParallelRowLinear
        found[f"{way}, rows as in Gemma 2"] = compare(group, of_gemma, prefill=prefill)
    if rank == 0:
        json.dump(found, sys.stdout)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
