"""What a caller asks for, which bytes that is, what a config says of it, how far it was checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from types import UnionType
from typing import Literal, Protocol, cast, get_args

from lorax_async.errors import InvalidAdapterIdError, LoraxError, UsageError, shorten_repr

MAX_ID_BYTES = 4096

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LOCAL = re.compile(r"/|\.\.?/|file:", re.IGNORECASE)
_URL = re.compile(r"\A\s*[A-Za-z][A-Za-z0-9+.-]*:/|://")
_USER = re.compile(r"(?:\A\s*[A-Za-z][A-Za-z0-9+.-]*:/|://)/*[^/?#]*@")
_PLACES = frozenset({"s3", "gs", "az", "http", "https"})
"""Sources whose ids are URLs, of which the beginning may be left out."""


def checked(text: str, encode: Callable[[str], bytes]) -> str:
    try:
        encoded = encode(text)
    except UnicodeEncodeError:
        raise InvalidAdapterIdError("the id is not valid Unicode text") from None
    if len(encoded) > MAX_ID_BYTES:
        raise InvalidAdapterIdError(f"the id is longer than {MAX_ID_BYTES} bytes")
    if not encoded or b"\0" in encoded:
        raise InvalidAdapterIdError("the id is empty or holds a NUL character")
    return text


def readable(text: str) -> str:
    if _CONTROL.search(text):
        raise InvalidAdapterIdError("the id holds a control character")
    return text


def refuse_secrets(text: str, source: str | None) -> None:
    """Refuse a URL with a user name, a password, a query or a fragment, without repeating it.

    An id stands in errors, events and logs; so no value that holds one may come about.
    """
    if source == "local" or (source is None and _LOCAL.match(text)):
        return
    if source in _PLACES and "://" not in text:
        text = f"{source}://{text}"
    url = _URL.search(text)
    if url is None:
        return
    if _USER.search(text):
        raise InvalidAdapterIdError(
            "a URL in an id has no user name and no password; give a token by token="
        )
    if "?" in text[url.end() :] or "#" in text[url.end() :]:
        raise InvalidAdapterIdError(
            "a URL in an id has no '?' and no '#': signatures and keys must not stand in ids"
        )


_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a caller asks for: an id with where to look, which revision, on whose authority.

    Attributes
    ----------
    source
        "hub", "s3", "gs", "az", "http", "https" or "local", where the id does not say it; None is
        the hub for `org/name` (docs/sources.md has all forms).
    revision
        A branch, tag or commit of the hub; a versionId or ETag elsewhere. None is the present one.
    token
        What the source is asked with; never shown.
    use_token
        Ask the hub with this machine's own token (`HF_TOKEN`, `hf auth login`). For ids that the
        program itself names, never for an id out of a request.
    digest
        What the weights come to, as sha256 in hexadecimal, for who knows it: all else is refused.
    allow_stale
        Where the source cannot be asked, take the version that it last named.

    Raises
    ------
    InvalidAdapterIdError
        The id is neither text nor path, or a URL with a user name, password, query or fragment.
    UsageError
        An argument has the wrong type, or `token` and `use_token` are both given.
    """

    id: str | Path
    source: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    digest: str | None = None
    allow_stale: bool = False
    use_token: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        given: object = self.id
        if not isinstance(given, str | Path):
            kind = type(given).__name__
            raise InvalidAdapterIdError(f"an adapter id is a str or a pathlib.Path, not {kind}")
        for name in ("source", "revision", "token", "digest"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} of an adapter is a str or None")
        if isinstance(self.id, str):
            refuse_secrets(self.id, self.source)
        if self.digest is not None and not _SHA256.fullmatch(self.digest):
            raise UsageError(f"digest {self.digest!r} is no sha256 in 64 lower-case hex digits")
        for name in ("allow_stale", "use_token"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.use_token and self.token is not None:
            raise UsageError("token and use_token contradict each other; give one of them")

    @property
    def text(self) -> str:
        return str(self.id)

    @property
    def name(self) -> AdapterRef:
        """What it means, whatever its caller knows of the bytes and whether old ones will do."""
        plain = self.digest is None and not self.allow_stale
        return self if plain else replace(self, digest=None, allow_stale=False)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Tells two versions of a local file apart without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One version of one adapter's files. Equal keys are the same bytes, and are loaded once.

    A loader has one layout, shard and dtype, so that within it a key also names one slot's content.
    """

    location: str
    files: tuple[FileIdentity, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Kept, for keys are looked up several times per copy; over all, for versions of one
        # location lie in the same dictionaries.
        object.__setattr__(self, "_hash", hash((self.location, self.files)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True, slots=True)
class TensorsKey(AdapterKey):
    """An adapter that was given as tensors: the location tells config, names and bytes by digest.

    So equal content is one adapter, whatever it is called.
    """

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, digest: str) -> TensorsKey:
        """Of a SHA-256 in hexadecimal."""
        return cls(f"tensors:sha256:{digest}", ())

    @property
    def digest(self) -> str:
        """That SHA-256."""
        return self.location.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class RemoteKey(AdapterKey):
    """One version of an adapter that lies elsewhere; the location is its id without a revision.

    `version` is the hub's commit, or what versionIds or strong ETags of its files come to. It is
    `stale` where the source could not be asked, and last named this one.
    """

    version: str = ""
    stale: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.location, self.version)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.location}@{self.version}"


PartId = str | Path | AdapterRef | AdapterKey
"""Whatever names one adapter that somebody saved."""


def as_part(adapter_id: object) -> AdapterRef | AdapterKey:
    """Raises `UsageError` for what is none."""
    if isinstance(adapter_id, AdapterRef | AdapterKey):
        return adapter_id
    return AdapterRef(adapter_id)  # type: ignore[arg-type]  # it checks


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


VerificationKind = Literal["sha256", "git-sha1", "transport", "none"]
"""Whose word: the source's (or the caller's) sha256, git's name of the content, nobody's but of the
transport (lengths and validators: the digest is our own, and checked from then on), or none."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of checking an adapter's weights.

    `digest`, in lower-case hexadecimal, is what they come to; None where they were not hashed. Of
    weights in several files it is the sha256 of the lines "digest  file name", as `sha256sum` has
    them, in the order of the names.
    """

    kind: VerificationKind
    digest: str | None = None

    @property
    def vouched(self) -> bool:
        """Whether the bytes have the digest that the source or the caller promised.

        If not, nobody vouched for them: a source that changes a file without another ETag, size or
        date is not noticed.
        """
        return self.kind in {"sha256", "git-sha1"}


UNCHECKED = Verification("none")

_BY_STRENGTH: tuple[VerificationKind, ...] = ("none", "transport", "git-sha1", "sha256")


def weakest(several: Iterable[Verification]) -> Verification:
    """What is true of all of them together; no digest, for they are several files."""
    kinds = [each.kind for each in several]
    return Verification(min(kinds, key=_BY_STRENGTH.index))


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
