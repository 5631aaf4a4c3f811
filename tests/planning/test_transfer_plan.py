"""Plans, carried out by slices and torch casts, against safetensors' own reader.

Which tensors and flags belong together is PEFT's own account.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_files import ALIGNMENT, TORCH, carry_out, file_of, layout_of, matrix, pair, plan
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusals

from lorax_async.config import Limits, Shard
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    ConfigError,
    IncompatibleAdapterError,
    InternalError,
    UnsupportedAdapterError,
)
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.tensor_kinds import TensorRole
from lorax_async.planning.layout import FusedPart as OutputPart
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.planning.sharding import shard_layout
from lorax_async.planning.transfer_plan import (
    ConvertMove,
    ExtraSlot,
    GroupPlan,
    ReadMove,
    StagingWindow,
    TransferPlan,
    windows,
)
from lorax_async.types import AdapterSpec, ModulePattern

COLUMN, ROW, REPLICATED = Parallelism
SPEC = AdapterSpec(rank=16, alpha=32.0)
LIMITS = Limits(max_rank=32)
PREFIX = "base_model.model."
Patch = pytest.MonkeyPatch
Named = tuple[str, torch.Tensor]
DORA, BIAS = "lora_magnitude_vector", "lora_B.bias"
PARTS = {DORA: TensorRole.MAGNITUDE, BIAS: TensorRole.BIAS}


def spec_of(vector: str | None, rank: int = 2) -> AdapterSpec:
    return AdapterSpec(rank=rank, alpha=4.0, dora=vector == DORA, lora_bias=vector == BIAS)


@st.composite
def output_parts(draw: st.DrawFn, world: int) -> tuple[OutputPart, ...]:
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    made = []
    for _ in range(draw(st.integers(0, 3))):
        unit = draw(st.integers(1, 5))
        replicable = draw(st.booleans())
        few = replicable and draw(st.booleans())
        units = draw(st.sampled_from(divisors)) if few else world * draw(st.integers(1, 3))
        made.append(OutputPart(units * unit, unit, replicable))
    return tuple(made)


@st.composite
def bases(draw: st.DrawFn, world: int) -> ModelLayout:
    """A layout that `world` ranks can share."""
    count = draw(st.sampled_from([1, 2, 12] if world < 3 else [1, 2]))
    sizes = st.sampled_from([1, 5, 9, 32, 64] if world < 3 else [1, 5, 9, 32])
    kind = draw(st.sampled_from([REPLICATED, ROW]))
    embedding = Module("model.embed", 3 * world, draw(sizes), -1, kind, embedding=True)
    modules = [embedding, Module("lm_head", draw(sizes), world * draw(sizes), count, COLUMN)]
    for n in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(Parallelism))
        fused = draw(output_parts(world)) if kind is COLUMN else ()
        inputs = draw(sizes) * (world if kind is ROW else 1)
        outputs = draw(sizes) * (world if kind is COLUMN else 1)
        outputs = sum(part.size for part in fused) or outputs
        modules += [
            Module(f"model.layers.{layer}.m{n}", inputs, outputs, layer, kind, parts=fused)
            for layer in range(count)
        ]
    return ModelLayout(tuple(modules), count, "BF16", "model.")


@dataclass
class Adapter:
    """A file and its base; tensors as safetensors reads them, by module: A, B and vectors."""

    layout: ModelLayout
    file: bytes
    vector: str | None
    rank: int
    tensors: dict[str, list[torch.Tensor]]


@st.composite
def adapters(draw: st.DrawFn, world: int) -> Adapter:
    layout = draw(bases(world))
    vector = draw(st.sampled_from([None, DORA, BIAS]))
    modules = [m for m in layout.modules if not (m.embedding and vector == BIAS)]
    chosen = draw(st.lists(st.sampled_from(modules), min_size=1, max_size=9, unique=True))
    rank, bare = draw(st.integers(1, 20)), draw(st.booleans())
    dtypes = draw(st.lists(st.sampled_from(sorted(TORCH)), min_size=1, max_size=3, unique=True))
    named: dict[str, list[Named]] = {}
    for n, m in enumerate(chosen):
        path = m.name.removeprefix("model.") if bare else m.name
        how: dict[str, Any] = {"dtype": dtypes[n % len(dtypes)], "own": dtypes[-1]}
        how |= {"rank": rank, "vector": vector, "embedding": m.embedding}
        named[m.name] = pair(path, m.in_features, m.out_features, **how)
    flat = [each for tensors in named.values() for each in tensors]
    if draw(st.booleans()):
        file = file_of(draw(st.permutations(flat)))
    else:
        file = safetensors.torch.save(dict(flat), {"format": "pt"})  # it chooses the order
    loaded = safetensors.torch.load(file)
    found = {name: [loaded[each] for each, _ in tensors] for name, tensors in named.items()}
    return Adapter(layout, file, vector, rank, found)


def held_by(module: Module, tensors: list[torch.Tensor], shard: Shard) -> list[torch.Tensor]:
    """What one rank has of A, B and vectors, by torch's own slicing."""
    a, *rest = tensors
    if module.parallel is ROW:
        return [a.chunk(shard.world_size, 1)[shard.rank], *rest]
    if module.parallel is REPLICATED:
        return tensors
    made = [a]
    for whole in rest:
        kept, left = [], whole
        for part in module.parts or (OutputPart(len(whole)),):
            rows, left = left[: part.size], left[part.size :]
            pieces = min(shard.world_size, part.size // part.unit)
            kept.append(rows.chunk(pieces)[shard.rank // (shard.world_size // pieces)])
        made.append(torch.cat(kept))
    return made


def check_bytes(made: TransferPlan, wanted: int, most: int) -> None:
    """Moves read `wanted` bytes, none twice, and `spans` say which; casts hold `most` bytes."""
    for group in made.groups:
        assert group.nbytes % ALIGNMENT == 0
        moved = [read.source for read in group.reads]
        moved += [piece for move in group.converts for piece in move.sources]
        pieces = sorted(piece for span in moved for piece in span.ranges())
        covered = [n for start, stop in pieces for n in range(start, stop)]
        assert len(covered) == len(set(covered))
        told = [piece for span in group.spans for piece in span.ranges()]
        assert covered == [n for start, stop in told for n in range(start, stop)]
        for one, two in pairwise(group.spans):
            assert one.end < two.start or (one.end == two.start and max(one.rows, two.rows) > 1)
        for convert in group.converts:
            assert convert.nbytes <= most
            assert convert.rows * convert.row_pitch * TORCH[made.dtype].itemsize <= most
        wanted -= len(covered)
    assert wanted == 0


def check_windows(
    group: GroupPlan, extent: torch.Tensor, file: bytes, dtype: str, nbytes: int
) -> None:
    """Parts of at most `nbytes` that are filled on their own, none smaller than it must be."""
    item = TORCH[dtype].itemsize
    spans = [(c.target, c.target + c.rows * c.row_pitch * item) for c in group.converts]

    def may_be_cut(place: int) -> bool:
        if any(first < place < last for first, last in spans):
            return False
        return place % 64 == 0 or any(place in span for span in spans) or place == group.nbytes

    made = windows(group, nbytes, item)
    assert [each.start for each in made] == [0, *(each.stop for each in made[:-1])]
    assert made[-1].stop == group.nbytes
    assert all(0 < each.nbytes <= nbytes and may_be_cut(each.stop) for each in made)
    parts = [GroupPlan(0, w.nbytes, w.reads, w.converts, w.zeros, (), ()) for w in made]
    assert torch.equal(torch.cat([carry_out(part, file, dtype) for part in parts]), extent)
    assert sum(len(each.converts) for each in made) == len(group.converts)
    assert sum(len(w.reads) for w in made) <= 3 * (len(group.reads) + len(made) - 1)
    assert sum(read.nbytes for w in made for read in w.reads) == sum(r.nbytes for r in group.reads)
    for each in made[:-1]:
        beyond = range(each.stop + -each.stop % 64, each.start + nbytes + 1, 64)
        assert [place for place in beyond if may_be_cut(place)] in ([], [each.stop])


SETTINGS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([None, *TORCH]),
        "rank_multiple": st.sampled_from([1, 8]),
        "staging_move_bytes": st.sampled_from([256, 1_000, 1 << 20]),
    }
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 8) | st.just(1), SETTINGS, st.sampled_from([0, 88]))
def test_every_rank_has_its_rows_and_columns_of_every_tensor(
    data: st.DataObject, world: int, how: dict[str, Any], more: int
) -> None:
    adapter = data.draw(adapters(world))
    layout, file, rank = adapter.layout, adapter.file, adapter.rank
    stored, multiple, most = how["dtype"] or "BF16", how["rank_multiple"], how["staging_move_bytes"]
    spec = spec_of(adapter.vector, rank)
    for shard in [Shard(n, world) for n in range(world)]:
        sharding = shard_layout(layout, shard)
        made = plan(file, spec, layout, limits=LIMITS, cuts=sharding.cuts, **how)
        assert (made.dtype, made.rank, made.file_bytes) == (stored, rank, len(file))
        assert made.nbytes == sum(group.nbytes for group in made.groups)
        assert made.has_extras == (adapter.vector is not None)
        layers = [group.layer for group in made.groups]
        assert layers == sorted(set(layers))
        expected = {
            name: held_by(layout.modules[layout.index(name)], tensors, shard)
            for name, tensors in adapter.tensors.items()
        }
        check_bytes(made, sum(t.nbytes for each in expected.values() for t in each), most)
        for group in made.groups:
            extent = carry_out(group, file, stored)  # no byte twice, none outside
            check_windows(group, extent, file, stored, most + more)
            for row in group.rows:
                held = sharding.held.modules[row.module]
                assert (held.layer, row.rank) == (group.layer, rank)
                assert (row.padded_rank - rank) in range(multiple)
                assert row.padded_rank % multiple == row.a % ALIGNMENT == row.b % ALIGNMENT == 0
                a = matrix(extent, row.a, row.padded_rank, held.in_features, stored)
                b = matrix(extent, row.b, held.out_features, row.padded_rank, stored)
                whole_a, whole_b, *_ = expected[held.name]
                assert torch.equal(a[:rank], whole_a.to(a.dtype))
                assert torch.equal(b[:, :rank], whole_b.to(b.dtype))
                assert not a[rank:].any()
                assert not b[:, rank:].any()
                if adapter.vector is None:
                    del expected[held.name]
            for vector in group.extras:
                whole = expected.pop(sharding.held.modules[vector.module].name)[2]
                assert vector.offset % ALIGNMENT == 0
                assert (TORCH[vector.dtype], vector.shape) == (whole.dtype, whole.shape)
                assert vector.part is PARTS[adapter.vector or ""]
                there = extent[vector.offset : vector.offset + vector.nbytes]
                assert torch.equal(there.view(whole.dtype), whole)
        assert not expected


TWELVE = [(f"model.layers.{n}.{kind}", 64, 96, n) for n in range(12) for kind in "qv"]
Q, V, EMBED = "model.layers.0.q", "model.layers.0.v", "model.embed"


def twelve_layers(dtype: str = "BF16") -> bytes:
    tensors = dict(sum((pair(name, 64, 96, dtype=dtype) for name, *_ in TWELVE), []))
    return safetensors.torch.save(tensors, {"format": "pt"})


def test_a_layer_of_a_file_by_peft_is_one_read() -> None:
    file = twelve_layers()
    made = plan(file, SPEC, layout_of(*TWELVE))
    size = 2 * (16 * 64 + 96 * 16) * 2
    start = len(file) - 12 * size
    # The file's order is 0, 1, 10, 11, 2, …: the plan's is that of the layers.
    offsets = {n: start + k * size for k, n in enumerate([0, 1, 10, 11, *range(2, 10)])}
    assert [group.layer for group in made.groups] == list(range(12))
    for group in made.groups:
        assert group.reads == (ReadMove(offsets[group.layer], size, target=0),)
        assert group.spans == (ByteSpan(offsets[group.layer], offsets[group.layer] + size),)
        assert (group.nbytes, group.converts, group.zeros) == (size, (), ())


def test_a_layer_with_magnitudes_is_one_read_where_nothing_is_cast() -> None:
    """64 bytes of A, 64 of B, 64 of the magnitude (of 16, 8 and 32 elements)."""
    file = file_of(pair(Q, 16, 16, rank=1, dtype="F32", vector=DORA))
    layout = ModelLayout((Module(Q, 16, 16, 0, COLUMN),), 1, "F32")
    [group] = plan(file, spec_of(DORA, 1), layout).groups
    assert group.reads == (ReadMove(len(file) - 192, 192, target=0),)
    assert group.extras == (ExtraSlot(0, TensorRole.MAGNITUDE, 128, (16,), "F32"),)
    assert (group.nbytes, group.converts) == (192, ())


def test_a_cast_layer_is_a_few_large_moves() -> None:
    file = twelve_layers("F32")
    elements = 2 * (16 * 64 + 96 * 16)
    for count, how in ((1, {}), (2, {"staging_move_bytes": 3 * elements})):
        [first, *_] = plan(file, SPEC, layout_of(*TWELVE), **how).groups
        start, part = first.spans[0].start, elements // count
        assert first.converts == tuple(
            ConvertMove(start + 4 * at, 4 * part, "F32", 1, part, target=2 * at, row_pitch=part)
            for at in range(0, elements, part)
        )
        assert first.nbytes == 2 * elements


def test_patterns_are_matched_against_the_path_in_the_file() -> None:
    # PEFT matched them against the model that was trained, here the bare backbone.
    bare = ModulePattern("layers.0.q", lambda module: module == "layers.0.q", 2)
    spec = AdapterSpec(rank=16, alpha=3.0, rslora=True, rank_patterns=(bare,))
    layout = layout_of((Q, 8, 8, 0), ("model.layers.1.q", 8, 8, 1))
    file = file_of([*pair("layers.0.q", 8, 8, rank=2), *pair("layers.1.q", 8, 8)])
    made = plan(file, spec, layout)
    assert [row.rank for group in made.groups for row in group.rows] == [2, 16]
    assert [row.scale for group in made.groups for row in group.rows] == [3.0 / 2**0.5, 0.75]
    assert made.rank == 16
    with pytest.raises(AdapterFormatError, match=r"model.layers.0.q.*pair of rank 16"):
        plan(file_of(pair(Q, 8, 8, rank=2)), spec, layout)


EMBEDDING = Module(EMBED, 20, 8, -1, REPLICATED, embedding=True)
LINEAR = layout_of((Q, 8, 4, 0), (V, 8, 4, 0), ("lm_head", 8, 9, 12))
LAYOUT = replace(LINEAR, modules=(*LINEAR.modules, EMBEDDING))
GOOD = pair(Q, 8, 4)
A, B = GOOD
QB, QM, QP = (pair(Q, 8, 4, vector=vector) for vector in (BIAS, DORA, None))
VB, VM, VP = (pair(V, 8, 4, vector=vector) for vector in (BIAS, DORA, None))
TOKENS = pair(EMBED, 20, 8, embedding=True)
MORE_TOKENS, Q_EMBEDDED = pair(EMBED, 21, 8, embedding=True), pair(Q, 8, 4, embedding=True)
TWO_ODD = [*pair(Q, 9, 4), *pair(V, 8, 2)]
ODD = torch.ones(5)


@pytest.mark.parametrize(
    ("vector", "tensors", "error", "text"),
    [
        (None, [], AdapterFormatError, "no tensors"),
        (None, [A], AdapterFormatError, "has no B"),
        (None, [B], AdapterFormatError, "has no A"),
        (None, [*GOOD, *pair("layers.0.q", 8, 4)], AdapterFormatError, "same module"),
        (None, pair(Q, 8, 4, rank=8), AdapterFormatError, "pair of rank 16"),
        (None, [(A[0], A[1][:8]), B], AdapterFormatError, r"A \[8, 8\] and B \[4, 16\]"),
        (None, [(A[0], A[1].flatten()), B], AdapterFormatError, "not a pair"),
        (None, pair(Q, 8, 5), IncompatibleAdapterError, "8 → 5.*8 → 4"),
        (None, pair(Q, 9, 4), IncompatibleAdapterError, r"\(1 module in all"),
        (None, TWO_ODD, IncompatibleAdapterError, "layers.0.q .*layers.0.v .*2 modules in all"),
        (None, pair("model.layers.1.q", 8, 4), IncompatibleAdapterError, r"1.*2 tensors in all"),
        (None, pair("model.lm_head", 8, 9), IncompatibleAdapterError, "no such module"),
        (None, [*GOOD, (f"{PREFIX}x.weight", A[1])], IncompatibleAdapterError, "x.weight"),
        (None, [*GOOD, (f"{PREFIX}x.lora_C", A[1])], UnsupportedAdapterError, "x.lora_C"),
        # Vectors and the flags that announce them.
        (DORA, QP, AdapterFormatError, f"use_dora is set, and module '{Q}' has no magnitude"),
        (BIAS, QP, AdapterFormatError, f"lora_bias is set, and module '{Q}' has no bias"),
        (DORA, [*QM, *VP], AdapterFormatError, f"module '{V}' has no magnitude"),
        (BIAS, [*QB, *VP], AdapterFormatError, f"module '{V}' has no bias"),
        (DORA, QB, AdapterFormatError, f"module '{Q}' has no magnitude"),
        (BIAS, QM, AdapterFormatError, f"module '{Q}' has no bias"),
        (None, QM, AdapterFormatError, f"{Q}.lora_magnitude_vector' is present, .* use_dora"),
        (None, QB, AdapterFormatError, f"{Q}.lora_B.bias' is present, .* not set lora_bias"),
        (DORA, [*QM, QB[2]], AdapterFormatError, "bias' is present, .* not set lora_bias"),
        (BIAS, [*QB, QM[2]], AdapterFormatError, "vector' is present, .* not set use_dora"),
        (DORA, [*QM, VM[2]], AdapterFormatError, f"{V}.*has no A"),
        (None, [*QP, VM[2]], AdapterFormatError, f"{V}.*has no A"),
        (DORA, [*QM[:2], (QM[2][0], ODD)], AdapterFormatError, r"shape \[5\], and B has 4"),
        (BIAS, [*QB[:2], (QB[2][0], ODD)], AdapterFormatError, r"shape \[5\], and B has 4"),
        (DORA, [*QM[:2], (QM[2][0], ODD.view(5, 1))], AdapterFormatError, r"\[5, 1\]"),
        (DORA, [QM[0], QM[2]], AdapterFormatError, "has no B"),
        # Embeddings and linear modules.
        (BIAS, TOKENS, UnsupportedAdapterError, f"'{EMBED}' is an embedding, for"),
        (None, Q_EMBEDDED, IncompatibleAdapterError, "for an embedding, but .* a linear module"),
        (None, pair(EMBED, 20, 8), IncompatibleAdapterError, "for a linear module, but .* an emb"),
        (None, MORE_TOKENS, IncompatibleAdapterError, r"embed \(21 → 8, .* 20 → 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    vector: str | None, tensors: list[Named], error: type[AdapterError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        plan(file_of(tensors), spec_of(vector, 16), LAYOUT)
    if vector is not None:
        assert ";" in str(caught.value)  # what is wrong; what to do


CAUSAL = "LlamaForCausalLM"
SERVED = replace(LAYOUT, architecture=CAUSAL)
IMAGES = [*pair("model.language_model.layers.0.q", 8, 4), *pair("model.vision.layers.0.w", 3, 3)]
SCORED = [*GOOD, *pair("score", 8, 2)]


@pytest.mark.parametrize(
    ("fields", "tensors", "named"),
    [
        (
            {"base_class": "LlamaAndEyes"},
            IMAGES,
            f"LlamaAndEyes, which has 'model.language_model.layers.0.q' where {CAUSAL} has '{Q}'",
        ),
        ({}, IMAGES, "another class of the same base, one that has 'model.language_model"),
        (
            {"task": "SEQ_CLS"},
            SCORED,
            f"LlamaForSequenceClassification, which has 'score', which {CAUSAL} does not have",
        ),
        # A deeper base, another width of it, and one of which no module is here.
        ({}, [*GOOD, *pair("model.layers.7.q", 8, 4)], None),
        ({}, pair("model.language_model.layers.7.q", 8, 4), None),
        ({}, pair("transformer.h.0.attn", 8, 4), None),
        ({}, pair("score", 8, 2), None),
    ],
)
def test_names_of_another_class_of_the_base_name_that_class(
    fields: dict[str, Any], tensors: list[Named], named: str | None
) -> None:
    with pytest.raises(IncompatibleAdapterError) as caught:
        plan(file_of(tensors), replace(SPEC, **fields), SERVED)
    assert ("another class" in str(caught.value)) == (named is not None)
    assert (named or "") in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "left_out"),
    [
        ({"targets": ("q", "v", "nonexistent")}, ""),
        ({"targets": ("q",)}, f"1 of the 2 modules .* {V} .target_modules"),
        ({"targets": "nonexistent"}, f"2 of the 2 modules .* {Q} .target_modules.*{V}"),
        (
            {"targets": r".*\.q", "excluded": r".*\.v"},
            f"1 of the 2 modules .* {V} .exclude_modules",
        ),
        ({"excluded": ("v",)}, f"{V} .exclude_modules.*correct exclude_modules, or take the"),
        ({"targets": ("q", "v"), "layers": (0, 77)}, ""),
        ({"targets": ("q", "v"), "layers": (77,)}, f"{Q} .layers_to_transform.*{V} .layers_to_tr"),
        ({"targets": (Q, "v"), "layers": (77,)}, f"1 of the 2 modules .* {V} .layers_to_transform"),
    ],
)
def test_modules_that_the_config_leaves_out_are_refused(
    fields: dict[str, Any], left_out: str
) -> None:
    """PEFT ignores their tensors. What the config names and the file lacks is no matter."""
    spec, file = replace(SPEC, **fields), file_of([*GOOD, *pair(V, 8, 4)])
    for _ in range(2):  # the second time it is remembered
        if not left_out:
            assert [len(group.rows) for group in plan(file, spec, LAYOUT).groups] == [2]
            continue
        with pytest.raises(AdapterFormatError, match=left_out):
            plan(file, spec, LAYOUT)


def test_modules_are_judged_by_the_adapters_own_spelling() -> None:
    """An adapter of the backbone alone was trained under names without "model."."""
    spec = replace(SPEC, targets=r"layers\.0\.q")
    assert plan(file_of(pair("layers.0.q", 8, 4)), spec, LAYOUT).groups
    with pytest.raises(AdapterFormatError, match=f"{Q} .target_modules"):
        plan(file_of(GOOD), spec, LAYOUT)


def test_a_pattern_that_would_take_too_long_is_left_to_the_tensors(monkeypatch: Patch) -> None:
    monkeypatch.setattr("lorax_async.planning.pairing.MAX_MATCHING_STEPS", 10)
    assert plan(file_of(GOOD), replace(SPEC, targets=r".*\.nonexistent"), LAYOUT).groups


def test_other_dtypes_are_refused() -> None:
    file = file_of(GOOD).replace(b'"BF16"', b'"I16" ', 1)
    with pytest.raises(UnsupportedAdapterError, match="is I16; save the adapter as F32"):
        plan(file, SPEC, LAYOUT)


def test_only_the_first_offenders_are_named_and_all_are_counted() -> None:
    strays = [tensor for n in range(40) for tensor in pair(f"model.{'x' * 400}.{n}.q", 8, 4)]
    with pytest.raises(IncompatibleAdapterError, match="80 tensors in all") as caught:
        plan(file_of([*GOOD, *strays]), SPEC, LAYOUT)
    assert str(caught.value).count("xxx…") == 3
    assert len(str(caught.value)) < 1_000


LARGE = ModulePattern("q", lambda module: module.endswith("q"), 1e40)


def test_a_scale_that_float32_cannot_hold_is_refused() -> None:
    alphas = (float("nan"), float("inf"), 1e300, -1e300)
    cases = {
        "lora_alpha": [AdapterSpec(16, alpha) for alpha in alphas],
        r"'model\.layers\.0\.q' .* 6.25e\+38": [
            *(AdapterSpec(16, 1e40), AdapterSpec(16, 1.0, alpha_patterns=(LARGE,)))
        ],
    }
    refusals(lambda spec: plan(file_of(GOOD), spec, LAYOUT), AdapterFormatError, cases)


def test_fan_in_fan_out_contradicts_a_base_without_such_modules() -> None:
    spec = AdapterSpec(rank=16, alpha=1.0, fan_in_fan_out=True)
    for tensors in (GOOD, [*TOKENS, *GOOD]):
        with pytest.raises(IncompatibleAdapterError, match="fan_in_fan_out"):
            plan(file_of(tensors), spec, LAYOUT)
    assert plan(file_of(TOKENS), spec, LAYOUT).groups, "it says nothing of embeddings"
    conv = layout_of((Q, 8, 4, 0), transposed=True)
    linear = layout_of((Q, 8, 4, 0))
    # False is the default: it says nothing, and A and B are the same either way.
    there = plan(file_of(GOOD), SPEC, linear)
    assert plan(file_of(GOOD), spec, conv).groups[0].reads == there.groups[0].reads
    assert plan(file_of(GOOD), SPEC, conv) == there


def test_limits() -> None:
    cases = {
        "rank 16 is outside 1 … 15": [Limits(max_rank=15)],
        "bytes in its file, over the limit of 500": [Limits(max_adapter_bytes=500)],
        "as F32 on the device, over the limit of 767": [Limits(max_adapter_bytes=767)],
    }
    with_limits = partial(plan, file_of(GOOD), SPEC, LAYOUT, dtype="F32")
    refusals(lambda limits: with_limits(limits=limits), UnsupportedAdapterError, cases)
    with pytest.raises(ConfigError, match="staging_bytes"):  # a move holds at least one row
        plan(file_of(GOOD), SPEC, LAYOUT, staging_move_bytes=1_000)


def test_a_move_that_no_window_holds() -> None:
    converts = (ConvertMove(0, 400, "F32", 1, 100, 0, 100),)
    with pytest.raises(InternalError, match="192 bytes is too small"):
        windows(GroupPlan(0, 256, (), converts, (), (), ()), 192, 2)


def test_windows_cut_a_strided_read_at_ends_of_rows_and_inside_them() -> None:
    """Rows of 48 bytes, of which the file has 100: five and a third, then half of one, then two."""
    group = GroupPlan(0, 384, (ReadMove(10, 384, 0, 8, 100),), (), (), (), ())
    assert windows(group, 256, 2) == (
        StagingWindow(0, 256, (ReadMove(10, 240, 0, 5, 100), ReadMove(510, 16, 240)), (), ()),
        StagingWindow(256, 384, (ReadMove(526, 32, 0), ReadMove(610, 96, 32, 2, 100)), (), ()),
    )
    ends = [each.reads for each in windows(group, 192, 2)]
    assert ends == [(ReadMove(10, 192, 0, 4, 100),), (ReadMove(410, 192, 0, 4, 100),)]
    long = replace(group, reads=(ReadMove(10, 384, 0, 2, 900),))
    assert windows(long, 64, 2)[1].reads == (ReadMove(74, 64, 0),)
