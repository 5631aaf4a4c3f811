"""`TransformersDecoder`: a Hugging Face decoder with adapters attached, computed in batches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from lorax_async.engines.transformers import AttachedModel
from lorax_async.errors import ConfigError, LoraxError, UsageError
from lorax_async.server.engine import DecoderStep, SequencePart, StepResult
from lorax_async.types import require_count

BLOCK = 64
"""Tokens by which places grow."""


class KVCache:
    """Assign places to sequences.

    Memory is `[places, heads, tokens, head_dim]` per layer, twice: as many places as there were
    sequences at a time, as long as the longest of them, rounded up to `BLOCK` tokens.
    """

    def __init__(self, layers: int, max_sequences: int, device: torch.device) -> None:
        self._layers = [PlacesLayer() for _ in range(layers)]
        self.cache: Any = Cache(layers=list(self._layers))  # untyped in transformers
        """What the model takes as its cache, between `begin` and the end of the pass."""
        self._max_sequences = max_sequences
        self._device = device
        self._places: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._last: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._places)

    def begin(self, sequences: Sequence[int], starts: Sequence[int], tokens: int) -> PassRows:
        """Prepare a pass over `tokens` tokens of each sequence, from these positions on.

        Raise `UsageError`, and change nothing, for more sequences than places, or a start that is
        not the sequence's length.
        """
        self._check(sequences, starts)
        for sequence, start in zip(sequences, starts, strict=True):
            if start == 0:
                self.forget(sequence)
                taken = set(self._places.values())
                free = (place for place in range(self._max_sequences) if place not in taken)
                self._places[sequence] = next(free)
            self._lengths[sequence] = start + tokens
        places = self._gather(sequences)
        rows = PassRows(places, starts, tokens, self._device)
        for layer in self._layers:
            layer.begin(rows, max(self._places.values()) + 1)
        return rows

    def forget(self, sequence: int) -> None:
        """Free a sequence's place. Idempotent."""
        place = self._places.pop(sequence, None)
        if place is not None:
            length = self._lengths.pop(sequence)
            for layer in self._layers:
                layer.clear(place, length)

    def _check(self, sequences: Sequence[int], starts: Sequence[int]) -> None:
        for sequence, start in zip(sequences, starts, strict=True):
            if start and self._lengths.get(sequence) != start:
                raise UsageError(
                    f"sequence {sequence} goes on at {start}, and has"
                    f" {self._lengths.get(sequence, 0)} tokens; start it over"
                )
        count = len(self._places.keys() | set(sequences))
        if count > self._max_sequences:
            raise UsageError(
                f"{count} sequences have keys and values, and max_sequences is"
                f" {self._max_sequences}; give the scheduler that number as max_begun"
            )

    def _gather(self, sequences: Sequence[int]) -> list[int]:
        """Return the places of the rows; if they come twice in a row, make these consecutive.

        Later passes over them copy nothing.
        """
        places = [self._places[sequence] for sequence in sequences]
        repeated, self._last = tuple(sequences) == self._last, tuple(sequences)
        if not repeated or _consecutive(places):
            return places
        ordered = list(dict.fromkeys([*sequences, *self._places]))
        before = [self._places[sequence] for sequence in ordered]
        for layer in self._layers:
            layer.move(before)
        self._places = {sequence: place for place, sequence in enumerate(ordered)}
        return list(range(len(sequences)))


class PlacesLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The keys and values of one layer, each `[places, heads, tokens, head_dim]`.

    Masked values are multiplied by 0, which NaN survives: unused tokens must be 0.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows: PassRows | None = None
        self._size = 0, 0

    def begin(self, rows: PassRows, places: int) -> None:
        """Grow for the rows of a pass over this many places."""
        self._rows = rows
        size = (max(self._size[0], places), max(self._size[1], -(-rows.length // BLOCK) * BLOCK))
        if size == self._size:
            return
        self._size = size
        if self.is_initialized:
            self.keys, self.values = (self._grow(store) for store in self._stores())

    def _grow(self, store: torch.Tensor) -> torch.Tensor:
        """Return a copy of a store in this layer's size."""
        places, heads, tokens, dim = store.shape
        larger = store.new_zeros(self._size[0], heads, self._size[1], dim)
        larger[:places, :, :tokens] = store
        return larger

    def clear(self, place: int, length: int) -> None:
        for store in self._stores():
            store[place, :, :length] = 0

    def move(self, places: Sequence[int]) -> None:
        """Move `places[n]` to place n, and clear the others."""
        for store in self._stores():
            index = torch.tensor(places, device=store.device)
            store[: len(places)] = store.index_select(0, index)
            store[len(places) :] = 0

    def _stores(self) -> list[torch.Tensor]:
        return [store for store in (self.keys, self.values) if store is not None]

    # -- for the model -----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            self._grow(like[:0, :, :0]) for like in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens `[rows, heads, tokens, head_dim]`; return all that the rows have."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._rows is not None
        keys, values = self._stores()
        return self._rows.store(keys, key_states), self._rows.store(values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self._rows is None else self._rows.length - self._rows.tokens

    def get_max_length(self) -> int:
        return -1


class PassRows:
    """The rows of one forward pass."""

    def __init__(
        self, places: Sequence[int], starts: Sequence[int], tokens: int, device: torch.device
    ) -> None:
        self.tokens = tokens
        """New tokens of each row."""
        self.length = max(starts) + tokens
        """Tokens of the longest row, new ones included."""
        self._places = torch.tensor(places, device=device)
        self._starts = torch.tensor(starts, device=device)
        self._ranges = list(zip(places, starts, strict=True))
        self._slice = slice(places[0], places[0] + len(places)) if _consecutive(places) else None
        self._same_length = len(set(starts)) == 1
        starts_column = self._starts.unsqueeze(1)
        self.positions = starts_column + torch.arange(tokens, device=device)
        """Of the new tokens, `[rows, tokens]`."""
        self.mask: torch.Tensor | None = None
        """Which of `length` tokens each row has, `[rows, length]`; None if all."""
        if not self._same_length:
            self.mask = torch.arange(self.length, device=device) < starts_column + tokens

    def store(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Write `new` `[rows, heads, tokens, head_dim]` into a layer's store `[places, heads, …]`.

        Return what the rows have there, `[rows, heads, length, head_dim]`.
        """
        if self._slice is not None and self._same_length:
            store[self._slice, :, self.length - self.tokens : self.length] = new
        elif self.tokens == 1:
            store[self._places, :, self._starts] = new[:, :, 0]
        else:
            for (place, start), row in zip(self._ranges, new, strict=True):
                store[place, :, start : start + self.tokens] = row
        if self.length == self.tokens:
            return new
        if self._slice is not None:
            return store[self._slice, :, : self.length]
        return store[:, :, : self.length].index_select(0, self._places)


def _consecutive(places: Sequence[int]) -> bool:
    return list(places) == list(range(places[0], places[0] + len(places)))


class TransformersDecoder:
    """Compute steps with a transformers model, and keep its KV cache.

    Rows with the same number of tokens share a forward pass: all rows that decode, and prompts of
    the same length. No row is padded, so that each is what it would be alone.

    `model` is an `AutoModelForCausalLM` in `eval` mode, whose layers all attend to all earlier
    tokens, and `attached` what `engines.transformers.attach` returned for it. `max_sequences` is
    the scheduler's `max_begun`; `max_length` limits the tokens of a sequence, by default to the
    model's positions.

    The cache takes up to `max_sequences * max_length` tokens, each of two vectors of
    `num_key_value_heads * head_dim` numbers per layer. It grows as needed and does not shrink.

    Raise `ConfigError` for a model that it cannot compute, or a number out of range.
    """

    def __init__(
        self, model: Any, attached: AttachedModel, max_sequences: int, max_length: int | None = None
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        positions: int = config.max_position_embeddings
        self.max_length = positions if max_length is None else max_length
        self.vocabulary: int = config.vocab_size
        require_count("max_sequences", max_sequences, least=1)
        require_count("max_length", self.max_length, least=1)
        if self.max_length > positions:
            raise ConfigError(
                f"max_length is {self.max_length}, and the model has {positions} positions"
            )
        self._model = model
        self._attached = attached
        self._cache_argument = cache_argument(model)
        self._cache = KVCache(_count_layers(model, config), max_sequences, model.device)

    @property
    def sequences(self) -> int:
        """The number of sequences in the KV cache."""
        return len(self._cache)

    @torch.inference_mode()
    def compute(self, step: DecoderStep) -> StepResult:
        """Implement `Decoder`. Raise `UsageError` for a part that does not follow the cache."""
        several_adapters = len({part.handle for part in step.parts}) > 1
        budget, out = step.budget, dict[int, LoraxError]()
        logits: torch.Tensor | None = None
        for numbers in _passes(step.parts):
            parts = [step.parts[number] for number in numbers]
            handles = [part.handle for part in parts]
            with self._attached.batch(
                handles, budget, step.others_wait, beside=several_adapters
            ) as gate:
                pass_logits = self._forward(parts)
            budget = max(0.0, gate.left)
            out.update({numbers[row]: error for row, error in gate.out.items()})
            logits = _put_rows(logits, numbers, pass_logits, len(step.parts))
        assert logits is not None
        for number in out:
            self.forget(step.parts[number].sequence)
        return StepResult(logits, out)

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
            attention_mask=rows.mask,
            position_ids=rows.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._cache.cache},
        ).logits
        return logits[:, -1].float()


def _put_rows(
    logits: torch.Tensor | None, numbers: list[int], rows: torch.Tensor, count: int
) -> torch.Tensor:
    """Put the logits of a pass into those of `count` parts, which are as wide as the widest.

    -inf is where a part's vocabulary has no token.
    """
    width = rows.shape[1]
    if logits is None:
        logits = rows.new_full((count, width), -torch.inf)
    elif logits.shape[1] < width:
        logits = torch.nn.functional.pad(logits, (0, width - logits.shape[1]), value=-torch.inf)
    logits[numbers, :width] = rows
    return logits


def cache_argument(model: Any) -> str:
    """Return the argument of `model` that takes a cache: transformers 5.25 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _passes(parts: Sequence[SequencePart]) -> list[list[int]]:
    """Group the numbers of parts by forward pass; passes that may wait for adapters come last."""
    groups = dict[tuple[int, int, int | None], list[int]]()
    for number, part in enumerate(parts):
        tokens = len(part.tokens)
        # A model that caps its logits takes one vocabulary per pass.
        vocabulary = None if part.handle is None else part.handle.vocabulary
        pass_key = tokens, part.start if tokens > 1 else 0, vocabulary
        groups.setdefault(pass_key, []).append(number)

    def may_wait(numbers: list[int]) -> bool:
        handles = (parts[number].handle for number in numbers)
        return any(handle is not None and not handle.resident for handle in handles)

    return sorted(groups.values(), key=may_wait)


def _count_layers(model: Any, config: Any) -> int:
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
            f"the model's config asks for {', '.join(sorted(others))}; only models whose layers all"
            " attend to all earlier tokens are served"
        )
    changing = _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}
    if changing:
        raise ConfigError(
            f"the model's rope_type is {', '.join(sorted(changing))}: its positions depend on the"
            " longest row, so rows cannot be computed together"
        )
    return len(layers)


def _rope_types(parameters: object) -> set[str]:
    """Return the rope types of all layers; parameters may be nested by layer type."""
    if not isinstance(parameters, Mapping):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    return {str(parameters.get("rope_type"))}.union(*nested)
