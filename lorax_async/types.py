"""What a caller asks for, which bytes that is, what a config says of it, how far it was checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from types import UnionType
from typing import Literal, TypeAlias, TypedDict, cast

from lorax_async.errors import ConfigError, InvalidAdapterIdError, UsageError, shorten_repr

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
        If the source cannot be reached, use the version that it last named; with a `token`, only
        that of a public adapter.

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

    `location` is the same for all versions. `files` are those on this machine that a new version
    changes: ids are resolved again after `revalidate_files` seconds, and loads that fail because
    they changed are tried once more. Without `files`, what an id means is kept for good, unless
    it is a `RemoteKey`.

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

    `version` is the hub's commit, or a digest of the versionIds or strong ETags of its files. A
    local folder whose weights are converted from a pickle has one too, by its `files`.
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


MAX_FACTOR = 3.4028234663852886e38
"""The largest float32, the type of scales and weights."""


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

AdapterId = str | Path | AdapterRef | AdapterKey
"""The id of an adapter in a call."""

Ref = AdapterRef | AdapterKey
"""The stored form of an `AdapterId`."""


class IdOptions(TypedDict, total=False):
    """What a call may say of an id in a string, as in `AdapterRef`."""

    source: str | None
    revision: str | None
    token: str | None
    digest: str | None
    allow_stale: bool


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
                "an AdapterRef or a key has source, revision, token, digest and allow_stale itself"
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


def expected_digest(ref: Ref) -> str | None:
    """Return the digest of the weights that the caller expects, if any."""
    return ref.digest if isinstance(ref, AdapterRef) else None


def is_stale(key: AdapterKey) -> bool:
    """Return whether the key is `stale` (see `RemoteKey`)."""
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
    """`target_modules` as written; `formats.peft_names` says which modules these are."""
    excluded: ModuleNames = None
    """`exclude_modules` as written."""
    parameters: tuple[str, ...] = ()
    """`target_parameters`: ends of the paths of bare parameters, from a dot on."""
    layers: tuple[int, ...] = ()
    """`layers_to_transform`: the layers to which names in `targets` are limited; () is all."""
    layer_patterns: tuple[str, ...] = ()
    """`layers_pattern`: what precedes the number of a layer in a path; () is any name."""
    saved: tuple[str, ...] = ()
    """`modules_to_save` and what PEFT adds by `task_type`: ends of the paths of whole modules."""
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """`trainable_token_indices`: ends of the paths of embeddings, "" for that of the input, and the
    trained tokens of each."""
    ensure_weight_tying: bool = False
    """Whether a head tied to the embedding gets the embedding's adapter."""
    base_model: str | None = None
    """`base_model_name_or_path`: a label, if present."""
    base_class: str | None = field(default=None, compare=False)
    """The class of the base on which it was trained, by `auto_mapping`, if present: for errors."""
    task: str | None = field(default=None, compare=False)
    """`task_type`, if present: PEFT's word for the class."""
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
