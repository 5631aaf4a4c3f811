"""Random bases in random worlds: every rank has its rows and columns, and reads no other bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from random import Random

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.adapter_files import ALIGNMENT, TORCH, carry_out, file_of, matrix, plan
from lorax_async.adapter import AdapterSpec
from lorax_async.config import Limits, Shard
from lorax_async.core.layout import ModelLayout, Module, Parallel, Part
from lorax_async.core.moves import GroupPlan
from lorax_async.core.sharding import shard_layout

COLUMN, ROW, REPLICATED = Parallel
LIMITS = Limits(max_rank=32)
WORLDS = st.integers(1, 8)


def tensors_of(layout: ModelLayout, rank: int, dtypes: Sequence[str]) -> dict[str, torch.Tensor]:
    made = {}
    for n, module in enumerate(layout.modules):
        dtype = TORCH[dtypes[n % len(dtypes)]]
        stem = f"base_model.model.{module.name}.lora_"
        made[f"{stem}A.weight"] = torch.randn(rank, module.in_features).to(dtype)
        made[f"{stem}B.weight"] = torch.randn(module.out_features, rank).to(dtype)
    return made


@st.composite
def parts(draw: st.DrawFn, world: int) -> tuple[Part, ...]:
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    made = []
    for _ in range(draw(st.integers(0, 3))):
        unit = draw(st.integers(1, 5))
        replicable = draw(st.booleans())
        few = replicable and draw(st.booleans())
        units = draw(st.sampled_from(divisors)) if few else world * draw(st.integers(1, 3))
        made.append(Part(units * unit, unit, replicable))
    return tuple(made)


@st.composite
def bases(draw: st.DrawFn) -> tuple[ModelLayout, int]:
    """A layout that `world` ranks can share, and this world."""
    world, modules = draw(WORLDS), []
    for layer in range(-1, draw(st.integers(1, 3))):
        for n in range(draw(st.integers(1, 3))):
            kind = draw(st.sampled_from(Parallel))
            fused = draw(parts(world)) if kind is COLUMN else ()
            inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
            inputs *= world if kind is ROW else 1
            outputs *= world if kind is COLUMN else 1
            outputs = sum(part.size for part in fused) or outputs
            name = f"model.layers.{layer}.m{n}"
            modules.append(Module(name, inputs, outputs, layer, kind, parts=fused))
    return ModelLayout(tuple(modules), 3, "BF16", "model."), world


def held_by(module: Module, a: torch.Tensor, b: torch.Tensor, shard: Shard) -> list[torch.Tensor]:
    """A and B of one rank, by torch's own slicing."""
    if module.parallel is ROW:
        return [a.chunk(shard.world_size, 1)[shard.rank], b]
    if module.parallel is REPLICATED:
        return [a, b]
    made = []
    for part in module.parts or (Part(len(b)),):
        rows, b = b[: part.size], b[part.size :]
        pieces = min(shard.world_size, part.size // part.unit)
        made.append(rows.chunk(pieces)[shard.rank // (shard.world_size // pieces)])
    return [a, torch.cat(made)]


def moved(group: GroupPlan) -> list[tuple[int, int]]:
    spans = [read.source for read in group.reads]
    spans += [piece for move in group.converts for piece in move.sources]
    return sorted(piece for span in spans for piece in span.ranges())


def check_bytes(groups: Sequence[GroupPlan], file: bytes, wanted: int) -> None:
    """Moves read `wanted` bytes, none twice, and `spans` say which."""
    for group in groups:
        covered = [n for start, stop in moved(group) for n in range(start, stop)]
        assert len(covered) == len(set(covered))
        told = [piece for span in group.spans for piece in span.ranges()]
        assert covered == [n for start, stop in told for n in range(start, stop)]
        for one, two in pairwise(group.spans):
            assert one.end < two.start or (one.end == two.start and max(one.rows, two.rows) > 1)
        wanted -= len(covered)
    assert wanted == 0


@settings(max_examples=150, deadline=None)
@given(
    base=bases(),
    rank=st.integers(1, 20),
    dtypes=st.lists(st.sampled_from(sorted(TORCH)), min_size=1, max_size=2),
    dtype=st.sampled_from(sorted(TORCH)),
    multiple=st.sampled_from([1, 8]),
    most=st.sampled_from([256, 1 << 20]),
    order=st.randoms(use_true_random=False),
)
def test_every_rank_has_its_rows_and_columns_and_reads_no_other(
    base: tuple[ModelLayout, int],
    rank: int,
    dtypes: list[str],
    dtype: str,
    multiple: int,
    most: int,
    order: Random,
) -> None:
    layout, world = base
    tensors = list(tensors_of(layout, rank, dtypes).items())
    order.shuffle(tensors)
    file, saved = file_of(tensors), safetensors.torch.load(file_of(tensors))
    whole: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for shard in [Shard(n, world) for n in range(world)]:
        sharding = shard_layout(layout, shard)
        made = plan(
            file,
            AdapterSpec(rank=rank, alpha=8.0),
            layout,
            dtype=dtype,
            rank_multiple=multiple,
            limits=LIMITS,
            staging_move_bytes=most,
            cuts=sharding.cuts,
        )
        wanted = 0
        for group in made.groups:
            extent = carry_out(group, file, dtype)
            for row in group.rows:
                module, held = layout.modules[row.module], sharding.held.modules[row.module]
                a = matrix(extent, row.a, row.padded_rank, held.in_features, dtype)
                b = matrix(extent, row.b, held.out_features, row.padded_rank, dtype)
                assert (row.rank, row.a % ALIGNMENT, row.b % ALIGNMENT) == (rank, 0, 0)
                assert not a[rank:].any()
                assert not b[:, rank:].any()
                full_a, full_b = (
                    saved[f"base_model.model.{module.name}.lora_{x}.weight"] for x in "AB"
                )
                expected = held_by(module, full_a, full_b, shard)
                assert torch.equal(a[:rank], expected[0].to(TORCH[dtype]))
                assert torch.equal(b[:, :rank], expected[1].to(TORCH[dtype]))
                whole.setdefault(module.name, []).append((a[:rank], b[:, :rank]))
                wanted += sum(tensor.nbytes for tensor in expected)
        check_bytes(made.groups, file, wanted)
    assert_whole(whole, layout, saved)


def assert_whole(
    ranks: dict[str, list[tuple[torch.Tensor, torch.Tensor]]],
    layout: ModelLayout,
    saved: dict[str, torch.Tensor],
) -> None:
    """All ranks' shares, side by side, are the tensors that were saved."""
    for module in layout.modules:
        a, b = (saved[f"base_model.model.{module.name}.lora_{x}.weight"] for x in "AB")
        shares = ranks.pop(module.name)
        if module.parallel is ROW:
            joined = torch.cat([share for share, _ in shares], 1)
            assert torch.equal(joined, a.to(joined.dtype))
        if module.parallel is COLUMN and not any(part.replicable for part in module.parts):
            ends = [*accumulate(part.size // len(shares) for part in module.parts)][:-1]
            split = [share.tensor_split(ends) for _, share in shares]
            joined = torch.cat([part for parts in zip(*split, strict=True) for part in parts])
            assert torch.equal(joined, b.to(joined.dtype))
    assert not ranks
