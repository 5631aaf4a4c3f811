"""`ModelLayout` from a base's config, from a model, or from an adapter's own shapes.

These functions block (they import transformers, build a model without weights, read files): call
them while the server starts, or in a thread.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lorax_async.adaptable import HEADS, adaptable, embedding_module, linear_module, parallel_of
from lorax_async.config import DTYPES, Limits
from lorax_async.core.header import Header, TensorSpan, header_size, parse_header
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.core.peft_config import parse_config
from lorax_async.core.peft_names import WEIGHT_DTYPES, Part, layer_index, parse_tensor_name
from lorax_async.core.split_index import INDEX
from lorax_async.core.transfer_plan import plan_transfer
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    UnsupportedAdapterError,
    shorten,
)
from lorax_async.io.sources.local_weights import read_header

Dtype: TypeAlias = str | torch.dtype | None

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MATRICES = (Part.A, Part.B)


def from_pretrained(dir: str | Path, dtype: Dtype = None) -> ModelLayout:
    """The layout of the base in a local folder, from its `config.json` alone.

    The model is built on the meta device: no weights are read, nothing is fetched, no code of the
    folder is run.

    Parameters
    ----------
    dir
        The folder.
    dtype
        What the server will run the base in (torch's, or its name); None takes the config's.

    Raises
    ------
    ConfigError
        The folder has no config, transformers cannot build it, or the dtype is not known.
    """
    folder = Path(dir)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{str(folder)!r} has no config.json; give the folder of a base model")
    import transformers  # noqa: PLC0415 (slow, and not needed by those who give a model)

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = _build(transformers, config)
    except Exception as error:  # whatever a stranger's config makes of transformers
        raise ConfigError(
            f"transformers cannot build the model of {str(folder)!r} ({error}); build it yourself"
            " and use layouts.from_module"
        ) from error
    named = dtype or config.dtype
    if named is None:
        raise ConfigError("the config names no dtype; pass the one that the base will run in")
    return from_module(model, named)


def _build(transformers: Any, config: Any) -> nn.Module:
    """The causal model of a config, or else the class that its author saved."""
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = getattr(transformers, (config.architectures or [""])[0])(config)
    assert isinstance(model, nn.Module)
    return model


def from_module(model: nn.Module, dtype: Dtype = None) -> ModelLayout:
    """The layout of a base model in memory (or on the meta device), before adapters are attached.

    Its modules are those PEFT adapts: `nn.Linear` and transformers' `Conv1D`, and the embeddings
    that look up tokens or positions. A linear module without a layer number comes before the layers
    if it does so in the model, else after; an embedding comes before them.

    Parameters
    ----------
    model
        The same class that the adapters' authors trained on, or its headed or bare form.
    dtype
        What it computes in (torch's, or its name); None takes that of most linear weights.

    Raises
    ------
    ConfigError
        The model has no numbered layers, carries adapters already, or its dtype is not known.
    """
    found = dict(adaptable(model))
    linears = {name: m for name, m in found.items() if not isinstance(m, nn.Embedding)}
    embeddings = [
        embedding_module(name, m) for name, m in found.items() if isinstance(m, nn.Embedding)
    ]
    layers = [layer_index(name) for name in linears]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        raise ConfigError(f"{type(model).__name__} has no linear modules in numbered layers")
    num_layers = max(numbered) + 1
    first = layers.index(numbered[0])
    places = [-1 if n < first else num_layers for n in range(len(layers))]
    modules = [
        linear_module(model, name, linear, place if layer is None else layer)
        for (name, linear), layer, place in zip(linears.items(), layers, places, strict=True)
    ]
    common = Counter(linear.weight.dtype for linear in linears.values()).most_common(1)[0][0]
    return ModelLayout(
        (*embeddings, *modules),
        num_layers,
        _storage_dtype(dtype or common),
        _backbone_prefix(model),
    )


def _storage_dtype(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"the base's dtype {name!r} is not one adapters can have; pass dtype, one of"
            f" {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _backbone_prefix(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    headed = isinstance(prefix, str) and isinstance(getattr(model, prefix, None), nn.Module)
    return f"{prefix}." if headed and prefix else ""


def from_adapter(dir: str | Path, *, limits: Limits | None = None) -> ModelLayout:
    """A layout of just what one adapter targets, by its own shapes, when the base is not at hand.

    The dtype is that of its A and B; where they mix several, F32, which holds them all. `lm_head`
    comes after the layers, any other module without a number before them.

    Raises
    ------
    AdapterNotFoundError
        The folder lacks one of the adapter's files.
    AdapterFormatError, UnsupportedAdapterError
        As a load of this adapter would raise.
    """
    folder, limits = Path(dir), limits or Limits()
    spec = parse_config(_read(folder / CONFIG_FILE, limits.max_config_bytes), limits)
    header = _read_header(folder, limits)
    shapes = _shapes(header)
    numbers = {path: layer_index(path) for path in shapes}
    num_layers = 1 + max((n for n in numbers.values() if n is not None), default=0)
    modules = [
        Module(
            name=path,
            in_features=a.shape[1],
            out_features=b.shape[0],
            layer=_layer(path, numbers[path], num_layers),
            parallel=Parallel.REPLICATED if embedding else parallel_of(path),
            transposed=spec.fan_in_fan_out and not embedding,
            embedding=embedding,
        )
        for path, (a, b, embedding) in shapes.items()
    ]
    dtypes = {span.dtype for a, b, _ in shapes.values() for span in (a, b)}
    alone = len(dtypes) == 1 and dtypes <= set(WEIGHT_DTYPES)
    layout = ModelLayout(tuple(modules), num_layers, dtypes.pop() if alone else "F32")
    # A layout of an adapter that cannot be loaded would be of no use: check what a load checks.
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


def _layer(path: str, number: int | None, num_layers: int) -> int:
    if number is not None:
        return number
    return num_layers if path.rpartition(".")[2] in HEADS else -1


def _shapes(header: Header) -> dict[str, tuple[TensorSpan, TensorSpan, bool]]:
    """A and B of each module, and whether it is an embedding."""
    parts: dict[str, dict[Part, TensorSpan]] = {}
    embeddings: dict[str, bool] = {}
    for span in header.tensors:
        name = parse_tensor_name(span.name)
        if name.part not in _MATRICES:
            continue
        if len(span.shape) != 2 or 0 in span.shape:
            raise AdapterFormatError(
                f"tensor {shorten(span.name, 200)!r} has shape {list(span.shape)}, not two"
                " positive dimensions; save the adapter again"
            )
        parts.setdefault(name.module, {})[name.part] = span
        embeddings[name.module] = name.embedding is True
    for path, found in parts.items():
        if len(found) < len(_MATRICES):
            raise AdapterFormatError(
                f"module {shorten(path, 200)!r} has only one of A and B; save the adapter again"
            )
    if not parts:
        raise AdapterFormatError("the file holds no tensors; save the adapter again")
    return {path: (ab[Part.A], ab[Part.B], embeddings[path]) for path, ab in parts.items()}


def _read(path: Path, most: int) -> bytes:
    if not path.is_file():
        raise AdapterNotFoundError(f"there is no file {str(path)!r}")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnsupportedAdapterError(f"{path.name} is larger than the limit of {most:,} bytes")
    return content


def _read_header(folder: Path, limits: Limits) -> Header:
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / INDEX).exists():
        return read_header(folder, limits)[0]
    if not path.is_file():
        raise AdapterNotFoundError(f"there is no file {str(path)!r}")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        prefix = first + file.read(header_size(first, size, limits) - len(first))
    return parse_header(prefix, size, limits)
