"""Several adapters as one: the recipe, and the key of what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import UnionType
from typing import Literal, cast, get_args

from lorax_async.errors import LoraxError, UsageError, shorten_repr
from lorax_async.identity import AdapterKey, AdapterRef, PartId, as_part

MAX_FACTOR = 3.4028234663852886e38
"""The largest float32: what adapters are scaled and weighted by."""

MAX_PARTS = 64
"""All are open at once; and a request may bring the list."""

Strategy = Literal["linear", "ties", "dare_linear", "dare_ties"]
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Merge:
    """Several adapters as one: an id like any other, equal and hashed by value.

    Parameters
    ----------
    strategy
        "linear" (the exact weighted sum of the deltas, of any ranks), or "ties", "dare_linear",
        "dare_ties" (A and B by themselves, of equal ranks), as PEFT's `add_weighted_adapter` has
        them; its exact one is called "cat" there.
    refs, weights
        The adapters, and a finite factor for each; two adapters at least, one for "linear".
    density
        The fraction of the weights that is kept, above 0 and up to 1. Not for "linear".
    majority_sign
        Which sign wins where signs are elected ("ties", "dare_ties"): that of the "total", or the
        more frequent one.
    seed
        Of what is dropped at random ("dare_linear", "dare_ties").

    Raises
    ------
    UsageError
        There is no such merge, or a setting would have no effect.
    """

    strategy: Strategy
    refs: Sequence[PartId]
    weights: Sequence[float]
    density: float | None = None
    majority_sign: MajoritySign = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "refs", _parts(self.refs))
        object.__setattr__(self, "weights", _weights(self.weights, len(self.refs)))
        self._check_strategy()
        if not (_is_number(self.seed, int) and 0 <= self.seed < 1 << 63):
            raise UsageError(
                f"a seed is a whole number from 0 to 2**63 - 1, not {shorten_repr(self.seed)}"
            )
        if self.seed and not self.drops:
            raise UsageError(f"{self.strategy!r} draws nothing at random; leave the seed out")

    def _check_strategy(self) -> None:
        _require_one_of("strategy", self.strategy, get_args(Strategy))
        _require_one_of("majority_sign", self.majority_sign, get_args(MajoritySign))
        if self.majority_sign != "total" and not self.elects:
            raise UsageError(f"{self.strategy!r} elects no sign; leave majority_sign out")
        if self.strategy == "linear":
            if self.density is not None:
                raise UsageError("'linear' keeps every weight; leave the density out")
            return
        if not (_is_number(self.density, int | float) and 0 < cast(float, self.density) <= 1):
            raise UsageError(
                f"{self.strategy!r} needs a density above 0 and up to 1, not"
                f" {shorten_repr(self.density)}"
            )
        object.__setattr__(self, "density", float(cast(float, self.density)))
        if len(self.refs) < 2:
            raise UsageError(f"{self.strategy!r} merges two adapters or more; one is for 'linear'")

    @property
    def parts(self) -> tuple[AdapterRef | AdapterKey, ...]:
        """`refs`, as they are kept."""
        return cast("tuple[AdapterRef | AdapterKey, ...]", self.refs)

    @property
    def drops(self) -> bool:
        """Whether weights are dropped at random, and the others made larger for it."""
        return self.strategy in {"dare_linear", "dare_ties"}

    @property
    def elects(self) -> bool:
        """Whether, weight by weight, only those of the majority's sign count."""
        return self.strategy in {"ties", "dare_ties"}

    @property
    def text(self) -> str:
        words = [f"{w!r} * {_text(part)}" for w, part in zip(self.weights, self.parts, strict=True)]
        words += [f"density={self.density!r}"] if self.density is not None else []
        words += [f"majority_sign={self.majority_sign}"] if self.elects else []
        words += [f"seed={self.seed}"] if self.drops else []
        return f"{self.strategy}({', '.join(words)})"


@dataclass(frozen=True, slots=True)
class MergedKey(AdapterKey):
    """What a `Merge` is: the recipe over the keys of its parts. `files` are those of all parts."""

    merge: Merge

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, merge: Merge, parts: Sequence[AdapterKey]) -> MergedKey:
        """Equal for recipes that came to the same versions of the same adapters."""
        resolved = replace(merge, refs=tuple(parts))
        return cls(resolved.text, tuple(file for part in parts for file in part.files), resolved)


def _text(part: AdapterRef | AdapterKey) -> str:
    return part.text if isinstance(part, AdapterRef) else str(part)


def _parts(refs: object) -> tuple[AdapterRef | AdapterKey, ...]:
    if not isinstance(refs, list | tuple) or not refs:
        raise UsageError(f"refs is a list of one adapter or more, not {refs!r}")
    if len(refs) > MAX_PARTS:
        raise UsageError(f"a merge has {MAX_PARTS} parts at most, not {len(refs):,}")
    parts: list[AdapterRef | AdapterKey] = []
    for n, ref in enumerate(refs):
        if isinstance(ref, Merge | MergedKey):
            raise UsageError(f"refs[{n}] is a merge itself; name the adapters that somebody saved")
        try:
            parts.append(as_part(ref))
        except LoraxError as error:
            raise error.prefixed(f"refs[{n}]: ") from None
    return tuple(parts)


def _weights(weights: object, count: int) -> tuple[float, ...]:
    if not isinstance(weights, list | tuple) or len(weights) != count:
        raise UsageError(f"weights is a list of one number for each of {count} refs")
    for n, weight in enumerate(weights):
        if not (_is_number(weight, int | float) and abs(weight) <= MAX_FACTOR):
            raise UsageError(
                f"weights[{n}] is a finite number that float32 holds, not {shorten_repr(weight)}"
            )
    return tuple(map(float, weights))


def _is_number(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require_one_of(name: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UsageError(f"{name} is one of {', '.join(names)}, not {value!r}")
