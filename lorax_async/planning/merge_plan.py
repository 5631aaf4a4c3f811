"""Plan a merge: the computed file, and the bytes of its parts that it is made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from lorax_async.config import Limits
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    LoraxError,
    UnsupportedAdapterError,
    shorten,
)
from lorax_async.formats.peft_config import MAX_PATTERNS, WHAT, parse_config
from lorax_async.formats.peft_names import PREFIX, TensorRole
from lorax_async.formats.safetensors import (
    TensorDescription,
    TensorSpan,
    parse_header,
    write_header,
)
from lorax_async.formats.strict_json import parse_object
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.pairing import MAX_MATCHING_STEPS, TensorPair, pair_tensors
from lorax_async.planning.transfer_plan import check_size
from lorax_async.types import MAX_FACTOR, AdapterSpec, Merge, MergedKey

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


class PartFile(NamedTuple):
    """One adapter of a merge: its config, header and size of weights."""

    config: bytes
    prefix: bytes
    nbytes: int


class Piece(NamedTuple):
    """A tensor of one part, its weight in the merge, and its own scale."""

    part: int
    span: TensorSpan
    weight: float
    scale: float


class MergedTensor(NamedTuple):
    """A `[rank, in]` or B `[out, rank]` of one module, at [start, stop) of the merged file.

    Where the pieces have less than the full rank, the rest is zero.
    """

    factor: TensorRole
    shape: tuple[int, int]
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    def is_padded(self, merge: Merge) -> bool:
        """Return whether the pieces have less than the full rank."""
        along = 0 if self.factor is TensorRole.A else 1
        ranks = [piece.span.shape[along] for piece in self.pieces]
        return (sum(ranks) if merge.strategy == "linear" else ranks[0]) < self.shape[along]


class NewLayers(NamedTuple):
    """The layers that PEFT's `add_weighted_adapter` creates and initialises before it merges.

    `sizes` are (in, out) features in the model's order; `start` is `init_lora_weights`.
    """

    rank: int
    sizes: tuple[tuple[int, int], ...]
    start: object


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merged adapter: its config, its header, and its tensors in file order.

    `dtype` is "F32", "F16" or "BF16".
    """

    config: bytes
    prefix: bytes
    dtype: str
    tensors: tuple[MergedTensor, ...]
    new_layers: NewLayers

    @property
    def nbytes(self) -> int:
        return self.tensors[-1].stop


def plan_merge(
    key: MergedKey, parts: Sequence[PartFile], layout: ModelLayout, *, dtype: str, limits: Limits
) -> MergePlan:
    """Check every part as a load of it would, and the parts against each other.

    Raises
    ------
    AdapterFormatError, IncompatibleAdapterError, UnsupportedAdapterError
        The message names the part or the module.
    """
    merge = key.merge
    specs: list[AdapterSpec] = []
    pieces: dict[int, list[tuple[TensorPair, int]]] = {}
    for number, part in enumerate(parts):
        try:
            spec, pairs = _pair_part(part, layout, limits)
        except LoraxError as error:
            raise error.prefixed(part_words(key, number)) from error.__cause__
        specs.append(spec)
        for pair in pairs:
            pieces.setdefault(pair.module, []).append((pair, number))
    modules = [layout.modules[module] for module in sorted(pieces)]
    paired = [pieces[module] for module in sorted(pieces)]
    needed = {
        module.name: _merged_rank(merge, module.name, pairs, limits)
        for module, pairs in zip(modules, paired, strict=True)
    }
    config, ranks = write_config(needed, {spec.base_model for spec in specs}, limits)
    shapes = [
        (module.name, factor, shape)
        for module in modules
        for factor, shape in (
            (TensorRole.A, (ranks[module.name], module.in_features)),
            (TensorRole.B, (module.out_features, ranks[module.name])),
        )
    ]
    prefix, places = write_header(
        [
            TensorDescription(_tensor_name(name, factor), dtype, shape)
            for name, factor, shape in shapes
        ]
    )
    tensors = tuple(
        MergedTensor(factor, shape, *place, tuple(_pieces(merge, factor, paired[n // 2])))
        for n, ((_, factor, shape), place) in enumerate(zip(shapes, places, strict=True))
    )
    check_size(places[-1][1], "in its merged file", limits)
    sizes = tuple((module.in_features, module.out_features) for module in modules)
    new_layers = NewLayers(_largest_rank(specs[0]), sizes, _initialisation(parts[0].config, limits))
    return MergePlan(config, prefix, dtype, tensors, new_layers)


def part_words(key: MergedKey, number: int) -> str:
    """Return the prefix of an error about one part: its number and its name without the folder."""
    name = str(key.merge.parts[number]).rstrip("/").rpartition("/")[2]
    return f"part {number + 1} ({shorten(name, 100)!r}): "


def write_config(
    ranks: Mapping[str, int], bases: set[str | None], limits: Limits
) -> tuple[bytes, dict[str, int]]:
    """Return a config with scale 1 and a rank per module, and the resulting ranks.

    If a config cannot express the ranks, or would be too long, all modules get the largest.
    """
    base = next(iter(bases)) if len(bases) == 1 else None
    config = _config(ranks, base)
    if _config_expresses(config, ranks, limits):
        return config, dict(ranks)
    padded = dict.fromkeys(ranks, max(ranks.values()))
    return _config(padded, base), padded


def _config(ranks: Mapping[str, int], base: str | None) -> bytes:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: other for name, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    return json.dumps(config, separators=(",", ":")).encode()


def _config_expresses(config: bytes, ranks: Mapping[str, int], limits: Limits) -> bool:
    """Return whether the config gives every module its rank: a name may be another's suffix."""
    exceptions = len(ranks) - max(Counter(ranks.values()).values())
    characters = sum(2 * len(_tensor_name(name, TensorRole.A)) for name in ranks)
    if exceptions > MAX_PATTERNS or 2 * exceptions * characters > MAX_MATCHING_STEPS:
        return False
    if len(config) > limits.max_config_bytes:
        return False
    spec = parse_config(config, limits)
    return all(spec.rank_of(name) == spec.alpha_of(name) == rank for name, rank in ranks.items())


def _tensor_name(module: str, factor: TensorRole) -> str:
    return f"{PREFIX}{module}.lora_{factor.value}.weight"


def _pair_part(
    part: PartFile, layout: ModelLayout, limits: Limits
) -> tuple[AdapterSpec, list[TensorPair]]:
    spec = parse_config(part.config, limits)
    header = parse_header(part.prefix, part.nbytes, limits)
    for span in header.tensors:
        if not span.name.endswith(_SUFFIXES):
            raise UnsupportedAdapterError(
                f"tensor {shorten(span.name, 200)!r} is not plain LoRA, and only plain LoRA can be"
                " merged; load this adapter by itself"
            )
    return spec, pair_tensors(header, spec, layout, limits)


def _merged_rank(
    merge: Merge, module: str, pairs: Sequence[tuple[TensorPair, int]], limits: Limits
) -> int:
    ranks = [pair.rank for pair, _ in pairs]
    shown = " and ".join(map(str, ranks))
    for pair, number in pairs:
        if not abs(merge.weights[number] * pair.scale) <= MAX_FACTOR:
            raise AdapterFormatError(
                f"module {module!r}: weight {merge.weights[number]:g} times the scale of part"
                f" {number + 1} ({pair.scale:g}) is more than float32 holds; lower the weight"
            )
    if merge.strategy != "linear":
        if len(set(ranks)) > 1:
            raise IncompatibleAdapterError(
                f"module {module!r}: {merge.strategy!r} merges equal ranks, but the parts have"
                f" {shown}; 'linear' merges any"
            )
        return ranks[0]
    if sum(ranks) > limits.max_rank:
        raise UnsupportedAdapterError(
            f"module {module!r}: 'linear' adds the ranks up, and {shown} make {sum(ranks)}, above"
            f" the limit of {limits.max_rank}; raise Limits.max_rank, or merge fewer adapters"
        )
    return sum(ranks)


def _pieces(
    merge: Merge, factor: TensorRole, pairs: Sequence[tuple[TensorPair, int]]
) -> Iterator[Piece]:
    for pair, number in pairs:
        span = pair.a if factor is TensorRole.A else pair.b
        yield Piece(number, span, merge.weights[number], pair.scale)


def _largest_rank(spec: AdapterSpec) -> int:
    return max(chain([spec.rank], (int(entry.value) for entry in spec.rank_patterns)))


def _initialisation(config: bytes, limits: Limits) -> object:
    members = parse_object(
        config, what=WHAT, max_bytes=limits.max_config_bytes, max_depth=limits.max_json_depth
    )
    return members.get("init_lora_weights", True)
