"""The kinds of tensors in an adapter's file: how PEFT names each, and which engines apply it.

The list is `KINDS`. A further kind takes a row here, its check in `planning.pairing`, and one
function of `engines.batch`; elsewhere it is bytes of a layer group.
Source: peft 0.21.2, `utils/save_and_load.py` and `tuners/lora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class TensorRole(Enum):
    """The role of a tensor in a module's adapter.

    A `[rank, in]` and B `[out, rank]` are the factors of `scale * B @ A`. The vectors are `[out]`:
    BIAS (lora_bias) is added to B's output, MAGNITUDE is DoRA's. BASE_COPY is the weight of the
    base itself. WEIGHT and OWN_BIAS (modules_to_save) take the place of the base's own, and TOKENS
    `[n, out]` (trainable_token_indices) of n rows of an embedding, and of a head tied to it.

    PARAMETER_A `[rank * E, in]` and PARAMETER_B `[out, rank * E]` (target_parameters) are factors
    of a bare parameter, with E experts: A has all ranks of the first expert first, B all experts of
    the first rank. EXPERTS_B `[E, n, out, rank]` has n blocks for n parts of the rank, each of
    which a file of transformers 4 has as a module of its own.
    """

    A = "A"
    B = "B"
    BIAS = "bias"
    MAGNITUDE = "magnitude"
    BASE_COPY = "copy of the base's weight"
    WEIGHT = "weight"
    OWN_BIAS = "own bias"
    TOKENS = "trained tokens"
    PARAMETER_A = "A of a parameter"
    PARAMETER_B = "B of a parameter"
    EXPERTS_B = "B of each expert"


@dataclass(frozen=True, slots=True)
class TensorKind:
    """One kind of tensor.

    Attributes
    ----------
    suffix
        The end of its name, after the module's path.
    embedding
        Whether the module is an embedding; None if the name does not tell.
    engines
        What applies it, of `lorax_kernels.apply` ("kernels"), `engines.transformers.attach`
        ("attach"), vLLM, SGLang, and LoRAX under the names of `lorax_async.adapters`. For the
        others, it is refused by name.
    """

    role: TensorRole
    suffix: str
    embedding: bool | None
    engines: frozenset[str]


ATTACH = frozenset({"attach"})
EVERY = frozenset({"kernels", "attach", "vLLM", "SGLang", "LoRAX"})

KINDS = (
    TensorKind(TensorRole.A, "lora_A.weight", False, EVERY),
    TensorKind(TensorRole.B, "lora_B.weight", False, EVERY),
    TensorKind(TensorRole.BIAS, "lora_B.bias", False, ATTACH),
    TensorKind(TensorRole.A, "lora_embedding_A", True, EVERY - {"kernels", "LoRAX"}),
    TensorKind(TensorRole.B, "lora_embedding_B", True, EVERY - {"kernels", "LoRAX"}),
    # A parameter of a module that others are targeted of too; one alone is named like a module.
    TensorKind(TensorRole.PARAMETER_A, "base_layer.lora_A.weight", False, ATTACH),
    TensorKind(TensorRole.PARAMETER_B, "base_layer.lora_B.weight", False, ATTACH),
    TensorKind(TensorRole.MAGNITUDE, "lora_magnitude_vector", None, ATTACH),
    # Compared with the base, and then nothing to apply.
    TensorKind(TensorRole.BASE_COPY, "base_layer.weight", None, EVERY - {"LoRAX"}),
    TensorKind(TensorRole.TOKENS, "token_adapter.trainable_tokens_delta", None, ATTACH),
    # After the suffixes above: any other name that ends so is that of a whole module.
    TensorKind(TensorRole.WEIGHT, "weight", None, ATTACH),
    TensorKind(TensorRole.OWN_BIAS, "bias", None, ATTACH),
)
"""All kinds. The suffixes differ."""

SUFFIXES: Mapping[str, TensorKind] = {kind.suffix: kind for kind in KINDS}

WHOLE = frozenset({TensorRole.WEIGHT, TensorRole.OWN_BIAS})
"""The roles of tensors that take the place of a module's own."""

PARAMETERS = frozenset({TensorRole.PARAMETER_A, TensorRole.PARAMETER_B, TensorRole.EXPERTS_B})
"""The roles of tensors that change a bare parameter, as in fused experts."""

FEATURES: Mapping[TensorRole, str] = {
    TensorRole.A: "LoRA",
    TensorRole.B: "LoRA",
    TensorRole.BIAS: "lora_bias",
    TensorRole.MAGNITUDE: "DoRA",
    TensorRole.BASE_COPY: "save_embedding_layers, a copy of the base's weight",
    TensorRole.WEIGHT: "modules_to_save, a whole module",
    TensorRole.OWN_BIAS: "modules_to_save, a whole module",
    TensorRole.TOKENS: "trainable_token_indices",
    **dict.fromkeys(PARAMETERS, "target_parameters, as in fused experts"),
}
"""What errors call the features that write these tensors."""
