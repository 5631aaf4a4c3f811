"""The words for an adapter: what a caller asks for, which bytes that is, what its config says."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

from lorax_async.errors import UsageError
from lorax_async.identity import AdapterKey, AdapterRef, FileIdentity, PartId, RemoteKey, TensorsKey
from lorax_async.ids.parsing import origin_of, parse_adapter_id
from lorax_async.merge import Merge, MergedKey

__all__ = [
    "AdapterId",
    "AdapterKey",
    "AdapterRef",
    "AdapterSpec",
    "FileIdentity",
    "Matcher",
    "Merge",
    "MergedKey",
    "ModulePattern",
    "Ref",
    "RemoteKey",
    "TensorsKey",
    "as_ref",
    "is_stale",
    "origins_of",
    "parse_adapter_id",
    "text_of",
]

AdapterId = PartId | Merge
"""Whatever names an adapter in a call."""

Ref = AdapterRef | AdapterKey | Merge
"""An `AdapterId` as it is kept."""


def as_ref(
    adapter_id: object,
    source: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    digest: str | None = None,
    *,
    allow_stale: bool = False,
) -> Ref:
    """What a call's arguments ask for. Raises `UsageError` if they contradict each other."""
    if isinstance(adapter_id, Ref):
        if allow_stale or any(given is not None for given in (source, revision, token, digest)):
            raise UsageError(
                "an AdapterRef, a key or a Merge says source, revision, token, digest and"
                " allow_stale itself"
            )
        return adapter_id
    return AdapterRef(
        adapter_id,  # type: ignore[arg-type]  # it checks
        *(source, revision, token, digest),
        allow_stale=allow_stale,
    )


def text_of(ref: Ref) -> str:
    return str(ref) if isinstance(ref, AdapterKey) else ref.text


def is_stale(key: AdapterKey) -> bool:
    """Whether a source could not be asked, and last named this version, of it or of a part."""
    if isinstance(key, MergedKey):
        return any(isinstance(part, AdapterKey) and is_stale(part) for part in key.merge.parts)
    return isinstance(key, RemoteKey) and key.stale


def origins_of(ref: Ref) -> frozenset[str]:
    """Return the origins (`origin_of`) of an adapter or a merge's parts; local ones have none."""
    if isinstance(ref, Merge | MergedKey):
        parts = ref.parts if isinstance(ref, Merge) else ref.merge.parts
        return frozenset[str]().union(*map(origins_of, parts))
    if isinstance(ref, RemoteKey):
        ref = AdapterRef(ref.location)
    origin = origin_of(ref) if isinstance(ref, AdapterRef) else ""
    return frozenset({origin} - {""})


class Matcher(Protocol):
    """A compiled pattern of an adapter's config, which describes a module path or not."""

    def __call__(self, module: str, /) -> bool: ...


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """One entry of rank_pattern or alpha_pattern: the first whose matcher accepts a module wins.

    `cost` is that of matching one character of a path, in steps of the matcher.
    """

    text: str
    matches: Matcher = field(repr=False, compare=False)
    value: float
    cost: int = field(default=1, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What `adapter_config.json` says that matters for applying the adapter; data only.

    Attributes
    ----------
    rank, alpha
        The config's `r` and `lora_alpha`, before the patterns.
    rslora
        Scale by alpha / sqrt(rank) instead of alpha / rank.
    rank_patterns, alpha_patterns
        Exceptions by module, in the order of the file.
    targets
        `target_modules` as written (a tuple of names, one regular expression, or None); for people.
    layers
        `layers_to_transform`: the layers that names in `targets` are limited to; () is all.
    base_model
        `base_model_name_or_path`: a label, which may be absent.
    fan_in_fan_out
        The author's word on how the base stores its weights; judged against the layout.
    dora
        Every module has a magnitude, which its weight's rows are scaled to.
    lora_bias
        Every module has a bias beside B. Never with `dora`.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_patterns: tuple[ModulePattern, ...] = ()
    alpha_patterns: tuple[ModulePattern, ...] = ()
    targets: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] = ()
    base_model: str | None = None
    fan_in_fan_out: bool = False
    dora: bool = False
    lora_bias: bool = False

    def rank_of(self, module: str) -> int:
        return int(_first(self.rank_patterns, module, self.rank))

    def alpha_of(self, module: str) -> float:
        return _first(self.alpha_patterns, module, self.alpha)

    def scale_of(self, module: str, rank: int | None = None) -> float:
        """The factor PEFT multiplies the module's delta with (peft LoraLayer.update_layer).

        `rank` is that of the module where the caller knows it already.
        """
        rank = self.rank_of(module) if rank is None else rank
        return self.alpha_of(module) / (sqrt(rank) if self.rslora else rank)


def _first(patterns: tuple[ModulePattern, ...], module: str, default: float) -> float:
    return next((entry.value for entry in patterns if entry.matches(module)), default)
