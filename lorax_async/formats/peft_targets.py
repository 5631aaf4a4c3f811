"""Which modules a config targets.

Source: peft 0.21.2, `check_target_module_exists`, `_maybe_include_all_linear_layers` and
`_check_tied_modules` of `tuners/tuners_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from lorax_async.formats.peft_names import compile_layer_pattern, compile_whole, layer_index
from lorax_async.types import AdapterSpec, Matcher, ModuleNames

HEADS = frozenset({"lm_head", "embed_out"})
"""The last names of the modules that compute logits, in transformers."""

_TIED = frozenset({"embed_tokens", "lm_head"})
_MANY_NAMES = 20  # PEFT replaces this many names, or more, by the ends that they have in common


def is_all_linear(targets: ModuleNames) -> bool:
    """Return whether `target_modules` is the word for all linear modules but the output head."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def targeting_of(spec: AdapterSpec) -> Targeting:
    """Return the modules that a config targets, compiled once for equal fields."""
    return _compile(
        spec.targets, spec.excluded, spec.layers, spec.layer_patterns, spec.ensure_weight_tying
    )


class Targeting:
    """The modules that a config targets.

    A pattern that cannot be matched in linear time with the meaning that it has for PEFT targets
    every module, and excludes none. So does `target_modules` null, for which PEFT has a table by
    the base's type. `cost` is the number of matching steps per character of a path.
    """

    def __init__(
        self,
        targets: ModuleNames,
        excluded: ModuleNames,
        layers: tuple[int, ...],
        layer_patterns: tuple[str, ...],
        tied: bool,
    ) -> None:
        self._all_linear = is_all_linear(targets)
        self._named, cost = _compile_names(None if self._all_linear else targets)
        self._excluded, more = _compile_names(excluded)
        few = isinstance(targets, tuple) and len(targets) < _MANY_NAMES
        self._paths = frozenset(targets if few and targets is not None else ())
        self._layers = frozenset(layers)
        self._layer_of, most = _compile_layer_of(layer_patterns)
        self._ties = tied and self._names_embedding(targets)
        self.cost = cost + more + most

    def _names_embedding(self, targets: ModuleNames) -> bool:
        if isinstance(targets, tuple):
            return any(name.rpartition(".")[2] in _TIED for name in targets)
        return self._named is not None and any(map(self._named, _TIED))

    def omitted_by(self, path: str, *, embedding: bool = False) -> str | None:
        """Return the field of the config by which PEFT leaves a module out; None if it does not."""
        tied = self._ties and layer_index(path) is None
        if tied and not embedding:  # gets the adapter of the embedding
            return None
        if self._excluded is not None and self._excluded(path):
            return "exclude_modules"
        if tied:
            return None
        if self._all_linear:
            head = path.rpartition(".")[2] in HEADS
            return "target_modules" if embedding or head else None
        if self._named is not None and not self._named(path):
            return "target_modules"
        # PEFT limits names, and neither a pattern nor a whole path.
        if self._layers and self._layer_of is not None and path not in self._paths:
            return None if self._layer_of(path) in self._layers else "layers_to_transform"
        return None


_compile = lru_cache(maxsize=64)(Targeting)


def _compile_names(names: ModuleNames) -> tuple[Matcher | None, int]:
    """Return a matcher and its cost; None if there are no names, or an unreadable pattern."""
    if not names:
        return None, 0
    if isinstance(names, str):
        return compile_whole(names) or (None, 0)
    wanted = frozenset(names)
    dotted = any("." in name for name in wanted)

    def matches(path: str) -> bool:
        if path.rpartition(".")[2] in wanted:
            return True
        return dotted and not wanted.isdisjoint(_ends(path))

    return matches, 1


def _ends(path: str) -> Iterator[str]:
    """Yield the path, and each end of it that begins after a dot."""
    while path:
        yield path
        path = path.partition(".")[2]


def _compile_layer_of(patterns: Iterable[str]) -> tuple[Callable[[str], int | None] | None, int]:
    """Return a function of a path to its layer, and its cost; None for an unreadable pattern."""
    compiled = [compile_layer_pattern(text) for text in patterns]
    readable = [found for found in compiled if found is not None]
    if len(readable) < len(compiled):
        return None, 0
    if not readable:
        return _first_number, 1

    def layer_of(path: str) -> int | None:
        found = (number_of(path) for number_of, _ in readable)
        number = next((number for number in found if number is not None), "")
        return int(number) if number else None

    return layer_of, sum(cost for _, cost in readable)


def _first_number(path: str) -> int | None:
    """Return the first number that follows two components and precedes one."""
    return next((int(part) for part in path.split(".")[2:-1] if part.isdecimal()), None)
