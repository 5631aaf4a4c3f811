"""Plans, carried out by slices and torch casts, against safetensors' own reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.adapter_files import ALIGNMENT, TORCH, carry_out, file_of, layout_of, matrix, plan
from lorax_async.adapter import AdapterSpec, ModulePattern
from lorax_async.config import Limits
from lorax_async.core.layout import ModelLayout
from lorax_async.core.runs import Span
from lorax_async.core.transfer_plan import Convert, Read, TransferPlan, Zero
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    ConfigError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
)

SPEC = AdapterSpec(rank=16, alpha=32.0)
LIMITS = Limits(max_rank=32)
SIZES = st.sampled_from([1, 5, 32, 48, 64, 96])


def pair(
    path: str, inputs: int, outputs: int, *, rank: int = 16, dtype: str = "BF16"
) -> list[tuple[str, torch.Tensor]]:
    a = torch.randn(rank, inputs).to(TORCH[dtype])
    b = torch.randn(outputs, rank).to(TORCH[dtype])
    name = f"base_model.model.{path}.lora_"
    return [(f"{name}A.weight", a), (f"{name}B.weight", b)]


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    """The file as PEFT leaves it: written by safetensors, which chooses the order."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        return path.read_bytes()


@st.composite
def adapters(draw: st.DrawFn) -> tuple[bytes, AdapterSpec, ModelLayout]:
    count = draw(st.sampled_from([1, 3, 12]))
    kinds = draw(st.dictionaries(st.sampled_from(["q", "k", "mlp.up"]), SIZES, min_size=1))
    modules = [
        (f"model.layers.{layer}.{kind}", size, draw(SIZES), layer)
        for layer in range(count)
        for kind, size in kinds.items()
    ]
    modules.append(("lm_head", draw(SIZES), draw(SIZES), count))
    chosen = draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    rank = draw(st.integers(1, 20))
    dtypes = draw(st.lists(st.sampled_from(sorted(TORCH)), min_size=1, max_size=3, unique=True))
    bare = draw(st.booleans())
    tensors: dict[str, torch.Tensor] = {}
    for n, (name, inputs, outputs, _) in enumerate(chosen):
        path = name.removeprefix("model.") if bare else name
        tensors |= pair(path, inputs, outputs, rank=rank, dtype=dtypes[n % len(dtypes)])
    shuffled = draw(st.booleans())
    file = file_of(draw(st.permutations(sorted(tensors.items())))) if shuffled else saved(tensors)
    return file, AdapterSpec(rank=rank, alpha=8.0), layout_of(*modules, num_layers=count)


def check_moves(made: TransferPlan, file: bytes, most: int) -> None:
    spans = sorted(span for group in made.groups for span in group.spans)
    assert sum(span.nbytes for span in spans) == len(file) - spans[0].start
    assert all(one.end <= two.start for one, two in zip(spans, spans[1:], strict=False))
    for group in made.groups:
        assert group.nbytes % ALIGNMENT == 0
        moved = [read.source for read in group.reads]
        for each in moved + [each for move in group.converts for each in move.sources]:
            assert each.rows == 1
            assert any(s.start <= each.start and each.stop <= s.stop for s in group.spans)
        for convert in group.converts:
            assert convert.nbytes <= most
            assert convert.rows * convert.row_pitch * TORCH[made.dtype].itemsize <= most


@settings(max_examples=150, deadline=None)
@given(
    adapter=adapters(),
    dtype=st.sampled_from([None, *TORCH]),
    multiple=st.sampled_from([1, 8]),
    most=st.sampled_from([256, 1_000, 1 << 20]),
)
def test_every_matrix_arrives(
    adapter: tuple[bytes, AdapterSpec, ModelLayout], dtype: str | None, multiple: int, most: int
) -> None:
    file, spec, layout = adapter
    made = plan(
        file,
        spec,
        layout,
        dtype=dtype,
        rank_multiple=multiple,
        limits=LIMITS,
        staging_move_bytes=most,
    )
    stored = dtype or "BF16"
    assert (made.dtype, made.rank, made.file_bytes) == (stored, spec.rank, len(file))
    assert made.nbytes == sum(group.nbytes for group in made.groups)
    check_moves(made, file, most)
    expected = {
        name.removeprefix("base_model.model.").removeprefix("model."): tensor
        for name, tensor in safetensors.torch.load(file).items()
    }
    for group in made.groups:
        extent = carry_out(group, file, stored)
        for row in group.rows:
            module = layout.modules[row.module]
            assert (module.layer, row.rank) == (group.layer, spec.rank)
            assert (row.padded_rank - row.rank) in range(multiple)
            assert row.padded_rank % multiple == row.a % ALIGNMENT == row.b % ALIGNMENT == 0
            a = matrix(extent, row.a, row.padded_rank, module.in_features, stored)
            b = matrix(extent, row.b, module.out_features, row.padded_rank, stored)
            name = module.name.removeprefix("model.")
            assert torch.equal(a[: row.rank], expected.pop(f"{name}.lora_A.weight").to(a.dtype))
            assert torch.equal(b[:, : row.rank], expected.pop(f"{name}.lora_B.weight").to(b.dtype))
            assert not a[row.rank :].any()
            assert not b[:, row.rank :].any()
    assert not expected
    layers = [group.layer for group in made.groups]
    assert layers == sorted(set(layers))


TWELVE = [(f"model.layers.{n}.{kind}", 64, 96, n) for n in range(12) for kind in "qv"]


def test_a_layer_of_a_file_by_peft_is_one_read() -> None:
    file = saved(dict(sum((pair(name, 64, 96) for name, *_ in TWELVE), [])))
    made = plan(file, SPEC, layout_of(*TWELVE))
    size = 2 * (16 * 64 + 96 * 16) * 2
    start = len(file) - 12 * size
    # The file's order is 0, 1, 10, 11, 2, …: the plan's is that of the layers.
    offsets = {n: start + k * size for k, n in enumerate([0, 1, 10, 11, *range(2, 10)])}
    assert [group.layer for group in made.groups] == list(range(12))
    for group in made.groups:
        assert group.reads == (Read(offsets[group.layer], size, target=0),)
        assert group.spans == (Span(offsets[group.layer], offsets[group.layer] + size),)
        assert (group.nbytes, group.converts, group.zeros) == (size, (), ())


def test_a_cast_layer_is_a_few_large_moves() -> None:
    file = saved(dict(sum((pair(name, 64, 96, dtype="F32") for name, *_ in TWELVE), [])))
    elements = 2 * (16 * 64 + 96 * 16)
    [first, *_] = plan(file, SPEC, layout_of(*TWELVE)).groups
    start = first.spans[0].start
    assert first.converts == (
        Convert(start, 4 * elements, "F32", 1, elements, target=0, row_pitch=elements),
    )
    [first, *_] = plan(file, SPEC, layout_of(*TWELVE), staging_move_bytes=3 * elements).groups
    half = elements // 2
    assert first.converts == (
        Convert(start, 4 * half, "F32", 1, half, target=0, row_pitch=half),
        Convert(start + 4 * half, 4 * half, "F32", 1, half, target=2 * half, row_pitch=half),
    )
    assert first.nbytes == 2 * elements


def test_where_the_packing_breaks_the_alignment_each_tensor_has_its_place() -> None:
    name = "model.layers.0.q"
    file = file_of(pair(name, 5, 7, rank=3))
    [group] = plan(file, AdapterSpec(rank=3, alpha=3.0), layout_of((name, 5, 7, 0))).groups
    start = len(file) - 30 - 42
    assert group.reads == (Read(start, 30, target=0), Read(start + 30, 42, target=64))
    assert (group.nbytes, group.spans) == (128, (Span(start, len(file)),))


def test_a_rank_is_padded_with_zero_rows_of_a_and_columns_of_b() -> None:
    name = "model.layers.0.q"
    file = file_of(pair(name, 32, 4, rank=6))
    layout = layout_of((name, 32, 4, 0))
    [group] = plan(file, AdapterSpec(rank=6, alpha=3.0), layout, rank_multiple=8).groups
    start = len(file) - 6 * 32 * 2 - 4 * 6 * 2
    assert group.reads == (Read(start, 384, target=0),)
    assert group.zeros == (Zero(384, 128),)
    assert group.converts == (Convert(start + 384, 48, "BF16", 4, 6, target=512, row_pitch=8),)
    [row] = group.rows
    assert (row.module, row.a, row.b, row.rank, row.padded_rank, row.scale) == (
        0,
        0,
        512,
        6,
        8,
        0.5,
    )


def test_patterns_are_matched_against_the_path_in_the_file() -> None:
    # PEFT matched them against the model that was trained, here the bare backbone.
    bare = ModulePattern("layers.0.q", lambda module: module == "layers.0.q", 2)
    spec = AdapterSpec(rank=16, alpha=3.0, rslora=True, rank_patterns=(bare,))
    layout = layout_of(("model.layers.0.q", 8, 8, 0), ("model.layers.1.q", 8, 8, 1))
    file = file_of([*pair("layers.0.q", 8, 8, rank=2), *pair("layers.1.q", 8, 8)])
    made = plan(file, spec, layout)
    assert [row.rank for group in made.groups for row in group.rows] == [2, 16]
    assert [row.scale for group in made.groups for row in group.rows] == [3.0 / 2**0.5, 0.75]
    assert made.rank == 16
    with pytest.raises(AdapterFormatError, match=r"model.layers.0.q.*pair of rank 16"):
        plan(file_of(pair("model.layers.0.q", 8, 8, rank=2)), spec, layout)


LAYOUT = layout_of(
    ("model.layers.0.q", 8, 4, 0), ("model.layers.0.v", 8, 4, 0), ("lm_head", 8, 9, 12)
)
GOOD = pair("model.layers.0.q", 8, 4)
A, B = GOOD


@pytest.mark.parametrize(
    ("tensors", "error", "text"),
    [
        ([], AdapterFormatError, "no tensors"),
        ([A], AdapterFormatError, "has no B"),
        ([B], AdapterFormatError, "has no A"),
        ([*GOOD, *pair("layers.0.q", 8, 4)], AdapterFormatError, "same module"),
        (pair("model.layers.0.q", 8, 4, rank=8), AdapterFormatError, "pair of rank 16"),
        ([(A[0], A[1][:8]), B], AdapterFormatError, r"A \[8, 8\] and B \[4, 16\]"),
        ([(A[0], A[1].flatten()), B], AdapterFormatError, "no pair"),
        (pair("model.layers.0.q", 8, 5), IncompatibleAdapterError, "8 → 5.*8 → 4"),
        (pair("model.layers.0.q", 9, 4), IncompatibleAdapterError, r"\(1 module in all"),
        (
            [*pair("model.layers.0.q", 9, 4), *pair("model.layers.0.v", 8, 2)],
            IncompatibleAdapterError,
            "layers.0.q .*layers.0.v .*2 modules in all",
        ),
        (pair("model.layers.1.q", 8, 4), IncompatibleAdapterError, r"layers\.1.*2 tensors in all"),
        (pair("model.lm_head", 8, 9), IncompatibleAdapterError, "no such module"),
        ([*GOOD, ("base_model.model.x.weight", A[1])], UnsupportedAdapterError, "x.weight"),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: list[tuple[str, torch.Tensor]], error: type[AdapterError], text: str
) -> None:
    with pytest.raises(error, match=text):
        plan(file_of(tensors), SPEC, LAYOUT)


@pytest.mark.parametrize(
    "targets",
    [
        ("nonexistent",),
        ("nonexistent", "q_proj", "layers.1.q"),
        ("0.q.",),
        ("layers",),
        ("proj_q",),
        r".*\.nonexistent",
        r"model\.layers\.[3-9]\.q",
        "nonexistent",
    ],
)
def test_target_modules_that_the_base_lacks_are_refused(targets: tuple[str, ...] | str) -> None:
    """PEFT would find nothing to adapt, though the file's tensors fit."""
    with pytest.raises(IncompatibleAdapterError, match="none of the target_modules") as caught:
        plan(file_of(GOOD), replace(SPEC, targets=targets), LAYOUT)
    assert repr(targets if isinstance(targets, str) else targets[0]) in str(caught.value)


@pytest.mark.parametrize(
    "targets",
    [
        None,
        (),
        ("q",),
        ("0.q",),
        ("model.layers.0.q",),
        ("q", "nonexistent"),
        ("v",),
        "all-linear",
        "ALL-LINEAR",
        r".*\.q",
        r"layers\.0\.q",
        r".*\.0\.(q|k)",
        r"(?!model\.vision).*\.nonexistent",  # re2 has no look-ahead: the tensors decide
    ],
)
def test_target_modules_of_which_the_base_has_one_are_accepted(
    targets: tuple[str, ...] | str | None,
) -> None:
    made = plan(file_of(GOOD), replace(SPEC, targets=targets), LAYOUT)
    assert [group.layer for group in made.groups] == [0]


@pytest.mark.parametrize("targets", [None, ("q",), ("0.q", "v")])
@pytest.mark.parametrize("layers", [(77,), (1, 12), (-1,)])
def test_layers_that_the_base_lacks_are_refused(
    targets: tuple[str, ...] | None, layers: tuple[int, ...]
) -> None:
    spec = replace(SPEC, targets=targets, layers=layers)
    with pytest.raises(IncompatibleAdapterError, match=f"layers_to_transform.*{layers[0]}"):
        plan(file_of(GOOD), spec, LAYOUT)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (None, (0,)),
        (("q",), (0, 77)),
        (("model.layers.0.q",), (77,)),  # PEFT limits only what is named by its end
    ],
)
def test_layers_of_which_the_base_has_one_are_accepted(
    targets: tuple[str, ...] | None, layers: tuple[int, ...]
) -> None:
    assert plan(file_of(GOOD), replace(SPEC, targets=targets, layers=layers), LAYOUT).groups


def test_a_pattern_that_would_take_too_long_is_left_to_the_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorax_async.core.pairing.MAX_MATCHING_STEPS", 10)
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


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e300, -1e300])
def test_a_scale_that_float32_cannot_hold_is_refused(alpha: float) -> None:
    with pytest.raises(AdapterFormatError, match="lora_alpha"):
        plan(file_of(GOOD), AdapterSpec(rank=16, alpha=alpha), LAYOUT)


@pytest.mark.parametrize("by_pattern", [False, True])
def test_a_scale_that_float32_cannot_hold_is_refused_by_module(by_pattern: bool) -> None:
    all_of_it = ModulePattern("q", lambda module: module.endswith("q"), 1e40)
    patterns = (all_of_it,) if by_pattern else ()
    spec = AdapterSpec(rank=16, alpha=1.0 if by_pattern else 1e40, alpha_patterns=patterns)
    with pytest.raises(AdapterFormatError, match=r"'model\.layers\.0\.q' .* 6.25e\+38"):
        plan(file_of(GOOD), spec, LAYOUT)


def test_fan_in_fan_out_contradicts_a_base_without_such_modules() -> None:
    spec = AdapterSpec(rank=16, alpha=1.0, fan_in_fan_out=True)
    with pytest.raises(IncompatibleAdapterError, match="fan_in_fan_out"):
        plan(file_of(GOOD), spec, LAYOUT)
    conv = layout_of(("model.layers.0.q", 8, 4, 0), transposed=True)
    # False is the default: it says nothing, and A and B are the same either way.
    assert (
        plan(file_of(GOOD), spec, conv).groups[0].reads
        == plan(file_of(GOOD), SPEC, LAYOUT).groups[0].reads
    )
    assert plan(file_of(GOOD), SPEC, conv) == plan(file_of(GOOD), SPEC, LAYOUT)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(max_rank=15), "rank 16 is outside 1 … 15"),
        (Limits(max_adapter_bytes=500), "bytes in its file, over the limit of 500"),
        (Limits(max_adapter_bytes=767), "as F32 on the device, over the limit of 767"),
    ],
)
def test_limits(limits: Limits, text: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=text):
        plan(file_of(GOOD), SPEC, LAYOUT, dtype="F32", limits=limits)


def test_a_move_holds_at_least_one_row() -> None:
    with pytest.raises(ConfigError, match="staging_bytes"):
        plan(file_of(GOOD), SPEC, LAYOUT, staging_move_bytes=1_000)
