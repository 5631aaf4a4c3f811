"""`TransformersDecoder`: a Hugging Face decoder with adapters attached, computed in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from lorax_async.engines.transformers import Attached
from lorax_async.errors import ConfigError, LoraxError
from lorax_async.server.generation import Computed, SequencePart, Step
from lorax_async.server.kv_cache import KVCache
from lorax_async.settings.requirements import require_count


class TransformersDecoder:
    """Compute steps with a transformers model, and keep its KV cache.

    Rows with the same number of tokens share a forward pass: all rows that decode, and prompts of
    the same length. No row is padded, so that each is what it would be alone.

    Parameters
    ----------
    model
        An `AutoModelForCausalLM` in `eval` mode, whose layers all attend to all earlier tokens.
    attached
        What `engines.transformers.attach` returned for it.
    max_sequences
        Sequences to keep at a time: the scheduler's `max_begun`.
    max_length
        Tokens of a sequence; None is as many as the model has positions for.

    The cache takes up to `max_sequences * max_length` tokens, each of two vectors of
    `num_key_value_heads * head_dim` numbers per layer. It grows as needed and does not shrink.

    Raise `ConfigError` for a model that it cannot compute, or a number out of range.
    """

    def __init__(
        self, model: Any, attached: Attached, max_sequences: int, max_length: int | None = None
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        positions = config.max_position_embeddings
        self._max_length = positions if max_length is None else max_length
        require_count("max_sequences", max_sequences, least=1)
        require_count("max_length", self._max_length, least=1)
        if self._max_length > positions:
            raise ConfigError(
                f"max_length is {self._max_length}, and the model knows {positions} positions"
            )
        self._vocabulary: int = config.vocab_size
        self._model = model
        self._attached = attached
        self._cache = KVCache(_layers_of(model, config), max_sequences, model.device)

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    @property
    def sequences(self) -> int:
        """The number of sequences in the KV cache."""
        return len(self._cache)

    @torch.inference_mode()
    def compute(self, step: Step) -> Computed:
        """Implement `Decoder`. Raise `UsageError` for a part that does not follow the cache."""
        several = len({part.handle for part in step.parts}) > 1
        left, out = step.budget, dict[int, LoraxError]()
        logits: torch.Tensor | None = None
        for numbers in _passes(step.parts):
            parts = [step.parts[number] for number in numbers]
            handles = [part.handle for part in parts]
            with self._attached.batch(handles, left, step.others_wait, beside=several) as gate:
                found = self._forward(parts)
            left = max(0.0, gate.left)
            out.update({numbers[row]: error for row, error in gate.out.items()})
            if logits is None:
                logits = found.new_empty(len(step.parts), found.shape[1])
            logits[numbers] = found
        assert logits is not None
        for number in out:
            self.forget(step.parts[number].sequence)
        return Computed(logits, out)

    def forget(self, sequence: int) -> None:
        with torch.inference_mode():
            self._cache.forget(sequence)

    def _forward(self, parts: Sequence[SequencePart]) -> torch.Tensor:
        """Return the logits after each part, float32 `[parts, vocabulary]`."""
        ids = torch.tensor([list(part.tokens) for part in parts], device=self._model.device)
        sequences, starts = [part.sequence for part in parts], [part.start for part in parts]
        rows = self._cache.begin(sequences, starts, ids.shape[1])
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=rows.mask(),
            position_ids=rows.positions(),
            past_key_values=self._cache.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].float()


def _passes(parts: Sequence[SequencePart]) -> list[list[int]]:
    """Group the numbers of parts by forward pass; passes that may wait for adapters come last."""
    groups = dict[tuple[int, int], list[int]]()
    for number, part in enumerate(parts):
        tokens = len(part.tokens)
        groups.setdefault((tokens, part.start if tokens > 1 else 0), []).append(number)

    def waits(numbers: list[int]) -> bool:
        handles = (parts[number].handle for number in numbers)
        return any(handle is not None and not handle.resident for handle in handles)

    return sorted(groups.values(), key=waits)


def _layers_of(model: Any, config: Any) -> int:
    """Return the number of layers. Raise `ConfigError` if a row could depend on other rows."""
    if model.training:
        raise ConfigError("the model is in training mode; call its eval()")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError("the model has an encoder; only decoders are served")
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise ConfigError("the model's tokens attend to later ones; only decoders are served")
    layers = DynamicCache(config=config).layers
    others = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if others:
        raise ConfigError(
            f"the model's config asks for {', '.join(sorted(others))}: only models are served"
            " of which every layer attends to all tokens before"
        )
    changing = _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}
    if changing:
        raise ConfigError(
            f"the model's rope_type is {', '.join(sorted(changing))}: its positions mean other"
            " things beside a longer row, so rows cannot be computed together"
        )
    return len(layers)


def _rope_types(parameters: object) -> set[str]:
    """Return the rope types of all layers; parameters may be nested by layer type."""
    if not isinstance(parameters, Mapping):
        return set()
    nested = [_rope_types(each) for each in parameters.values()]
    return {str(parameters.get("rope_type"))}.union(*nested)
