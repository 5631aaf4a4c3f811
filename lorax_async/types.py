"""What a caller asks for, which bytes that is, what a config says of it, how far it was checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from types import UnionType
from typing import Literal, TypeAlias, cast, get_args

from lorax_async.errors import (
    ConfigError,
    InvalidAdapterIdError,
    LoraxError,
    UsageError,
    shorten_repr,
)

MAX_ID_BYTES = 4096

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LOCAL = re.compile(r"/|\.\.?/|file:", re.IGNORECASE)
_URL = re.compile(r"\A\s*[A-Za-z][A-Za-z0-9+.-]*:/|://")
_USER = re.compile(r"(?:\A\s*[A-Za-z][A-Za-z0-9+.-]*:/|://)/*[^/?#]*@")
_URL_SOURCES = frozenset({"s3", "gs", "az", "http", "https"})
"""Sources whose ids are URLs, with or without the scheme."""


def require_id_text(text: str, encode: Callable[[str], bytes]) -> str:
    """Return `text`; raise `InvalidAdapterIdError` if it is empty, too long or contains NUL."""
    try:
        encoded = encode(text)
    except UnicodeEncodeError:
        raise InvalidAdapterIdError("the id is not valid Unicode text") from None
    if len(encoded) > MAX_ID_BYTES:
        raise InvalidAdapterIdError(f"the id is longer than {MAX_ID_BYTES} bytes")
    if not encoded or b"\0" in encoded:
        raise InvalidAdapterIdError("the id is empty or holds a NUL character")
    return text


def require_printable(text: str) -> str:
    """Return `text`; raise `InvalidAdapterIdError` if it contains a control character."""
    if _CONTROL.search(text):
        raise InvalidAdapterIdError("the id holds a control character")
    return text


def refuse_secrets(text: str, source: str | None) -> None:
    """Refuse a URL with a user name, a password, a query or a fragment, without repeating it.

    Ids appear in errors, events and logs, so no `AdapterRef` may contain a secret.
    """
    if source == "local" or (source is None and _LOCAL.match(text)):
        return
    if source in _URL_SOURCES and "://" not in text:
        text = f"{source}://{text}"
    url = _URL.search(text)
    if url is None:
        return
    if _USER.search(text):
        raise InvalidAdapterIdError(
            "a URL in an id has no user name and no password; pass a token as token="
        )
    if "?" in text[url.end() :] or "#" in text[url.end() :]:
        raise InvalidAdapterIdError(
            "a URL in an id has no '?' and no '#': signatures and keys must not stand in ids"
        )


_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter id with its source, revision and credentials.

    Attributes
    ----------
    source
        "hub", "s3", "gs", "az", "http", "https" or "local", unless the id contains it. None is the
        hub for `org/name` (docs/sources.md has all forms).
    revision
        A branch, tag or commit on the hub; a versionId or ETag elsewhere. None is the current one.
    token
        The access token for the source; never shown.
    use_token
        Use this machine's own hub token (`HF_TOKEN`, `hf auth login`). Only for ids that the
        program itself names, never for an id from a request.
    digest
        The expected SHA-256 of the weights, in hexadecimal; other bytes are refused.
    allow_stale
        If the source cannot be reached, use the version that it last named.

    Raises
    ------
    InvalidAdapterIdError
        The id is neither text nor path, or a URL with a user name, password, query or fragment.
    UsageError
        An argument has the wrong type, or both `token` and `use_token` are set.
    """

    id: str | Path
    source: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    digest: str | None = None
    allow_stale: bool = False
    use_token: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        adapter_id: object = self.id
        if not isinstance(adapter_id, str | Path):
            kind = type(adapter_id).__name__
            raise InvalidAdapterIdError(f"an adapter id is a str or a pathlib.Path, not {kind}")
        for name in ("source", "revision", "token", "digest"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} of an adapter is a str or None")
        if isinstance(self.id, str):
            refuse_secrets(self.id, self.source)
        if self.digest is not None and not _SHA256.fullmatch(self.digest):
            raise UsageError(
                f"digest {shorten_repr(self.digest)} is no sha256 in 64 lower-case hex digits"
            )
        for name in ("allow_stale", "use_token"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(
                    f"{name} must be True or False, not {shorten_repr(getattr(self, name))}"
                )
        if self.use_token and self.token is not None:
            raise UsageError("token and use_token exclude each other; pass one of them")

    @property
    def text(self) -> str:
        return str(self.id)

    @property
    def name(self) -> AdapterRef:
        """The reference without `digest` and `allow_stale`, which do not change what it names."""
        plain = self.digest is None and not self.allow_stale
        return self if plain else replace(self, digest=None, allow_stale=False)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The identity of one version of a local file, by its status."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One exact version of an adapter. Equal keys mean equal bytes, which are loaded once.

    A loader has one layout, shard and dtype, so within it a key also identifies a slot's content.
    """

    location: str
    files: tuple[FileIdentity, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Cached, for keys are looked up several times per copy. All fields count, for versions of
        # one location share dictionaries.
        object.__setattr__(self, "_hash", hash((self.location, self.files)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self.location


class TensorsKey(AdapterKey):
    """The key of an adapter loaded from tensors, by the digest of config, names and bytes.

    Equal content is one adapter, under any id.
    """

    __slots__ = ()

    @classmethod
    def of(cls, digest: str) -> TensorsKey:
        """Make the key for a SHA-256 in hexadecimal."""
        return cls(f"tensors:sha256:{digest}", ())

    @property
    def digest(self) -> str:
        """The SHA-256 in hexadecimal."""
        return self.location.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class RemoteKey(AdapterKey):
    """One version of a remote adapter; `location` is its id without a revision.

    `version` is the hub's commit, or a digest of the versionIds or strong ETags of its files.
    `stale` means that the source could not be reached and last named this version; `answered_at`
    is the monotonic time since which this answer may be out of date, None if that is unknown.
    """

    version: str = ""
    stale: bool = field(default=False, compare=False)
    answered_at: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.location, self.version)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.location}@{self.version}"


PartId = str | Path | AdapterRef | AdapterKey
"""The id of one saved adapter."""


def as_part(adapter_id: object) -> AdapterRef | AdapterKey:
    """Convert a `PartId`. Raises `UsageError`."""
    if isinstance(adapter_id, AdapterRef | AdapterKey):
        return adapter_id
    return AdapterRef(adapter_id)  # type: ignore[arg-type]  # it checks


MAX_FACTOR = 3.4028234663852886e38
"""The largest float32, the type of scales and weights."""

MAX_PARTS = 64
"""The most parts of a merge: all are open at once, and a request may choose them."""

Strategy = Literal["linear", "ties", "dare_linear", "dare_ties"]
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Merge:
    """Several adapters combined into one: an adapter id, compared and hashed by value.

    Parameters
    ----------
    strategy
        "linear" (the exact weighted sum of the deltas, of any ranks; PEFT's "cat"), or "ties",
        "dare_linear", "dare_ties" (A and B separately, of equal ranks), as in PEFT's
        `add_weighted_adapter`.
    refs, weights
        The adapters, and a finite factor for each; at least two, or one for "linear".
    density
        The fraction of the weights that is kept, above 0 and up to 1. Not for "linear".
    majority_sign
        The sign that wins ("ties", "dare_ties"): that of the "total", or the more frequent one.
    seed
        The seed of the random drops ("dare_linear", "dare_ties").

    Raises
    ------
    UsageError
        An argument is invalid, or would have no effect.
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
        for name, words in (("strategy", Strategy), ("majority_sign", MajoritySign)):
            value, known = getattr(self, name), get_args(words)
            if value not in known:
                raise UsageError(f"{name} is one of {', '.join(known)}, not {shorten_repr(value)}")
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
        """`refs` in their stored form."""
        return cast("tuple[AdapterRef | AdapterKey, ...]", self.refs)

    @property
    def drops(self) -> bool:
        """Whether weights are dropped at random and the others rescaled."""
        return self.strategy in {"dare_linear", "dare_ties"}

    @property
    def elects(self) -> bool:
        """Whether only the weights with the majority's sign count."""
        return self.strategy in {"ties", "dare_ties"}

    @property
    def text(self) -> str:
        pairs = zip(self.weights, self.parts, strict=True)
        words = [f"{weight!r} * {text_of(part)}" for weight, part in pairs]
        words += [f"density={self.density!r}"] if self.density is not None else []
        words += [f"majority_sign={self.majority_sign}"] if self.elects else []
        words += [f"seed={self.seed}"] if self.drops else []
        return f"{self.strategy}({', '.join(words)})"


@dataclass(frozen=True, slots=True)
class MergedKey(AdapterKey):
    """The key of a merge: its recipe over the keys of its parts. `files` are those of all parts."""

    merge: Merge

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, merge: Merge, parts: Sequence[AdapterKey]) -> MergedKey:
        """Make the key; equal for equal recipes over equal parts."""
        resolved = replace(merge, refs=tuple(parts))
        return cls(resolved.text, tuple(file for part in parts for file in part.files), resolved)


def _parts(refs: object) -> tuple[AdapterRef | AdapterKey, ...]:
    if not isinstance(refs, list | tuple) or not refs:
        raise UsageError(f"refs is a list of one adapter or more, not {shorten_repr(refs)}")
    if len(refs) > MAX_PARTS:
        raise UsageError(f"a merge has {MAX_PARTS} parts at most, not {len(refs):,}")
    parts: list[AdapterRef | AdapterKey] = []
    for n, ref in enumerate(refs):
        if isinstance(ref, Merge | MergedKey):
            raise UsageError(f"refs[{n}] is a merge itself; name saved adapters")
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


VerificationKind = Literal["sha256", "git-sha1", "transport", "none"]
"""What the bytes were checked against: a SHA-256 of the source or caller; git's SHA-1 of the file;
only the transport's lengths and validators (the digest is computed here and checked from then on);
or nothing."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of checking an adapter's weights.

    `digest` is their SHA-256 in lower-case hexadecimal; None if they were not hashed.
    """

    kind: VerificationKind
    digest: str | None = None

    @property
    def vouched(self) -> bool:
        """Whether the bytes match a digest from the source or the caller.

        If not, a file that its source changes without a new ETag, size or date goes unnoticed.
        """
        return self.kind in {"sha256", "git-sha1"}


UNCHECKED = Verification("none")

_BY_STRENGTH: tuple[VerificationKind, ...] = ("none", "transport", "git-sha1", "sha256")


def weakest(verifications: Iterable[Verification]) -> Verification:
    """Return the weakest kind of several adapters' verifications, without a digest."""
    kinds = [verification.kind for verification in verifications]
    return Verification(min(kinds, key=_BY_STRENGTH.index))


AdapterId = PartId | Merge
"""The id of an adapter in a call."""

Ref = AdapterRef | AdapterKey | Merge
"""The stored form of an `AdapterId`."""


def as_ref(
    adapter_id: object,
    source: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    digest: str | None = None,
    *,
    allow_stale: bool = False,
) -> Ref:
    """Convert a call's arguments. Raises `UsageError` if they contradict each other."""
    if isinstance(adapter_id, Ref):
        if allow_stale or (source, revision, token, digest) != (None, None, None, None):
            raise UsageError(
                "an AdapterRef, a key or a Merge has source, revision, token, digest and"
                " allow_stale itself"
            )
        return adapter_id
    return AdapterRef(
        adapter_id,  # type: ignore[arg-type]  # it checks
        *(source, revision, token, digest),
        allow_stale=allow_stale,
    )


def as_refs(ids: object) -> list[Ref]:
    """Convert one id, or several. Raises `UsageError`."""
    if isinstance(ids, AdapterId):
        return [as_ref(ids)]
    if not isinstance(ids, Iterable):
        raise UsageError(f"ids are an adapter id, or several, not {shorten_repr(ids)}")
    return [as_ref(each) for each in ids]


def text_of(ref: Ref) -> str:
    return str(ref) if isinstance(ref, AdapterKey) else ref.text


def is_stale(key: AdapterKey) -> bool:
    """Return whether the key, or a part of a merge, is `stale` (see `RemoteKey`)."""
    if isinstance(key, MergedKey):
        return any(isinstance(part, AdapterKey) and is_stale(part) for part in key.merge.parts)
    return isinstance(key, RemoteKey) and key.stale


Matcher = Callable[[str], bool]
"""A compiled pattern of an adapter's config, matched against a module path."""


ModuleNames: TypeAlias = tuple[str, ...] | str | None
"""Paths of modules or ends of them, one regular expression, or None, as configs have them."""


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """One entry of rank_pattern or alpha_pattern; the first that matches a module counts.

    `cost` is the matcher's steps per character of a path.
    """

    text: str
    matches: Matcher = field(repr=False, compare=False)
    value: float
    cost: int = field(default=1, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The data of `adapter_config.json` that matters for applying the adapter."""

    rank: int
    """The config's `r`, before the patterns."""
    alpha: float
    """The config's `lora_alpha`, before the patterns."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    rank_patterns: tuple[ModulePattern, ...] = ()
    """Exceptions by module, in the order of the file."""
    alpha_patterns: tuple[ModulePattern, ...] = ()
    targets: ModuleNames = None
    """`target_modules` as written; `formats.peft_targets` says which modules these are."""
    excluded: ModuleNames = None
    """`exclude_modules` as written."""
    layers: tuple[int, ...] = ()
    """`layers_to_transform`: the layers to which names in `targets` are limited; () is all."""
    layer_patterns: tuple[str, ...] = ()
    """`layers_pattern`: what precedes the number of a layer in a path; () is any name."""
    ensure_weight_tying: bool = False
    """Whether a head tied to the embedding gets the embedding's adapter."""
    base_model: str | None = None
    """`base_model_name_or_path`: a label, if present."""
    fan_in_fan_out: bool = False
    """Whether the base stores transposed weights; checked against the layout."""
    dora: bool = False
    """Whether every module has a magnitude, to which its weight's rows are scaled."""
    lora_bias: bool = False
    """Whether every module has a bias of B. Never with `dora`."""

    def rank_of(self, module: str) -> int:
        return int(_first(self.rank_patterns, module, self.rank))

    def alpha_of(self, module: str) -> float:
        return _first(self.alpha_patterns, module, self.alpha)

    def scale_of(self, module: str, rank: int | None = None) -> float:
        """Return the scale of a module's delta, as PEFT's `LoraLayer.update_layer` computes it.

        `rank` is the module's, if the caller knows it already.
        """
        rank = self.rank_of(module) if rank is None else rank
        return self.alpha_of(module) / (sqrt(rank) if self.rslora else rank)


def _first(patterns: tuple[ModulePattern, ...], module: str, default: float) -> float:
    return next((entry.value for entry in patterns if entry.matches(module)), default)


MAX_SECONDS = 1e9
"""The longest wait that locks, event loops and C clocks all support."""


def require_count(name: str, value: object, *, least: int = 1) -> None:
    if not (_is_number(value, int) and cast(int, value) >= least):
        kind = "a positive integer" if least else "an integer of at least 0"
        raise ConfigError(f"{name} must be {kind}, not {shorten_repr(value)}")


def require_share(name: str, value: object) -> None:
    if not (_is_number(value, int | float) and 0 < cast(float, value) <= 1):
        raise ConfigError(f"{name} must be above 0 and at most 1, not {shorten_repr(value)}")


def require_seconds(name: str, value: object) -> None:
    if not (_is_number(value, int | float) and 0 < cast(float, value) <= MAX_SECONDS):
        raise ConfigError(
            f"{name} must be a positive number of seconds up to {MAX_SECONDS:g}, not"
            f" {shorten_repr(value)}"
        )


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {shorten_repr(value)}")


def require_one_of(name: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        raise ConfigError(f"{name} must be one of {', '.join(words)}, not {shorten_repr(value)}")
