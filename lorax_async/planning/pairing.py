"""Pair an adapter's tensors by module, and check them against the config and the base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import sqrt
from operator import attrgetter
from typing import NamedTuple, TypeVar

from lorax_async.config import Limits
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
    shorten,
)
from lorax_async.formats.peft_names import (
    HEADS,
    PREFIX,
    TOKENS,
    WEIGHT_DTYPES,
    Targeting,
    is_saved,
    layer_index,
    matrix_error,
    parse_tensor_name,
    targeting_of,
)
from lorax_async.formats.safetensors import Header, TensorSpan
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.tensor_kinds import PARAMETERS, WHOLE, TensorRole
from lorax_async.planning.layout import ModelLayout, Module, OtherModule, Parameter
from lorax_async.types import AdapterSpec

T = TypeVar("T")

_MAX_SCALE = 3.4028234663852886e38  # the largest float32, the dtype of the device's table
_SHOWN = 3  # names in an error

_PARTS = tuple(TensorRole)
_PARTS_PER_MODULE = len(_PARTS)
_FLAGS = {TensorRole.BIAS: "lora_bias", TensorRole.MAGNITUDE: "use_dora"}

MAX_MATCHING_STEPS = 200_000_000
"""The limit for matching patterns with paths: about 1 s, ten times the need of large bases."""


class TensorPair(NamedTuple):
    """The tensors of one module. A tuple, because an adapter has hundreds.

    `module` indexes the layout's modules. `vectors` has at most one entry, of shape `[out]`: the
    bias of B or DoRA's magnitude.
    """

    module: int
    layer: int
    a: TensorSpan
    b: TensorSpan
    rank: int
    scale: float
    vectors: tuple[tuple[TensorRole, TensorSpan], ...] = ()


class OtherTensor(NamedTuple):
    """A tensor that is not of a pair. `module` is the layout's index (`ModelLayout.at`).

    `tokens` are those whose rows it has. `needs_tie` is whether the config names a module besides
    that has them only where it is tied to this one. `rank` and `scale` are a parameter's;
    with `swapped`, so are A `[rank * E, out]` and B `[in, rank * E]`.
    """

    module: int
    layer: int
    part: TensorRole
    span: TensorSpan
    tokens: tuple[int, ...] = ()
    needs_tie: bool = False
    rank: int = 0
    scale: float = 0.0
    swapped: bool = False


class Pairing(NamedTuple):
    """An adapter's tensors by module: one pair per module with A and B, and what is beside them.

    Both are in the order of the layout.
    """

    pairs: list[TensorPair]
    others: list[OtherTensor]


def pair_tensors(header: Header, spec: AdapterSpec, layout: ModelLayout, limits: Limits) -> Pairing:
    """Return the adapter's tensors by module.

    Raise `AdapterFormatError` if the tensors are not pairs of the config's rank, its vectors are
    missing, or it does not target a module; `IncompatibleAdapterError` if the base lacks the
    modules, or has other shapes; `UnsupportedAdapterError` for a tensor, a dtype or a rank that is
    not supported.
    """
    try:
        try:
            pairing = _pair(header, spec, layout, limits)
        except IncompatibleAdapterError:
            renamed = _renamed(header, layout) if layout.renames else None
            if renamed is None:
                raise
            pairing = _pair(renamed, spec, layout, limits)
    except IncompatibleAdapterError as error:
        fit = _describe_other_class(header.tensors, spec, layout)
        bases = _describe_bases(header.tensors, spec, layout)
        raise IncompatibleAdapterError(f"{error.problem}{fit}; {bases}") from None
    if spec.tokens:
        _require_tokens(pairing.others, spec)
    return pairing


def _renamed(header: Header, layout: ModelLayout) -> Header | None:
    """Return a header with the present names of modules that have former ones.

    None if that does not give the base's names for all: part of an adapter is not applied. Like
    PEFT, rename the tensors of LoRA alone.
    """
    tensors = []
    for span in header.tensors:
        name = parse_tensor_name(span.name)
        path = layout.rename(name.module) if ".lora_" in span.name else name.module
        if not layout.has(path):
            return None
        suffix = span.name.removeprefix(PREFIX + name.module)
        tensors.append(span._replace(name=f"{PREFIX}{path}{suffix}"))
    return replace(header, tensors=tuple(tensors))


def _pair(header: Header, spec: AdapterSpec, layout: ModelLayout, limits: Limits) -> Pairing:
    places, rest = _locate(header.tensors, layout)
    bare = _find_parameters(rest, layout) if rest else None
    _require_dtypes(header.tensors)
    if spec.rank_patterns or spec.alpha_patterns:
        check_matching(spec, (span.name for span in header.tensors))
    mismatches: list[str] = []
    # PEFT has no adapters with two vectors per module.
    expected = TensorRole.MAGNITUDE if spec.dora else TensorRole.BIAS if spec.lora_bias else None
    pairs = _pick_pairs(places, spec, layout, limits, mismatches, expected)
    paired = (2 if expected is None else 3) * len(pairs)
    others = _pick_others(places, spec, layout, mismatches) if paired < len(places) else []
    if paired + len(others) < len(places):
        raise _surplus_error(places, expected)
    if bare is not None:
        others += _pick_parameters(bare, spec, layout, limits, mismatches)
    if mismatches:
        raise IncompatibleAdapterError(
            f"wrong shapes for this base: {_list_first(mismatches, 'module')}"
        )
    if spec.fan_in_fan_out:
        require_transposed([layout.modules[pair.module] for pair in pairs])
    return Pairing(pairs, others)


def _pick_pairs(
    places: Mapping[int, TensorSpan],
    spec: AdapterSpec,
    layout: ModelLayout,
    limits: Limits,
    mismatches: list[str],
    expected: TensorRole | None,
) -> list[TensorPair]:
    """Return A, B and the `expected` vector of modules; add wrong shapes to `mismatches`."""
    firsts = sorted([place for place in places if place % _PARTS_PER_MODULE == 0])
    _require_targeted(spec, [places[place] for place in firsts], layout)
    modules = layout.modules
    uniform = not (spec.rank_patterns or spec.alpha_patterns)
    rank, scale = 0, 0.0
    if uniform:  # an error names the first module
        names = (parse_tensor_name(span.name).module for span in places.values())
        rank, scale = _rank_and_scale(next(names, ""), spec, limits)
    pairs: list[TensorPair] = []
    for place in firsts:
        a, b = places[place], places.get(place + 1)
        if b is None:
            raise _orphan_error(a, "B")
        if not uniform:
            path = parse_tensor_name(a.name).module
            if spec.parameters and targeting_of(spec).names_weight(path):
                path += ".weight"
            rank, scale = _rank_and_scale(path, spec, limits)
        module = modules[place // _PARTS_PER_MODULE]
        fits = a.shape == (rank, module.in_features) and b.shape == (module.out_features, rank)
        if not fits:
            mismatches.append(_describe_mismatch(a, b, rank, module))
        vectors = () if expected is None else _pick_vector(places, place, expected, module)
        fields = (place // _PARTS_PER_MODULE, module.layer, a, b, rank, scale, vectors)
        # As `TensorPair._make` does, without a call of Python code for each of hundreds.
        pairs.append(tuple.__new__(TensorPair, fields))
    return pairs


def _pick_others(
    places: Mapping[int, TensorSpan], spec: AdapterSpec, layout: ModelLayout, mismatches: list[str]
) -> list[OtherTensor]:
    """Return the tensors that are not of a pair; add those of a wrong shape to `mismatches`."""
    found = []
    for place, span in sorted(places.items()):
        index, number = divmod(place, _PARTS_PER_MODULE)
        part = _PARTS[number]
        if part is TensorRole.BASE_COPY and place - number not in places:
            raise _orphan_error(span, "A")  # PEFT writes it beside A and B
        if (part in WHOLE or part is TensorRole.TOKENS) and place - number in places:
            raise AdapterFormatError(
                f"tensor {shorten(span.name, 200)!r} replaces what A and B of the module change"
                " too; train it as one of target_modules, modules_to_save and"
                " trainable_token_indices"
            )
        if part is TensorRole.TOKENS:
            found.append(_pick_tokens(index, span, spec, layout))
            continue
        if part is TensorRole.BASE_COPY or part in WHOLE:
            module = layout.at(index)
            assert not isinstance(module, Parameter)
            if part in WHOLE and not (_counts_tokens(module) or module.name in _TASK_HEADS):
                _require_saved(span.name, spec)
            if not _fits(part, span.shape, module):
                expected = list(_shape_of(part, module) or ())
                mismatches.append(
                    f"{shorten(module.name, 200)} (its {part.value} is {list(span.shape)},"
                    f" the base's is {expected or 'missing'})"
                )
            found.append(OtherTensor(index, module.layer, part, span))
    _require_vocabulary(found, spec, layout)
    return found


def _pick_tokens(
    index: int, span: TensorSpan, spec: AdapterSpec, layout: ModelLayout
) -> OtherTensor:
    """Return the trained rows of a module's tokens.

    Raise `AdapterFormatError` unless the config names as many, `IncompatibleAdapterError` if the
    base has no such tokens.
    """
    module, path = layout.modules[index], parse_tensor_name(span.name).module
    named = [(name, ids) for name, ids in spec.tokens if path.endswith(name)]
    ids = named[0][1] if named else ()
    rows, size = module.weight_shape
    if len(span.shape) != 2 or span.shape[0] != len(ids) or len(set(ids)) < len(ids):
        raise AdapterFormatError(
            f"tensor {shorten(span.name, 200)!r} has shape {list(span.shape)}, and"
            f" trainable_token_indices names {len(set(ids))} tokens of this module; correct it, or"
            " save the adapter again"
        )
    if span.shape[1] != size or not all(0 <= token < rows for token in ids) or module.transposed:
        raise IncompatibleAdapterError(
            f"tensor {shorten(span.name, 200)!r} has rows of {span.shape[1]} for tokens up to"
            f" {max(ids)}, and the base's {shorten(module.name, 100)} has {rows} rows of {size}"
        )
    needs_tie = any(other == ids and not path.endswith(name) for name, other in spec.tokens)
    return OtherTensor(index, module.layer, TensorRole.TOKENS, span, ids, needs_tie)


def _require_tokens(others: Iterable[OtherTensor], spec: AdapterSpec) -> None:
    """Raise `AdapterFormatError` if a module has no rows for the tokens that the config names.

    PEFT gives a tied module those of the embedding, where the config names the same for both.
    """
    found = [other for other in others if other.part is TensorRole.TOKENS]
    paths = [parse_tensor_name(other.span.name).module for other in found]
    for name, ids in spec.tokens:
        if any(path.endswith(name) for path in paths) or any(it.tokens == ids for it in found):
            continue
        raise AdapterFormatError(
            f"adapter_config.json: trainable_token_indices names {len(ids)} tokens"
            f"{f' of {shorten(name, 100)!r}' if name else ''}, and the file has no rows for them;"
            " save the adapter again, or correct the config"
        )


def _require_saved(tensor: str, spec: AdapterSpec) -> None:
    """Raise `AdapterFormatError` for a module that the config does not name.

    PEFT would load it into the base itself, and so into all that shares its weight.
    """
    path = parse_tensor_name(tensor).module
    if not is_saved(path, spec.saved):
        raise AdapterFormatError(
            f"tensor {shorten(tensor, 200)!r} replaces a module that adapter_config.json does not"
            " name; add it to modules_to_save, or take the tensor out"
        )


def _shape_of(part: TensorRole, module: Module | OtherModule) -> tuple[int, ...] | None:
    """Return the shape of the base's own weight or bias, None if it has none.

    A layout does not tell whether a linear module has a bias.
    """
    if isinstance(module, OtherModule):
        return module.bias if part is TensorRole.OWN_BIAS else module.weight
    if part is TensorRole.OWN_BIAS:
        return None if module.embedding else (module.out_features,)
    return module.weight_shape


def _fits(part: TensorRole, shape: tuple[int, ...], module: Module | OtherModule) -> bool:
    """Return whether a tensor has the base's shape, but for the size of a vocabulary."""
    expected = _shape_of(part, module)
    resizes = part in WHOLE and _counts_tokens(module)
    if expected is None or not (resizes and shape):
        return shape == expected
    return len(shape) == len(expected) and shape[0] > 0 and shape[1:] == expected[1:]


def _counts_tokens(module: Module | OtherModule) -> bool:
    """Return whether a module's weight has a row per token."""
    last = module.name.rpartition(".")[2]
    return isinstance(module, Module) and (last in HEADS or (module.embedding and last in TOKENS))


def _require_vocabulary(
    others: Sequence[OtherTensor], spec: AdapterSpec, layout: ModelLayout
) -> None:
    """Raise `UnsupportedAdapterError` for half of what the base shares or resizes as a whole.

    Of a pair that is tied, PEFT loads a module that the config does not name into both; and with
    a vocabulary of another size, the rest is what its own resizing of the base happens to draw.
    """
    rows = {o.module: o.span.shape[0] for o in others if o.part is TensorRole.WEIGHT}
    counting = [n for n, module in enumerate(layout.modules) if _counts_tokens(module)]
    whole = [n for n in counting if n in rows]
    if not whole or len({rows.get(n) for n in counting}) == 1:
        return
    names = [layout.modules[n].name for n in whole]
    resized = any(rows[n] != layout.modules[n].weight_shape[0] for n in whole)
    unnamed = any(not is_saved(name, spec.saved) for name in names)
    if resized or unnamed or (spec.ensure_weight_tying and len(whole) < len(counting)):
        others_ = [layout.modules[n].name for n in counting if n not in rows]
        lacks = f" and not {', '.join(others_)}" if others_ else " with vocabularies of two sizes"
        why = "resizes" if resized else "replaces"
        raise UnsupportedAdapterError(
            f"the adapter {why} {', '.join(names)}{lacks}; train and save all of them"
            " (modules_to_save)"
        )


def _require_dtypes(tensors: Sequence[TensorSpan]) -> None:
    for span in tensors:
        if span.dtype not in WEIGHT_DTYPES:
            raise UnsupportedAdapterError(
                f"tensor {shorten(span.name, 200)!r} is {span.dtype}; save the adapter as"
                f" {', '.join(WEIGHT_DTYPES)}"
            )


def _require_matrices(tensors: Iterable[TensorSpan]) -> None:
    for span in tensors:
        if len(span.shape) > 2:
            raise matrix_error(span.name, span.shape)


def _require_targeted(spec: AdapterSpec, spans: Iterable[TensorSpan], layout: ModelLayout) -> None:
    """Raise `AdapterFormatError` if the config leaves out a module of which A is in `spans`."""
    targeting = targeting_of(spec)
    known = _targeted_names(layout, targeting)
    names = [span.name for span in spans]
    if known.issuperset(names):
        return
    parsed = map(parse_tensor_name, names)
    require_targeted(targeting, {name.module: name.embedding is True for name in parsed})
    known.update(names)


def require_targeted(targeting: Targeting, modules: Mapping[str, bool]) -> None:
    """Raise `AdapterFormatError` if the config leaves out one of the file's modules.

    PEFT would ignore its tensors, with a warning that no client of a server sees. If matching would
    take too many steps, accept all. `modules` says of each path whether it is an embedding.
    """
    if targeting.cost * sum(map(len, modules)) > MAX_MATCHING_STEPS:
        return
    omitted = {
        module: field
        for module, embedding in modules.items()
        if (field := targeting.omitted_by(module, embedding=embedding))
    }
    if omitted:
        shown = [f"{shorten(module, 200)} ({field})" for module, field in omitted.items()]
        fields = " and ".join(sorted(set(omitted.values())))
        raise AdapterFormatError(
            f"adapter_config.json leaves out {len(omitted)} of the {len(modules)} modules of which"
            f" the file has tensors, and PEFT would ignore these: {_list_first(shown, 'module')};"
            f" correct {fields}, or take the tensors out"
        )


@lru_cache(maxsize=64)
def _targeted_names(_layout: ModelLayout, _targeting: Targeting) -> set[str]:
    """Return a cache of the names of A tensors that are targeted, bounded by the layout's."""
    return set()


def _pick_vector(
    places: Mapping[int, TensorSpan], place: int, part: TensorRole, module: Module
) -> tuple[tuple[TensorRole, TensorSpan], ...]:
    """Return the vector of the module whose A is at `place`, one element per row of B."""
    flag, shown = _FLAGS[part], shorten(module.name, 200)
    if part is TensorRole.BIAS and module.embedding:
        raise UnsupportedAdapterError(
            f"adapter_config.json: lora_bias is set and {shown!r} is an embedding, for which PEFT"
            " has no bias; train without lora_bias, or without the embedding"
        )
    vector = places.get(place + _PARTS.index(part))
    if vector is None:
        raise AdapterFormatError(
            f"adapter_config.json: {flag} is set, and module {shown!r} has no {part.value}; save"
            f" the adapter again, or correct {flag}"
        )
    rows = places[place + 1].shape[:1]
    if vector.shape != rows:
        raise AdapterFormatError(
            f"tensor {shorten(vector.name, 200)!r} has shape {list(vector.shape)}, and B has"
            f" {rows[0] if rows else 'no'} rows; save the adapter again"
        )
    return ((part, vector),)


def _surplus_error(
    places: Mapping[int, TensorSpan], expected: TensorRole | None
) -> AdapterFormatError:
    """Explain tensors left over: B or a vector without A, or a vector without its flag."""
    for place, span in places.items():
        part = _PARTS[place % _PARTS_PER_MODULE]
        if place - place % _PARTS_PER_MODULE not in places:
            return _orphan_error(span, "A")
        if part in _FLAGS and part is not expected:
            break
    return AdapterFormatError(
        f"tensor {shorten(span.name, 200)!r} is present, but adapter_config.json does not set"
        f" {_FLAGS[part]}; save the adapter again, or correct the config"
    )


def require_transposed(modules: Sequence[Module]) -> None:
    """Raise unless the base stores one of these modules as [in, out], as fan_in_fan_out claims.

    The default, False, claims nothing.
    """
    linears = [module for module in modules if not module.embedding]
    if linears and not any(module.transposed for module in linears):
        raise IncompatibleAdapterError(
            "fan_in_fan_out is true, but this base stores none of the adapter's modules as"
            " [in, out]; use the base it was trained on, or set it to false"
        )


@lru_cache(maxsize=16)
def _known_places(_layout: ModelLayout) -> dict[str, int]:
    """Return a cache of tensor name → 4 · module + part, bounded by the layout's names."""
    return {}


def _locate(
    tensors: Sequence[TensorSpan], layout: ModelLayout
) -> tuple[dict[int, TensorSpan], list[TensorSpan]]:
    """Return tensors by module and role, and those of none of the layout's modules."""
    known = _known_places(layout)
    found: dict[int, TensorSpan] = {}
    count = 0
    unknown: list[TensorSpan] = []
    for span in tensors:
        place = known.get(span.name)
        if place is None:
            place = _place(span.name, layout)
            if place is None:
                unknown.append(span)
                continue
            if place < _PARTS_PER_MODULE * len(layout.modules):  # others are not compared
                known[span.name] = place
        found[place] = span
        count += 1
    if not count and not unknown:
        # Serving the bare base under the adapter's name would be a silent error.
        raise AdapterFormatError("the file holds no tensors; save the adapter again")
    if len(found) < count:
        first: dict[int, TensorSpan] = {}
        for span in tensors:
            place = _place(span.name, layout)
            if place is not None:
                _add(first, place, span)
    return found, unknown


def _unknown_error(names: list[str], layout: ModelLayout) -> IncompatibleAdapterError:
    remedy = ""
    if not layout.others and any(parse_tensor_name(name).part in WHOLE for name in names):
        remedy = "; layouts.from_module knows norms and the like, and the base's config does not"
    return IncompatibleAdapterError(
        f"the base has no such module: {_list_first(names, 'tensor')}{remedy}"
    )


def _place(name: str, layout: ModelLayout) -> int | None:
    parsed = parse_tensor_name(name)
    if parsed.part in PARAMETERS:
        return None
    find = layout.resolve_whole if parsed.part in WHOLE else layout.resolve
    index = find(parsed.module)
    if index is None:
        return None
    place = _PARTS_PER_MODULE * index + _PARTS.index(parsed.part)
    if index >= len(layout.modules):
        return place
    embedding = layout.modules[index].embedding
    if parsed.embedding not in {None, embedding}:
        kinds = ("a linear module", "an embedding")
        raise IncompatibleAdapterError(
            f"tensor {shorten(name, 200)!r} is for {kinds[not embedding]}, but the base has"
            f" {kinds[embedding]} there; use the base it was trained on"
        )
    return place


# -- bare parameters -------------------------------------------------------------------------------

_ROLES = {
    TensorRole.A: TensorRole.PARAMETER_A,
    TensorRole.B: TensorRole.PARAMETER_B,
    TensorRole.PARAMETER_A: TensorRole.PARAMETER_A,
    TensorRole.PARAMETER_B: TensorRole.PARAMETER_B,
}
_FACTORS = (TensorRole.PARAMETER_A, TensorRole.PARAMETER_B)
_EXPERT = re.compile(r"(.+)\.([0-9]{1,6})\.(gate_proj|up_proj|down_proj|w[123])")
# The parameter of transformers 5 that has an expert's module of transformers 4, and its part there.
_EXPERT_PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0)),
}
_OLD_EXPERTS = (".block_sparse_moe.", ".mlp.")  # in Mixtral, of transformers 4 and 5


class _Found(NamedTuple):
    """Tensors of bare parameters.

    `fused` are by the indices of their module's parameters, and by depth and role; `experts` by
    parameter, and by expert, part and role.
    """

    fused: dict[tuple[int, ...], dict[tuple[int, TensorRole], TensorSpan]]
    experts: dict[int, dict[tuple[int, int, TensorRole], TensorSpan]]


def _find_parameters(tensors: Iterable[TensorSpan], layout: ModelLayout) -> _Found:
    """Sort tensors by the parameters that they change.

    Raise `IncompatibleAdapterError` for those of no parameter of the base.
    """
    found, unknown = _Found({}, {}), []
    for span in tensors:
        name = parse_tensor_name(span.name)
        role = None if name.embedding else _ROLES.get(name.part)
        if role is None:
            unknown.append(span)
        elif indices := _parameters_of(name.module, layout):
            _add(found.fused.setdefault(indices, {}), (name.depth, role), span)
        elif place := _find_expert(name.module, layout):
            index, expert, part = place
            _add(found.experts.setdefault(index, {}), (expert, part, role), span)
        else:
            unknown.append(span)
    if unknown:
        _require_matrices(unknown)  # a layout has no convolutions
        raise _unknown_error([span.name for span in unknown], layout)
    return found


def _add(spans: dict[T, TensorSpan], place: T, span: TensorSpan) -> None:
    if (other := spans.setdefault(place, span)) is not span:
        raise _twice_error(other, span)


def _twice_error(first: TensorSpan, second: TensorSpan) -> AdapterFormatError:
    return AdapterFormatError(
        f"tensors {shorten(first.name, 200)!r} and {shorten(second.name, 200)!r} are for the same"
        " module; keep one of them"
    )


def _find_expert(path: str, layout: ModelLayout) -> tuple[int, int, int] | None:
    """Return parameter, expert and part of what was a module of its own in transformers 4."""
    parsed = _EXPERT.fullmatch(path)
    if parsed is None:
        return None
    key, part = _EXPERT_PARTS[parsed[3]]
    for index in _parameters_of(parsed[1], layout):
        parameter = layout.at(index)
        assert isinstance(parameter, Parameter)
        fits = parameter.key == key and not parameter.transposed
        if fits and int(parsed[2]) < parameter.experts:
            return index, int(parsed[2]), part
    return None


def _parameters_of(path: str, layout: ModelLayout) -> tuple[int, ...]:
    return layout.parameters_of(path) or layout.parameters_of(path.replace(*_OLD_EXPERTS))


def _is_targeted(parameter: Parameter, spec: AdapterSpec) -> bool:
    """Return whether the config targets a parameter, or a router's module as transformers 4 had."""
    if any(f".{parameter.name}".endswith(f".{name}") for name in spec.parameters):
        return True
    linear = len(parameter.shape) == 2 and parameter.key == "weight"
    return linear and targeting_of(spec).omitted_by(parameter.module) is None


class _ParameterPair(NamedTuple):
    """A and B of the parameter with this index of the layout.

    `fits` and `fits_swapped` are whether their shapes are those of PEFT, and of PEFT 0.18.
    """

    number: int
    parameter: Parameter
    a: TensorSpan
    b: TensorSpan
    rank: int
    scale: float
    fits: bool
    fits_swapped: bool


def _pick_parameters(
    found: _Found, spec: AdapterSpec, layout: ModelLayout, limits: Limits, mismatches: list[str]
) -> list[OtherTensor]:
    """Return A and B of parameters, by layer; add those of a wrong shape to `mismatches`."""
    pairs: list[_ParameterPair] = []
    for indices, tensors in found.fused.items():
        pairs += _pair_parameters(indices, tensors, spec, layout, limits)
    mismatches += [_describe_parameter(it) for it in pairs if not (it.fits or it.fits_swapped)]
    swapped = not mismatches and _are_swapped(pairs, mismatches)
    others = []
    for number, parameter, a, b, rank, scale, _, fits_swapped in pairs:
        more = (), False, rank, scale, swapped and fits_swapped
        others.append(OtherTensor(number, parameter.layer, TensorRole.PARAMETER_A, a, *more))
        others.append(OtherTensor(number, parameter.layer, TensorRole.PARAMETER_B, b, *more))
    for index, experts in found.experts.items():
        others += _join_experts(index, experts, spec, layout, limits, mismatches)
    return sorted(others, key=attrgetter("layer"))


def _are_swapped(pairs: Iterable[_ParameterPair], mismatches: list[str]) -> bool:
    """Return whether in and out are swapped in a file, for experts that are not transposed.

    PEFT 0.17 and 0.18 did that, for all of them. Raise `UnsupportedAdapterError` where no shape
    tells it.
    """
    sided = [it for it in pairs if len(it.parameter.shape) > 2 and not it.parameter.transposed]
    forms = {it.fits_swapped for it in sided if it.fits != it.fits_swapped}
    if len(forms) > 1:
        mismatches += [_describe_parameter(it) for it in sided if it.fits_swapped]
    elif sided and not forms:
        raise UnsupportedAdapterError(
            f"the experts of {shorten(sided[0].parameter.name, 200)!r} have as many inputs as"
            " outputs, so that the shapes do not tell whether PEFT 0.18 or older saved A and B,"
            " with these swapped; merge the adapter into its base model"
        )
    return True in forms


def _pair_parameters(
    indices: Sequence[int],
    tensors: Mapping[tuple[int, TensorRole], TensorSpan],
    spec: AdapterSpec,
    layout: ModelLayout,
    limits: Limits,
) -> Iterator[_ParameterPair]:
    """Yield A and B of the parameters of one module.

    A name tells a parameter's place among those that are targeted: PEFT wraps the later ones around
    the first.
    """
    entries = [(index, layout.at(index)) for index in indices]
    targeted = [
        (index, entry)
        for index, entry in entries
        if isinstance(entry, Parameter) and _is_targeted(entry, spec)
    ]
    depths = {depth for depth, _ in tensors}
    if depths != set(range(len(targeted))):
        first = next(iter(tensors.values()))
        raise AdapterFormatError(
            f"adapter_config.json targets {len(targeted)} parameters of the module of tensor"
            f" {shorten(first.name, 200)!r}, and the file has tensors for {len(depths)}; correct"
            " target_parameters, or save the adapter again"
        )
    for depth, (index, parameter) in enumerate(reversed(targeted)):
        a, b = (tensors.get((depth, role)) for role in _FACTORS)
        if a is None or b is None:
            raise _orphan_error(next(it for it in (a, b) if it), "A" if a is None else "B")
        rank, scale = _rank_and_scale(parameter.name, spec, limits)
        (outs, ins), rows = parameter.sizes, rank * parameter.experts
        fits = (a.shape, b.shape) == ((rows, ins), (outs, rows))
        swaps = len(parameter.shape) > 2 and not parameter.transposed
        swapped = swaps and (a.shape, b.shape) == ((rows, outs), (ins, rows))
        yield _ParameterPair(index, parameter, a, b, rank, scale, fits, swapped)


def _describe_parameter(pair: _ParameterPair) -> str:
    _require_matrices((pair.a, pair.b))
    return (
        f"{shorten(pair.parameter.name, 200)} (A {list(pair.a.shape)} and B {list(pair.b.shape)},"
        f" the base's is {list(pair.parameter.shape)})"
    )


def _join_experts(
    index: int,
    tensors: Mapping[tuple[int, int, TensorRole], TensorSpan],
    spec: AdapterSpec,
    layout: ModelLayout,
    limits: Limits,
    mismatches: list[str],
) -> list[OtherTensor]:
    """Return A and B of a parameter, joined from the modules that transformers 4 had.

    As PEFT converts them: rank and alpha of gate_up_proj are those of gate_proj and up_proj
    together. Raise `UnsupportedAdapterError` where it cannot: with patterns, or for some experts.
    """
    parameter = layout.at(index)
    assert isinstance(parameter, Parameter)
    if spec.rank_patterns or spec.alpha_patterns:
        raise UnsupportedAdapterError(
            "rank_pattern or alpha_pattern beside experts of transformers 4, which PEFT does not"
            " convert; train with one rank and alpha"
        )
    rank, scale = _rank_and_scale(parameter.name, spec, limits)
    (outs, ins), count = parameter.sizes, parameter.experts
    parts = 1 + max(part for key, part in _EXPERT_PARTS.values() if key == parameter.key)
    places = [(expert, part) for expert in range(count) for part in range(parts)]
    joined = []
    for role, shape in zip(_FACTORS, ((rank, ins), (outs // parts, rank)), strict=True):
        spans = [tensors[*place, role] for place in places if (*place, role) in tensors]
        if len(spans) < len(places):
            raise UnsupportedAdapterError(
                f"the file has not all of A and B of {count} experts for"
                f" {shorten(parameter.name, 200)!r}, which is one parameter now; train all"
                " experts, gate_proj with up_proj"
            )
        dtype = spans[0].dtype
        mismatches += [
            f"{shorten(span.name, 200)} ({span.dtype} {list(span.shape)}, not {dtype}"
            f" {list(shape)})"
            for span in spans
            if (span.dtype, span.shape) != (dtype, shape)
        ]
        joined.append(spans)
    a, b = joined
    _require_targeted(spec, a, layout)
    more = (), False, parts * rank, scale * (sqrt(parts) if spec.rslora else 1)
    left = _join(a, (count * parts * rank, ins))
    right = _join(b, (count, parts, outs // parts, rank))
    return [
        OtherTensor(index, parameter.layer, TensorRole.PARAMETER_A, left, *more),
        OtherTensor(index, parameter.layer, TensorRole.EXPERTS_B, right, *more),
    ]


def _join(spans: Sequence[TensorSpan], shape: tuple[int, ...]) -> TensorSpan:
    """Return one tensor of the bytes of several."""
    pieces = tuple([ByteSpan(span.start, span.stop) for span in spans])
    return spans[0]._replace(shape=shape, pieces=pieces)


def check_matching(spec: AdapterSpec, names: Iterable[str]) -> None:
    """Raise `UnsupportedAdapterError` if matching all patterns with all names takes too long.

    Matching is linear in pattern and path, but an untrusted config may have many of both.
    """
    steps = sum(pattern.cost for pattern in (*spec.rank_patterns, *spec.alpha_patterns))
    if steps * sum(map(len, names)) > MAX_MATCHING_STEPS:
        raise UnsupportedAdapterError(
            "rank_pattern and alpha_pattern would take too long to match; write fewer of them"
        )


def _rank_and_scale(module: str, spec: AdapterSpec, limits: Limits) -> tuple[int, float]:
    rank = spec.rank_of(module)
    if not 1 <= rank <= limits.max_rank:
        raise UnsupportedAdapterError(
            f"rank {rank} is outside 1 … {limits.max_rank}; raise Limits.max_rank to accept more"
        )
    scale = spec.scale_of(module, rank)
    if not abs(scale) <= _MAX_SCALE:
        raise AdapterFormatError(
            f"module {shorten(module, 200)!r} would be scaled by {scale}, which float32 cannot"
            " hold; correct lora_alpha or alpha_pattern in adapter_config.json"
        )
    return rank, scale


def _describe_mismatch(a: TensorSpan, b: TensorSpan, rank: int, module: Module) -> str:
    _require_matrices((a, b))
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise AdapterFormatError(
            f"module {shorten(module.name, 200)!r}: A {list(a.shape)} and B {list(b.shape)} are not"
            f" a pair of rank {rank}, as in adapter_config.json; correct its r or rank_pattern"
        )
    return (
        f"{shorten(module.name, 200)} ({a.shape[1]} → {b.shape[0]},"
        f" the base's is {module.in_features} → {module.out_features})"
    )


def _describe_bases(tensors: Sequence[TensorSpan], spec: AdapterSpec, layout: ModelLayout) -> str:
    """Name the base that the adapter was trained on, and the loader's, with layers and sizes."""
    layers, widths = [0], Counter[int]()
    for span in tensors:
        name = parse_tensor_name(span.name)
        layers.append(layer_index(name.module) or 0)
        if name.part is TensorRole.A and len(span.shape) == 2 and not name.embedding:
            widths[span.shape[1]] += 1
    own = Counter(module.in_features for module in layout.modules if not module.embedding)
    trained, served = (
        repr(shorten(name, 100)) if name else "a base without a name"
        for name in (spec.base_model, layout.base)
    )
    known = f"{layout.architecture}, " if layout.architecture else ""
    return (
        f"by its config the adapter is for {trained} (it has layers up to {max(layers)}, width"
        f" {_most_common(widths)}); this loader serves {served} ({known}layers up to"
        f" {layout.num_layers - 1}, width {_most_common(own)})"
    )


_TASK_CLASSES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
}
"""The ends of transformers' classes by PEFT's `task_type`."""

_ROOTS = 8  # prefixes of missing modules that are compared with the layout's

_TASK_HEADS = frozenset({"lm_head", "score", "classifier", "qa_outputs"})
"""The modules that some of these classes have, and others of the same base do not."""


def _describe_other_class(
    tensors: Sequence[TensorSpan], spec: AdapterSpec, layout: ModelLayout
) -> str:
    """Name the class of the same base that the adapter's names fit; "" if there is none.

    Another class has another path before the layers, or another head.
    """
    paths = {parse_tensor_name(span.name).module for span in tensors}
    missing = sorted(path for path in paths if layout.resolve(path) is None)
    roots = {tuple(path.split(".")[:2]): path for path in reversed(missing)}
    pairs = (_counterpart(path, missing, layout) for path in islice(roots.values(), _ROOTS))
    renamed = next(filter(None, pairs), None)
    head = next((path for path in missing if path in _TASK_HEADS), None)
    own = layout.architecture or "this loader's class"
    if renamed is not None:
        path, counterpart = renamed
        difference = f"has {shorten(path, 100)!r} where {own} has {shorten(counterpart, 100)!r}"
    elif head is not None and len(missing) < len(paths):
        difference = f"has {head!r}, which {own} does not have"
    else:
        return ""
    stem = layout.architecture.removesuffix("LMHeadModel").partition("For")[0]
    by_task = _TASK_CLASSES.get(spec.task or "")
    name = spec.base_class or (f"{stem}{by_task}" if stem and by_task and renamed is None else "")
    known = f"{shorten(name, 100)}, which" if name and name != own else "one that"
    return f"; its names fit another class of the same base, {known} {difference}"


def _counterpart(path: str, missing: Sequence[str], layout: ModelLayout) -> tuple[str, str] | None:
    """Return `path` and the layout's module that differs from it in what precedes the layers.

    The same exchange has to lead to modules of the layout for all of `missing` that begin alike.
    """
    rest = path
    while rest := rest.partition(".")[2]:
        before = path.removesuffix(rest)
        if layer_index(before) is not None:
            return None
        for module in layout.modules:
            own = module.name.removesuffix(rest)
            if own == module.name or layer_index(own) is not None or not f".{own}".endswith("."):
                continue
            alike = (name.removeprefix(before) for name in missing if name.startswith(before))
            if all(layout.resolve(own + name) is not None for name in alike):
                return path, module.name
    return None


def _most_common(sizes: Counter[int]) -> str:
    return str(sizes.most_common(1)[0][0]) if sizes else "unknown"


def _orphan_error(span: TensorSpan, missing: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"tensor {shorten(span.name, 200)!r} has no {missing} beside it; save the adapter again"
    )


def _list_first(offenders: list[str], noun: str) -> str:
    shown = ", ".join(shorten(text, 250) for text in offenders[:_SHOWN])
    more = ", …" if len(offenders) > _SHOWN else ""
    return f"{shown}{more} ({len(offenders)} {noun}{'s' * (len(offenders) > 1)} in all)"
