"""Several adapters as one, with PEFT's numbers: docs/merging.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain
from json import loads
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.functional import pad

from lorax_async import errors
from lorax_async.adapters import weights_file
from lorax_async.adapters.layers import FACTORS, Layer
from lorax_async.adapters.weights_file import LIMITS, FileTensor, WeightsFile
from lorax_async.config import Limits
from lorax_async.errors import UsageError, shorten, shorten_repr
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import PREFIX
from lorax_async.formats.safetensors import parse_header
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.pairing import pair_tensors
from lorax_async.planning.transfer_plan import check_size
from lorax_async.sources.local import CONFIG, find_trusted_adapter, open_weights
from lorax_async.types import MAX_FACTOR, AdapterSpec

STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties")
MAX_PARTS = 64  # all are open at once

Modules = Mapping[str, Sequence[tuple[int, Layer]]]
"""What changes each module, in the model's order, with the numbers of the adapters."""


@dataclass(frozen=True)
class Recipe:
    """How adapters are merged: docs/merging.md. Raises `UsageError` for what makes no sense."""

    strategy: str
    weights: Sequence[float]
    density: float | None = None
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        name, weights, density, seed = self.strategy, self.weights, self.density, self.seed
        if name not in STRATEGIES:
            problem = f"a strategy is one of {', '.join(STRATEGIES)}, not {shorten_repr(name)}"
        elif not isinstance(weights, list | tuple) or not 1 <= len(weights) <= MAX_PARTS:
            problem = f"weights is a list of numbers, one for each of 1 to {MAX_PARTS} adapters"
        elif not all(type(it) in {int, float} and abs(it) <= MAX_FACTOR for it in weights):
            problem = "a weight is a finite number that float32 holds"
        elif name != "linear" and len(weights) < 2:
            problem = f"{name!r} merges two adapters or more; one is for 'linear'"
        elif name == "linear" and density is not None:
            problem = "'linear' keeps every weight; leave the density out"
        elif name != "linear" and not (type(density) in {int, float} and 0 < (density or 0) <= 1):
            problem = f"{name!r} needs a density above 0 and up to 1, not {shorten_repr(density)}"
        elif self.majority_sign not in (("total", "frequency") if "ties" in name else ("total",)):
            problem = "a majority sign is total or frequency, for strategies with 'ties' only"
        elif type(seed) is not int or not 0 <= seed < 1 << 63 or (seed and "dare" not in name):
            problem = "a seed is an integer from 0 to 2**63 - 1, for strategies with 'dare' only"
        else:
            return
        raise UsageError(problem)


def merge_folders(
    folders: Sequence[str | Path], recipe: Recipe, layout: ModelLayout, limits: Limits = LIMITS
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Merge saved adapters of a base into tensors and config, as `load_tensors` takes them. Blocks.

    The folders are the program's own, never a request's. Each is checked as a load checks it, and
    the ranks and size of the result, before a tensor is read. The tensors are F32 and of one rank,
    with the scale 1. Raise what a load of a folder raises, `UnsupportedAdapterError` for more than
    plain LoRA and `IncompatibleAdapterError` for unequal ranks (except "linear").
    """
    if not isinstance(folders, list | tuple) or len(folders) != len(recipe.weights):
        raise UsageError(f"folders is a list of {len(recipe.weights)}, one for each weight")
    found, configs = dict[int, list[tuple[int, Layer]]](), list[bytes]()
    with ExitStack() as stack:
        for number, folder in enumerate(folders):
            with weights_file.naming_adapter(folder):
                key = find_trusted_adapter(folder, limits)
                path = f"{key.location}/{CONFIG}"
                configs.append(weights_file.read_small(path, limits.max_config_bytes))
                prefix, reader, _ = open_weights(key, limits)
                file = stack.enter_context(WeightsFile(reader, prefix, limits))
                if find_trusted_adapter(folder, limits) != key:
                    raise errors.IntegrityError("it was saved while it was opened; merge it again")
                header = parse_header(prefix, reader.nbytes, limits)
                spec = parse_config(configs[-1], limits)
                in_file = {span.start: span.name for span in header.tensors}
                for pair in pair_tensors(header, spec, layout, limits).pairs:
                    a, b = (FileTensor(file, in_file[span.start]) for span in (pair.a, pair.b))
                    part = number, Layer(str(folder), a, b, pair.scale)
                    found.setdefault(pair.module, []).append(part)
        parts = {layout.modules[module].name: found[module] for module in sorted(found)}
        rank = rank_of(recipe, parts)
        if rank > limits.max_rank:
            raise errors.UnsupportedAdapterError(
                f"ranks add up to {rank}, over the limit of {limits.max_rank}; raise"
                " Limits.max_rank, or merge fewer adapters"
            )
        features = sum(sum(layers[0][1].features) for layers in parts.values())
        check_size(4 * rank * features, "once merged", limits)
        start = loads(configs[0]).get("init_lora_weights", True)
        merged = merge_modules(recipe, parts, folders, parse_config(configs[0], limits), start)
    names = [f"{PREFIX}{module}.{factor}.weight" for module in merged for factor in FACTORS]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    return dict(zip(names, chain(*merged.values()), strict=True)), config


def rank_of(recipe: Recipe, modules: Modules) -> int:
    """Return the largest rank of a merged module; raise if its parts cannot be merged."""
    largest = 0
    for module, parts in modules.items():
        shown, ranks = f"module {shorten(module, 200)!r}", [layer.a.shape[0] for _, layer in parts]
        for number, layer in parts:
            if not abs(recipe.weights[number] * layer.scale) <= MAX_FACTOR:
                raise errors.AdapterFormatError(
                    f"{shown} would be scaled by {layer.scale:g} and weighted by"
                    f" {recipe.weights[number]:g}, which no float32 holds; lower the weight"
                )
        if recipe.strategy != "linear" and len(set(ranks)) > 1:
            raise errors.IncompatibleAdapterError(
                f"{shown}: {recipe.strategy!r} merges equal ranks, but the parts have"
                f" {' and '.join(map(str, ranks))}; 'linear' merges any"
            )
        largest = max(largest, sum(ranks) if recipe.strategy == "linear" else ranks[0])
    return largest


def merge_modules(
    recipe: Recipe, modules: Modules, ids: Sequence[object], first: AdapterSpec, start: object
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of each module in float32, padded with zeros to the largest rank.

    `ids` are the adapters', `first` and `start` (`init_lora_weights`) the first one's: PEFT draws
    layers of its largest rank before it merges, which decides what DARE drops for a seed.
    """
    rank, merged = rank_of(recipe, modules), dict[str, tuple[torch.Tensor, torch.Tensor]]()
    drawn = max([first.rank, *(int(entry.value) for entry in first.rank_patterns)])
    generator = torch.Generator().manual_seed(recipe.seed)
    for layers in modules.values() if "dare" in recipe.strategy else ():
        a, b = (torch.empty(drawn * size) for size in layers[0][1].features)
        a.uniform_(generator=generator)
        b.uniform_(generator=generator)
        if start is True:
            a.uniform_(generator=generator)
        elif str(start).lower() == "gaussian":
            a.normal_(generator=generator)
    for module, parts in modules.items():
        a, b = (_combine(recipe, parts, ids, generator, dim) for dim in (0, 1))
        merged[module] = pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - len(a)))
    return merged


def _combine(
    recipe: Recipe,
    parts: Sequence[tuple[int, Layer]],
    ids: Sequence[object],
    generator: torch.Generator,
    dim: int,
) -> torch.Tensor:
    """Read and merge one module's A, whose ranks are along `dim` 0, or its B, along 1."""
    factors, tensors = [(recipe.weights[n], layer.scale) for n, layer in parts], []
    for number, layer in parts:
        with weights_file.naming_adapter(ids[number]):
            tensors.append(weights_file.read(layer.b if dim else layer.a).float())
    if recipe.strategy == "linear":  # two products, rounded twice as PEFT does
        scaled = [it * weight * scale for it, (weight, scale) in zip(tensors, factors, strict=True)]
        return torch.cat(tensors if dim else scaled, dim)
    # A and B share the product of weight and scale; A has the sign.
    products = torch.tensor([weight * scale for weight, scale in factors], dtype=torch.float64)
    weights = (products.abs().sqrt() * (1 if dim else products.sign())).float()
    density, peft = recipe.density or 1.0, _merge_utils()
    if density < 1 and "dare" in recipe.strategy:  # PEFT's function takes no generator
        draw = partial(torch.bernoulli, generator=generator)
        tensors = [it * draw(torch.full_like(it, density)) / density for it in tensors]
    elif density < 1:
        tensors = [peft.magnitude_based_pruning(tensor, density) for tensor in tensors]
    if "ties" not in recipe.strategy:
        return cast(torch.Tensor, peft.task_arithmetic(tensors, weights))
    stacked = torch.stack(tensors)  # signs are elected without weights, and make the sum a mean
    elected = peft.calculate_majority_sign_mask(stacked, recipe.majority_sign)
    return cast(torch.Tensor, peft.disjoint_merge(stacked * weights.view(-1, 1, 1), elected))


@cache
def _merge_utils() -> Any:
    """Return `peft.utils.merge_utils` alone: all of peft takes seconds, and holds up the loop."""
    folder = Path(cast(Any, find_spec("peft")).origin).parent
    return SimpleNamespace(**run_path(f"{folder}/utils/merge_utils.py"))
