"""Make a `ModelLayout` from a base model's config, from a model, or from an adapter's shapes.

The functions block: they read files, and for some configs import transformers and build a model
without weights. Call them while the server starts, or in a thread.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn

from lorax_async.config import DTYPES, Limits
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    LoraxError,
    UnsupportedAdapterError,
    shorten,
    shorten_repr,
)
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import (
    HEADS,
    WEIGHT_DTYPES,
    TensorName,
    layer_index,
    matrix_error,
    parse_tensor_name,
    targeting_of,
)
from lorax_async.formats.safetensors import Header, TensorSpan
from lorax_async.formats.strict_json import JsonValue, parse_object
from lorax_async.formats.tensor_kinds import PARAMETERS, WHOLE, TensorRole
from lorax_async.planning.layout import ModelLayout, Module, OtherModule, Parallelism, Parameter
from lorax_async.planning.model_families import (
    HEAD_COUNTS,
    HEAD_DIMS,
    KEY_VALUE_HEAD_COUNTS,
    LAYER_COUNTS,
    AttentionShape,
    Parts,
    decoder_layout,
    output_parts,
    parallel_of,
)
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.remote.hub import download_base
from lorax_async.sources.local import read_header
from lorax_async.types import AdapterSpec


def parts_of(model: Any, name: str, out_features: int) -> Parts:
    """Return the parts of the output of `model`'s linear module `name`; empty if unknown."""
    config, path = None, name
    while config is None and path:  # that of the nearest module around it which has one
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
    attention = _attention(model.get_submodule(name.rpartition(".")[0]), config)
    return output_parts(getattr(config, "model_type", ""), name, out_features, attention)


def _attention(module: Any, config: Any) -> AttentionShape | None:
    heads = _first_size(module, HEAD_COUNTS) or _first_size(config, HEAD_COUNTS)
    if not heads:
        return None
    head_dim = _first_size(module, HEAD_DIMS) or _first_size(config, HEAD_DIMS)
    head_dim = head_dim or _first_size(config, ("hidden_size",)) // heads
    groups = _first_size(module, ("num_key_value_groups",))
    key_value_heads = _first_size(module, KEY_VALUE_HEAD_COUNTS)
    key_value_heads = key_value_heads or (heads // groups if groups else 0)
    key_value_heads = key_value_heads or _first_size(config, KEY_VALUE_HEAD_COUNTS) or heads
    if not head_dim or heads % key_value_heads:
        return None
    return AttentionShape(
        heads,
        key_value_heads,
        head_dim,
        multi_query=getattr(module, "multi_query", False) is True,
        grouped=getattr(module, "new_decoder_architecture", False) is True,
    )


def _first_size(owner: Any, names: tuple[str, ...]) -> int:
    """Return the first of these attributes that is a positive int, or 0."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def is_lookup(name: str, module: nn.Module) -> bool:
    """Return whether the module is a lookup of token or position ids, with an optional scale.

    An adapter cannot target embeddings that compute anything else (OPT's positions), or those
    within a layer (T5's relative positions), whose input is not tokens.
    """
    if not isinstance(module, nn.Embedding) or layer_index(name) is not None:
        return False
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return plain and module.max_norm is None


def is_experts(module: nn.Module) -> bool:
    """Return whether a module has fused experts, as transformers 5 has them."""
    if has_slabs(module):
        return True
    fields = vars(module)
    known = {"has_gate", "has_bias", "is_transposed"} <= fields.keys()
    if not known or fields.get("has_post_expert_norm"):
        return False
    first = "gate_up_proj" if fields["has_gate"] else "up_proj"
    return {first, "down_proj"} <= dict(module.named_parameters(recurse=False)).keys()


def has_slabs(module: nn.Module) -> bool:
    """Return whether a module has fused experts that all get all tokens, as Llama 4's.

    PEFT does not see that their weights are `[experts, in, out]`, and calls in out.
    """
    return type(module).__name__ == "Llama4TextExperts"


def is_conv1d(module: nn.Module) -> TypeGuard[Any]:
    """Return whether the module is a `Conv1D` of transformers. Do not import it: it takes long."""
    # A model can only have one if this was imported.
    loaded = sys.modules.get("transformers.pytorch_utils")
    return isinstance(module, getattr(loaded, "Conv1D", ()))


Dtype: TypeAlias = str | torch.dtype | None

CONFIG_FILE = "adapter_config.json"

MAX_LAYERS = 4_096
"""The limit of a config's layers: more would take minutes and gigabytes."""

_MATRICES = (TensorRole.A, TensorRole.B)


def from_pretrained(
    base: str | PathLike[str],
    dtype: Dtype = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    offline: bool = False,
) -> ModelLayout:
    """Return the layout of a base model, from its `config.json` alone.

    No weights are read, and no code of the model is run. The layouts of common decoders
    (`planning.model_families`) are known. For another config, transformers is imported and builds
    the model on the meta device, which takes seconds. On an event loop, use
    `AdapterLoader.from_pretrained`, or call this in a thread.

    Parameters
    ----------
    base
        A folder, or a hub id (`name`, `org/name` or `org/name@revision`), whose config.json
        huggingface_hub downloads into its own cache.
    dtype
        The dtype in which the server runs the base (torch's, or its name); None for the config's.
    revision, token, endpoint, offline
        Of a hub id. The token None is this machine's own; `offline` makes no request.

    Raises
    ------
    ConfigError
        If there is no config, or one of more than `MAX_LAYERS` layers, transformers is needed but
        missing or cannot build the model, or the dtype is unknown.
    """
    if not isinstance(base, str | PathLike) or base == "":  # Path("") is the current folder
        raise ConfigError(
            f"a base model is a folder or a hub id, not {shorten_repr(base)}; for a model in"
            " memory, use layouts.from_module"
        )
    folder = Path(base)
    if not os.path.isdir(folder) and is_hub_id(base):
        name, _, version = str(base).partition("@")
        version = revision or version
        downloaded = download_base(
            name, revision=version or None, token=token, endpoint=endpoint, offline=offline
        )
        folder = Path(downloaded)
    _require_config(folder)
    config = _read_config(folder / "config.json")
    for key in LAYER_COUNTS:
        layers = config.get(key)
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise ConfigError(f"{str(folder)!r} has {layers:,} layers; {MAX_LAYERS:,} is the limit")
    layout = decoder_layout(config) if _is_causal(config) else None
    if layout is not None:
        layout = replace(layout, architecture=_architecture(config) or "")
    own: object = config.get("dtype") or config.get("torch_dtype")
    if layout is None:
        model, own = _build_model(folder)
        layout = from_module(model, "float32")
    shown = f"{base}@{revision}" if revision and not os.path.isdir(base) else str(base)
    return replace(layout, dtype=_dtype_name(dtype or own), base=shown)


def _is_causal(config: Mapping[str, JsonValue]) -> bool:
    """Return whether a config names a causal class or a bare backbone, or no class."""
    name = _architecture(config)
    return name is None or name.endswith(("ForCausalLM", "LMHeadModel", "Model"))


def _architecture(config: Mapping[str, JsonValue]) -> str | None:
    """Return the class of transformers by which a base was saved, as its config names it."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) else None


def _require_config(folder: Path) -> None:
    if os.path.isfile(folder / "config.json"):  # Path.is_file may raise PermissionError
        return
    path = repr(shorten(str(folder.absolute()), 500))
    if os.path.exists(folder / CONFIG_FILE):
        problem = f"the folder {path} is an adapter's"
    elif os.path.isdir(folder):
        problem = f"the folder {path} has no config.json"
    else:
        problem = f"{path} is a file" if os.path.exists(folder) else f"there is no folder {path}"
    raise ConfigError(f"{problem}; pass the folder of a base model, or its id on the hub")


def is_hub_id(base: str | PathLike[str]) -> bool:
    """Return whether the text can be a model's id on the hub: `name` or `org/name[@revision]`."""
    name = base.partition("@")[0] if isinstance(base, str) else ""
    return len(name) > 0 and name.count("/") <= 1 and not name.startswith((".", "/", "~", "file:"))


def _read_config(path: Path) -> Mapping[str, JsonValue]:
    """Return the members of a config; none if it is no strict JSON within the limits."""
    limits = Limits()
    size, depth = limits.max_config_bytes, limits.max_json_depth
    try:
        return parse_object(_read(path, size), what=path.name, max_bytes=size, max_depth=depth)
    except (OSError, LoraxError):
        return {}


def _build_model(folder: Path) -> tuple[nn.Module, object]:
    """Return the model of a config, without weights, and the config's dtype."""
    try:
        import transformers  # noqa: PLC0415 (slow)
    except ImportError as error:
        raise ConfigError(
            f"the modules of {str(folder)!r} are not known without transformers; install it, or"
            " build the model yourself and use layouts.from_module"
        ) from error
    try:
        # Without `trust_remote_code`, it asks on the terminal whether to run the folder's code.
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        dtype = config.dtype
        build = _class_of(config)
        with torch.device("meta"):
            model = build(config)
    except Exception as error:  # an untrusted config can make transformers raise anything
        reason = shorten(" ".join(str(error).split()), 300)
        raise ConfigError(
            f"transformers cannot build the model of {str(folder)!r} ({reason}); build it yourself"
            " and use layouts.from_module"
        ) from error
    return model, dtype


def _class_of(config: Any) -> Any:
    """Return the class of transformers by which a base was saved.

    The causal class of its type, if there is one, for a config that names none, one that
    transformers does not know, or the bare backbone, whose names all adapters of the type may omit.
    """
    import transformers  # noqa: PLC0415 (slow)

    name = (config.architectures or [""])[0]
    own = getattr(transformers, name, None)
    fits = isinstance(own, type) and getattr(own, "config_class", None) is type(config)
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is not None and causal.config_class is type(config):
        bare = own is transformers.MODEL_MAPPING.get(type(config), None)
        own, fits = (causal, True) if bare or not fits else (own, fits)
    if not fits:
        raise TypeError(f"transformers has no class {shorten(name, 100)!r} of this config")
    return own


def _dtype_name(dtype: object) -> str:
    """Return a layout's name of a dtype, which is torch's or its name."""
    if dtype is None:
        raise ConfigError("the config has no dtype; pass the one in which the base will run")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"the base's dtype {shorten(name, 40)!r} is not supported for adapters; pass dtype, one"
            f" of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def from_module(model: nn.Module, dtype: Dtype = None) -> ModelLayout:
    """Return the layout of a base model in memory or on the meta device, without adapters.

    Its modules are those that PEFT adapts: `nn.Linear`, transformers' `Conv1D`, and embeddings of
    tokens or positions. A linear module without a layer number comes before the layers if it does
    so in the model, else after them; an embedding comes before them. The class is that on which the
    adapters were trained, or its form with or without a head. `dtype` is the one in which it
    computes (torch's, or its name), None the most frequent one of its linear weights.

    Raise `ConfigError` if it is no `nn.Module`, has no numbered layers, has adapters attached, or
    its dtype is unknown.
    """
    argument: object = model
    if not isinstance(argument, nn.Module):
        raise ConfigError(
            f"the model is an nn.Module, not {shorten_repr(argument)}; for a folder or a hub id,"
            " use layouts.from_pretrained"
        )
    modules: list[Module] = []
    linears: dict[str, Any] = {}
    for name, module in _adaptable_modules(model):
        if isinstance(module, nn.Embedding):
            sizes = module.num_embeddings, module.embedding_dim
            modules.append(Module(name, *sizes, -1, Parallelism.REPLICATED, embedding=True))
        else:
            linears[name] = module
    layers = [layer_index(name) for name in linears]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        raise ConfigError(f"{type(model).__name__} has no linear modules in numbered layers")
    num_layers = max(numbered) + 1
    first = layers.index(numbered[0])
    for place, ((name, linear), layer) in enumerate(zip(linears.items(), layers, strict=True)):
        outside = -1 if place < first else num_layers
        modules.append(_linear_module(model, name, linear, outside if layer is None else layer))
    common = Counter(linear.weight.dtype for linear in linears.values()).most_common(1)[0][0]
    backbone = getattr(model, "base_model_prefix", "")
    headed = isinstance(backbone, str) and isinstance(getattr(model, backbone, None), nn.Module)
    prefix = f"{backbone}." if headed and backbone else ""
    return ModelLayout(
        tuple(modules),
        num_layers,
        _dtype_name(dtype or common),
        prefix,
        _text_prefixes(model),
        architecture=type(model).__name__,
        others=_other_modules(model, {module.name for module in modules}, num_layers),
        parameters=_parameters(model, {module.name for module in modules}),
        renames=_renames(model),
    )


def _other_modules(model: nn.Module, known: set[str], num_layers: int) -> tuple[OtherModule, ...]:
    """Return the modules with a weight or a bias of their own that are not in `known`.

    One without a layer number comes before the layers if it does so in the model, else after them.
    """
    others, layer = [], -1
    for name, module in model.named_modules():
        index = layer_index(name)
        layer = max(layer, 0) if index is not None else layer
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if name in known or not name or (weight is None and bias is None):
            continue
        outside = -1 if layer < 0 else num_layers
        shapes = [None if it is None else tuple(it.shape) for it in (weight, bias)]
        layer_of = outside if index is None else index
        others.append(OtherModule(name, shapes[0], shapes[1], layer_of))
    return tuple(others)


def _parameters(model: nn.Module, known: set[str]) -> tuple[Parameter, ...]:
    """Return the bare parameters of experts and routers, which are in numbered layers.

    Without those of modules in `known`, which are named like them.
    """
    found = []
    for name, module in model.named_modules():
        layer = layer_index(name)
        own = dict(module.named_parameters(recurse=False))
        # A router is one matrix, and perhaps a bias.
        router = set(own) <= {"weight", "bias"} and "weight" in own and own["weight"].dim() == 2
        if layer is None or name in known or not (router or is_experts(module)):
            continue
        transposed = bool(getattr(module, "is_transposed", False))
        for key, parameter in own.items():
            shape = tuple(parameter.shape)
            if len(shape) in {2, 3}:
                found.append(Parameter(name, key, shape, layer, transposed and len(shape) == 3))
    return tuple(found)


def _renames(model: Any) -> tuple[tuple[str, str], ...]:
    """Return the prefixes that transformers, and so PEFT, renames in older files of this model.

    Its other patterns are for weights of bases, not for adapters' modules.
    """
    transformers: Any = sys.modules.get("transformers")
    config = getattr(model, "config", None)
    if transformers is None or not isinstance(config, transformers.PreTrainedConfig):
        return ()
    try:
        mappings: Any = importlib.import_module("transformers.conversion_mapping")
    except ImportError:
        return ()
    if mappings.get_checkpoint_conversion_mapping(config.model_type) is None:
        return ()
    entries: list[Any] = mappings.get_model_conversion_mapping(model)
    found = []
    for entry in entries:
        for pattern in entry.source_patterns:
            (now, *more), plain = entry.target_patterns, _PREFIX_PATTERN.fullmatch(pattern)
            if plain and not more and entry.scope_prefix is None and "\\" not in now:
                found.append((plain[1].replace("\\", ""), now))
    return tuple(found)


_PREFIX_PATTERN = re.compile(r"\^((?:[A-Za-z0-9_]|\\?\.)+)")


def _text_prefixes(model: Any) -> tuple[tuple[str, str], ...]:
    """Return where the text class of a model of text and images has names of its own.

    Pairs of a prefix there and here; none if the model is no composite of transformers.
    """
    transformers: Any = sys.modules.get("transformers")  # imported, if the model is one of its own
    config = getattr(model, "config", None)
    if transformers is None or not isinstance(config, transformers.PreTrainedConfig):
        return ()
    text = config.get_text_config()
    if text is config or config.is_encoder_decoder:
        return ()
    causals = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    causal = causals.get(type(text), None) or causals.get(type(config), None)
    backbone = transformers.MODEL_MAPPING.get(type(text), None)
    for name, module in model.named_modules() if causal is not None else ():
        if name and type(module) is causal:
            return (("", f"{name}."),)
        if name and type(module) is backbone:
            return ((f"{causal.base_model_prefix}.", f"{name}."),)
    return ()


def _adaptable_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield linear modules and embeddings, by name; raise `ConfigError` if one has an adapter."""
    for name, module in model.named_modules():
        if name.endswith(".base_layer") or ".lora_A." in name:
            raise ConfigError(
                f"module {name!r} belongs to an attached adapter; take the layout of the plain"
                " base model"
            )
        # Routers that are linear modules give indices too: their weight is a bare parameter.
        linear = isinstance(module, nn.Linear) and not type(module).__name__.endswith("Router")
        linear = linear or is_conv1d(module)
        if (linear or is_lookup(name, module)) and name:
            yield name, module


def _linear_module(model: nn.Module, name: str, linear: Any, layer: int) -> Module:
    transposed = not isinstance(linear, nn.Linear)
    # A quantised linear packs its weight, so take the sizes from the module.
    sizes = linear.weight.shape if transposed else (linear.in_features, linear.out_features)
    inputs, outputs = map(int, sizes)
    parts = parts_of(model, name, outputs)
    return Module(name, inputs, outputs, layer, parallel_of(name), transposed, parts)


def from_adapter(dir: str | PathLike[str], *, limits: Limits | None = None) -> ModelLayout:
    """Return a layout of the modules that one adapter targets, without its base model.

    The dtype is that of A and B, or F32 if they have several. `lm_head` comes after the layers, any
    other module without a layer number before them. Raise what a load of this adapter raises:
    `AdapterNotFoundError`, `AdapterFormatError` or `UnsupportedAdapterError`.
    """
    if not isinstance(dir, str | PathLike) or dir == "":
        raise ConfigError(f"an adapter's folder is a path, not {shorten_repr(dir)}")
    folder, limits = Path(dir), limits or Limits()
    try:
        spec = parse_config(_read(folder / CONFIG_FILE, limits.max_config_bytes), limits)
        header, _ = read_header(folder, limits)
    except LoraxError as error:
        raise error.located(id=str(folder)) from error
    whole = _whole_shapes(header)
    parameters = _adapter_parameters(header, spec)
    shapes = _shapes(header, {it.module for it in parameters})
    numbers = {it: layer_index(it) for it in (*shapes, *whole, *(it.module for it in parameters))}
    num_layers = 1 + max((n for n in numbers.values() if n is not None), default=0)
    layers: dict[str, int] = {}
    for path, number in numbers.items():
        outside = num_layers if path.rpartition(".")[2] in HEADS else -1
        layers[path] = outside if number is None else number
    modules = [
        Module(
            name=path,
            in_features=a.shape[1],
            out_features=b.shape[0],
            layer=layers[path],
            parallel=Parallelism.REPLICATED if embedding else parallel_of(path),
            transposed=spec.fan_in_fan_out and not embedding,
            embedding=embedding,
        )
        for path, (a, b, embedding) in shapes.items()
    ]
    modules += _token_modules(header, spec)
    dtypes = {span.dtype for a, b, _ in shapes.values() for span in (a, b)}
    dtypes |= {span.dtype for _, span in _factors(header)}
    uniform = len(dtypes) == 1 and dtypes <= set(WEIGHT_DTYPES)
    layout = ModelLayout(
        tuple(modules),
        num_layers,
        dtypes.pop() if uniform else "F32",
        others=tuple(OtherModule(path, *own, layers[path]) for path, own in whole.items()),
        parameters=tuple(replace(it, layer=layers[it.module]) for it in parameters),
    )
    # Make the checks of a load, and so raise its errors, by planning the transfer.
    plan_transfer(
        header,
        spec,
        layout,
        dtype=None,
        alignment=1,
        rank_multiple=1,
        limits=limits,
        staging_move_bytes=1 << 30,
    )
    return layout


_EXPERT_KEYS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""The parameters of fused experts in transformers, in the order of their modules."""


def _adapter_parameters(header: Header, spec: AdapterSpec) -> list[Parameter]:
    """Return bare parameters as an adapter's shapes tell them, without their layers.

    Transposed ones, because they take A and B as they are: PEFT's older form cannot be told.
    """
    targeting, found = targeting_of(spec), dict[str, dict[int, TensorSpan]]()
    for span in header.tensors if spec.parameters else ():
        name = parse_tensor_name(span.name)
        plain = name.part is TensorRole.A and not name.embedding and not name.depth
        outer = plain and targeting.omitted_by(name.module) is not None
        if (name.part is TensorRole.PARAMETER_A or outer) and len(span.shape) == 2:
            found.setdefault(name.module, {})[name.depth] = span
    shapes = {(it.module, it.depth): span.shape for it, span in _factors(header)}
    parameters = []
    for path, by_depth in found.items():
        ends = (name.rpartition(".") for name in spec.parameters)
        keys = {key for owner, dot, key in ends if f".{path}".endswith(f"{dot}{owner}")}
        order = [key for key in _EXPERT_KEYS if key in keys]
        for depth, key in enumerate([*order, *sorted(keys.difference(order))][::-1]):
            a, b = by_depth.get(depth), shapes.get((path, depth))
            if a is None or b is None or len(b) != 2:
                continue
            experts = a.shape[0] // spec.rank_of(f"{path}.{key}")
            sizes = (experts, a.shape[1], b[0]) if experts > 1 else (b[0], a.shape[1])
            parameters.append(Parameter(path, key, sizes, 0, transposed=experts > 1))
    return parameters[::-1]


def _factors(header: Header) -> Iterator[tuple[TensorName, TensorSpan]]:
    """Yield the names and spans of B."""
    for span in header.tensors:
        name = parse_tensor_name(span.name)
        if name.part in {TensorRole.B, TensorRole.PARAMETER_B} and not name.embedding:
            yield name, span


_Shape: TypeAlias = tuple[int, ...] | None


def _whole_shapes(header: Header) -> dict[str, tuple[_Shape, _Shape]]:
    """Return the shapes of weight and bias of the modules that the adapter replaces."""
    whole: dict[str, tuple[_Shape, _Shape]] = {}
    for span in header.tensors:
        name = parse_tensor_name(span.name)
        weight, bias = whole.get(name.module, (None, None))
        if name.part is TensorRole.WEIGHT:
            whole[name.module] = span.shape, bias
        elif name.part is TensorRole.OWN_BIAS:
            whole[name.module] = weight, span.shape
    return whole


def _token_modules(header: Header, spec: AdapterSpec) -> list[Module]:
    """Return the embeddings of which the adapter has rows, as large as its tokens tell."""
    size = 1 + max((token for _, tokens in spec.tokens for token in tokens), default=0)
    named = [(parse_tensor_name(span.name), span) for span in header.tensors]
    return [
        Module(name.module, size, span.shape[-1], -1, Parallelism.REPLICATED, embedding=True)
        for name, span in named
        if name.part is TensorRole.TOKENS and span.shape
    ]


def _shapes(header: Header, parameters: set[str]) -> dict[str, tuple[TensorSpan, TensorSpan, bool]]:
    """Return A and B of each module, and whether it is an embedding.

    Without those of modules whose `parameters` the adapter changes.
    """
    parts: dict[str, dict[TensorRole, TensorSpan]] = {}
    vectors: dict[str, TensorSpan] = {}
    embeddings: dict[str, bool] = {}
    named = [(parse_tensor_name(span.name), span) for span in header.tensors]
    left = WHOLE | PARAMETERS | {TensorRole.TOKENS}
    named = [(name, span) for name, span in named if name.module not in parameters]
    for name, span in [(name, span) for name, span in named if name.part not in left]:
        if name.part not in _MATRICES:
            vectors.setdefault(name.module, span)
            continue
        if len(span.shape) != 2 or 0 in span.shape:
            raise matrix_error(span.name, span.shape)
        parts.setdefault(name.module, {})[name.part] = span
        if embeddings.setdefault(name.module, name.embedding is True) != name.embedding:
            raise AdapterFormatError(
                f"module {shorten(name.module, 200)!r} has tensors of a linear module and of an"
                " embedding; save the adapter again"
            )
    for path, matrices in parts.items():
        if len(matrices) < len(_MATRICES):
            raise AdapterFormatError(
                f"module {shorten(path, 200)!r} has only one of A and B; save the adapter again"
            )
    for path, span in vectors.items():
        if path not in parts:
            raise AdapterFormatError(
                f"tensor {shorten(span.name, 200)!r} has no A and B beside it; save the adapter"
                " again"
            )
    if not parts and not parameters:
        raise AdapterFormatError("the file has no tensors of A and B; save the adapter again")
    return {
        path: (ab[TensorRole.A], ab[TensorRole.B], embeddings[path]) for path, ab in parts.items()
    }


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise AdapterNotFoundError(f"there is no file {str(path)!r}")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnsupportedAdapterError(f"{path.name} is larger than the limit of {limit:,} bytes")
    return content
