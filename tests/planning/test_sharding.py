"""Shards by hand: which rows and columns a rank holds, what is read of them, and refusals."""

import re
from typing import Any

import pytest
from adapter_files import file_of, pair, plan
from refusals import refusals

from lorax_async import ConfigError, IncompatibleAdapterError, Limits, Shard
from lorax_async.formats.spans import ByteSpan
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism
from lorax_async.planning.sharding import ModuleCut, shard_layout
from lorax_async.planning.transfer_plan import GroupPlan, ReadMove
from lorax_async.types import AdapterSpec

COLUMN, ROW, REPLICATED = Parallelism
SPEC = AdapterSpec(rank=4, alpha=4.0)


def layout(*modules: Module) -> ModelLayout:
    return ModelLayout(modules, 1, "F32")


def column(
    outputs: int, *parts: FusedPart, name: str = "layers.0.up_proj", inputs: int = 16
) -> Module:
    return Module(name, inputs, outputs, 0, COLUMN, parts=parts)


def row(inputs: int, name: str = "layers.0.down_proj") -> Module:
    return Module(name, inputs, 16, 0, ROW)


def adapter(*modules: Module, rank: int = 4) -> bytes:
    pairs = (pair(m.name, m.in_features, m.out_features, rank=rank, dtype="F32") for m in modules)
    return file_of([tensor for each in pairs for tensor in each])


def planned(
    module: Module, shard: Shard, *, rank: int = 4, dtype: str = "F32", **how: Any
) -> tuple[GroupPlan, int]:
    """The plan of an adapter of this one module, and where its tensors begin in the file."""
    file, base = adapter(module, rank=rank), layout(module)
    spec, cuts = AdapterSpec(rank=rank, alpha=float(rank)), shard_layout(base, shard).cuts
    (group,) = plan(file, spec, base, dtype=dtype, cuts=cuts, **how).groups
    return group, len(file) - 4 * rank * (module.in_features + module.out_features)


@pytest.mark.parametrize("shard", [None, Shard(0, 1)])
def test_a_world_of_one_holds_everything_as_it_is(shard: Shard | None) -> None:
    """Also what no larger world could share."""
    base = layout(column(7, name="layers.0.c_attn"), row(5))
    sharding = shard_layout(base, shard)
    assert sharding.whole is sharding.held is base
    assert sharding.cuts == ()


@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (1, 4), (2, 4), (3, 8), (4, 8)])
def test_q_k_and_v_are_cut_by_heads(rank: int, world: int) -> None:
    """8 heads of q and 2 of k and v, of 4 features; half of the ranks hold the first of k."""
    fused = column(48, FusedPart(32, 4), FusedPart(8, 4, True), FusedPart(8, 4, True))
    sharding = shard_layout(layout(fused), Shard(rank, world))
    size, kept = 32 // world, FusedPart(4, 4, True)
    k, v = ((32, 36), (40, 44)) if rank < world // 2 else ((36, 40), (44, 48))
    assert sharding.cuts == (ModuleCut(((rank * size, (rank + 1) * size), k, v), (0, 16)),)
    (held,) = sharding.held.modules
    assert held.parts == (FusedPart(size, 4), kept, kept)
    assert (held.in_features, held.out_features) == (16, size + 8)


def test_a_file_is_checked_against_the_whole_base() -> None:
    """An adapter of a rank's sizes is none of this base's."""
    base = layout(column(12))
    file = adapter(column(6))
    with pytest.raises(IncompatibleAdapterError, match=r"16 → 6, the base's is 16 → 12"):
        plan(file, SPEC, base, cuts=shard_layout(base, Shard(0, 2)).cuts)


def test_pieces_are_cast_together_as_far_as_they_adjoin_on_the_device() -> None:
    """A is [4, 64], B [16, 4]; moves hold two halves of rows of F32, then one and a half."""
    how: dict[str, Any] = {"dtype": "BF16", "limits": Limits(max_rank=32)}
    group, start = planned(row(64), Shard(1, 2), staging_move_bytes=256, **how)
    whole_b = ByteSpan(start + 1024, start + 1280)
    assert [move.sources for move in group.converts] == [
        (ByteSpan(start + 128, start + 256, 2, 256),),
        (ByteSpan(start + 640, start + 768, 2, 256),),
        (whole_b,),
    ]
    assert [move.target for move in group.converts] == [0, 128, 256]
    assert group.spans == (ByteSpan(start + 128, start + 256, 4, 256), whole_b)
    group, _ = planned(row(64), Shard(1, 2), staging_move_bytes=192, **how)
    first, second, *_ = (move.sources for move in group.converts)
    start += 128
    assert first == (ByteSpan(start, start + 128), ByteSpan(start + 256, start + 320))
    assert second == (ByteSpan(start + 320, start + 384), ByteSpan(start + 512, start + 640))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("rank", [5, 205])
def test_a_plan_of_many_rows_has_no_more_to_remember(dtype: str, multiple: int, rank: int) -> None:
    """A is [rank, 24]: rows of 96 bytes, of which the second of three ranks has bytes 32 to 64."""
    how: dict[str, Any] = {"rank_multiple": multiple, "limits": Limits(max_rank=256)}
    group, start = planned(row(24), Shard(1, 3), rank=rank, dtype=dtype, **how)
    b = start + 96 * rank
    assert group.spans == (ByteSpan(start + 32, start + 64, rank, 96), ByteSpan(b, b + 64 * rank))
    assert len(group.reads) + len(group.converts) == 2
    if dtype == "F32" and rank % multiple == 0:
        assert group.reads == (
            ReadMove(start + 32, rank * 32, 0, rank, 96),
            ReadMove(b, 64 * rank, -(-32 * rank // 64) * 64),
        )


def test_what_many_pieces_take_to_remember_is_counted() -> None:
    """Of B there is one for each part, of A one for all rows, and else one for both."""
    base = layout(column(24, *[FusedPart(4)] * 6))
    file = adapter(*base.modules)
    whole = plan(file, SPEC, base)
    cut = plan(file, SPEC, base, cuts=shard_layout(base, Shard(1, 4)).cuts)
    assert [made.needs(holdable=False).weight for made in (whole, cut)] == [1, 7]


NOT_SHARED: dict[str, list[tuple[Module, int]]] = {
    r"'lm_head'.*50,257 output.* 2 ranks.*layout.replicate\('lm_head'\)": [
        (Module("lm_head", 16, 50257, 1, COLUMN), 2)
    ],
    "'layers.0.down_proj'.* 10 input features.* 4 ranks.*'down_proj'": [(row(10), 4)],
    "a part of 4 × 8 output features.* 8 ranks": [(column(48, FusedPart(32, 8), FusedPart(16)), 8)],
    "a part of 2 × 4 output.*another world_size": [(column(8, FusedPart(8, 4, True)), 3)],
    "a part of 6 × 4 output.* 4 ranks": [(column(24, FusedPart(24, 4, True)), 4)],
    r"6 output features.*take a layout that knows them \(layouts.from_pretrained\)": [
        (column(6, name="layers.0.k_proj"), 4)
    ],
    "'layers.0.qkv_proj' may be fused.*parts": [(column(24, name="layers.0.qkv_proj"), 2)],
    "may be fused.*from_pretrained or from_module": [
        (column(24, name=f"layers.0.{name}"), 2)
        for name in ("c_attn", "query_key_value", "gate_up_proj")
    ],
}


def test_what_cannot_be_shared() -> None:
    for words, cases in NOT_SHARED.items():
        for module, world in cases:
            base, shards = layout(module), [Shard(rank, world) for rank in range(world)]
            refusals(lambda shard: shard_layout(base, shard), ConfigError, {words: shards})
            whole = ModuleCut(((0, module.out_features),), (0, module.in_features))
            assert shard_layout(base.replicate(module.name), shards[0]).cuts == (whole,)


def test_a_few_are_named_and_the_rest_are_counted() -> None:
    base = ModelLayout(tuple(Module(f"layers.{n}.w1", 8, 9, n, COLUMN) for n in range(5)), 5)
    with pytest.raises(ConfigError, match=re.escape("(and 2 more modules)")) as caught:
        shard_layout(base, Shard(0, 2))
    assert str(caught.value).count("9 output features") == 3
    assert shard_layout(base, Shard(1, 3)).held.modules[4].out_features == 3


def test_a_layout_replicates_what_it_is_told_to() -> None:
    base = ModelLayout(tuple(Module(f"h.{n}.attn.c_attn", 8, 9, n, COLUMN) for n in range(2)), 2)
    assert {m.parallel for m in base.replicate("c_attn").modules} == {REPLICATED}
    assert base.replicate("attn.c_attn") == base.replicate("c_attn")
    one = base.replicate("h.1.attn.c_attn")
    assert [m.parallel for m in one.modules] == [COLUMN, REPLICATED]
    for wrong in ("attn", "_attn", "c_attn.", ""):
        with pytest.raises(ConfigError, match="no module is called"):
            base.replicate("c_attn", wrong)
