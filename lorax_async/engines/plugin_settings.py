"""What plug-ins for engines share: settings, what adapters have to fit, and how they fail."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from http import HTTPStatus
from math import ceil
from pathlib import Path
from typing import Any, get_args

from lorax_async import layouts
from lorax_async.adapters.weights_file import require_base_copies, require_finite
from lorax_async.config import BaseCopyRule, GiB, Limits, MiB, StoreConfig, parse_size
from lorax_async.devices.base_copies import BaseCopies
from lorax_async.errors import (
    AccessDeniedError,
    ConfigError,
    IncompatibleAdapterError,
    InvalidAdapterIdError,
    LoraxError,
    UnsupportedAdapterError,
    UsageError,
    http_status,
    shorten,
)
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import parse_tensor_name
from lorax_async.formats.tensor_kinds import FEATURES, KINDS, PARAMETERS, WHOLE, TensorRole
from lorax_async.ids import (
    Allow,
    HubRepository,
    LocalFolder,
    WebFolder,
    allow_ref,
    parse_ref,
    parse_requested,
    parse_source,
)
from lorax_async.lru import remember
from lorax_async.planning.layout import ModelLayout, Parameter
from lorax_async.planning.model_families import decoder_layout
from lorax_async.planning.pairing import OtherTensor, pair_tensors
from lorax_async.planning.sharding import shard_layout
from lorax_async.planning.transfer_plan import BaseCopy
from lorax_async.remote.hub import HUB_REMEDY
from lorax_async.sources.local import CONFIG, OUTSIDE, read_header
from lorax_async.telemetry import kind_of
from lorax_async.types import AdapterRef, require_one_of

PREFIX = "LORAX_ASYNC_"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginSettings:
    """What the operator allows, by environment variable (docs/vllm.md). Raises `ConfigError`."""

    sources: tuple[Allow, ...] = ()
    """Remote locations below which a request may name adapters by id."""
    folders: tuple[Path, ...] = ()
    """Local folders in which a request may name adapters: `name`, or `./name`."""
    adapters: Mapping[str, AdapterRef] = field(default_factory=dict)
    """Names for adapters anywhere."""
    cache_dir: Path | None = None
    cache_bytes: int = 16 * GiB
    host_bytes: int = 2 * GiB
    """Budget, in each worker, of weights that are ready for the engine."""
    connections: int = 16
    """Connections to all sources together."""
    timeout: float = 300.0
    """Seconds within which an adapter is downloaded, checked and built."""
    revalidate: float = 60.0
    """Seconds for which a source's answer counts: which version an id means, and access to it."""
    allow_stale: bool = False
    """While a source cannot be reached, use the version that it last named."""
    check_finite: bool = True
    """Refuse weights that are NaN or infinite: one such adapter ruins an engine's prefix cache."""
    base_copies: BaseCopyRule = "refuse"
    """Compare copies of the base's weights with its files, or "trust" them, as engines do."""
    convert_bin: bool = False
    """Convert weights that are `adapter_model.bin` only, a pickle, in a process of its own."""
    max_tensors: int = Limits.max_tensors
    """Tensors of one adapter; the limit on a file's header follows."""
    token: str | None = field(default=None, repr=False)
    """The bearer token for http(s) sources; the hub has `HF_TOKEN`."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> PluginSettings:
        """Read `LORAX_ASYNC_*`. Raise `ConfigError` for an unknown name or a wrong value."""
        given = {
            name.removeprefix(PREFIX): value
            for name, value in environment.items()
            if name.startswith(PREFIX) and value
        }
        names = {"SOURCES", "ADAPTERS", "TOKEN", *_PARSERS}
        if unknown := sorted(given.keys() - names):
            raise ConfigError(
                f"{PREFIX}{unknown[0]} is not a setting; there are"
                f" {', '.join(PREFIX + name for name in sorted(names))}"
            )
        sources = [_parse_source(text) for text in given.get("SOURCES", "").split()]
        adapters = dict(_parse_alias(text) for text in given.get("ADAPTERS", "").split())
        values = {name.lower(): _parse(name, given[name]) for name in _PARSERS if name in given}
        settings = cls(
            sources=tuple(source for source in sources if isinstance(source, Allow)),
            folders=tuple(source for source in sources if isinstance(source, Path)),
            adapters=adapters,
            token=given.get("TOKEN"),
            **values,
        )
        StoreConfig(**settings.store_settings())  # raises for values that do not go together
        return settings

    @property
    def limits(self) -> Limits:
        """The limits on untrusted adapters."""
        return Limits(max_tensors=self.max_tensors)

    def store_settings(self) -> dict[str, Any]:
        """Return these settings as arguments of `StoreConfig`."""
        # The operator names the aliases' adapters: they are allowed here, but not to requests. The
        # entries lend no token: an alias has its own `use_token`.
        allow = (*self.sources, *filter(None, map(allow_ref, self.adapters.values())))
        return {
            "allow": allow or (Allow("https", "allowed.invalid"),),  # none would be all of the hub
            "local_roots": self.folders,
            "cache_dir": self.cache_dir,
            "cache_bytes": self.cache_bytes,
            "connections": self.connections,
            "timeout": self.timeout,
            "revalidate": self.revalidate,
            "convert_bin": self.convert_bin,
            "limits": self.limits,
        }

    def describe(self) -> str:
        """Return what is allowed and the budgets in one line, for a log."""
        config = StoreConfig(**self.store_settings())
        places = [*map(_show_source, self.sources), *map(str, self.folders)]
        names = sorted(self.adapters)
        if len(names) > MAX_SHOWN:
            names[MAX_SHOWN:] = [f"and {len(names) - MAX_SHOWN} more"]
        return "; ".join(
            (
                f"requests may name adapters of {', '.join(places) or 'no source'}",
                f"names: {', '.join(names) or 'none'}",
                f"cache: {config.cache_folder}, up to {_show_size(self.cache_bytes)}",
                f"built weights: up to {_show_size(self.host_bytes)} in each worker",
                f"{self.connections} connections, {self.timeout:g} s for an adapter",
                f"a source's answer counts for {self.revalidate:g} s",
            )
        )

    def find(self, name: str) -> AdapterRef | None:
        """Return the adapter that a request names, or None if requests may not name it.

        The name is one in `adapters`, an id below `sources`, or a name in one of `folders`.
        """
        ref = self._find(name)
        return replace(ref, allow_stale=True) if ref is not None and self.allow_stale else ref

    def _find(self, name: str) -> AdapterRef | None:
        if name in self.adapters:
            return self.adapters[name]
        bare = "/" not in name and ":" not in name
        ref = parse_requested(f"./{name}" if bare else name, self.sources)
        if ref is None:
            return None
        if isinstance(ref.location, LocalFolder):
            path = Path(ref.location.path)
            inside = not path.is_absolute() or any(map(path.is_relative_to, self.folders))
            return ref.plain if self.folders and inside else None
        return self.with_token(ref.plain)

    def with_token(self, ref: AdapterRef) -> AdapterRef:
        """Return `ref` with the token for its source."""
        if self.token is None or not isinstance(parse_ref(ref).location, WebFolder):
            return ref
        return AdapterRef(ref.id, ref.source, ref.revision, token=self.token, digest=ref.digest)


MAX_SHOWN = 10
"""Names of adapters in the line of a log."""


def _show_source(source: Allow) -> str:
    if source.scheme == "hub":
        return f"hub:{source.prefix}" if source.prefix else "hub"
    port = "" if source.port is None else f":{source.port}"
    return f"{source.scheme}://{source.host}{port}/{source.prefix}"


def _show_size(nbytes: int) -> str:
    return f"{nbytes / GiB:.4g} GiB" if nbytes >= GiB else f"{nbytes / MiB:.4g} MiB"


def _parse_source(text: str) -> Allow | Path:
    """Parse "hub", "hub:org/", a URL that ends with "/", or an absolute folder."""
    try:
        source = parse_source(text)
    except UsageError as error:  # do not repeat the text: it may hold a secret
        raise ConfigError(f"{PREFIX}SOURCES: {error.problem}") from None
    if isinstance(source, Path) and not (source.is_absolute() and source.is_dir()):
        raise ConfigError(
            f"{PREFIX}SOURCES: {shorten(text, 200)!r} is neither hub, hub:ORG/, a URL that ends"
            " with '/', nor the absolute path of a folder"
        )
    return source


def _parse_alias(text: str) -> tuple[str, AdapterRef]:
    name, separator, id = text.partition("=")
    if not separator or not name or not id:
        raise ConfigError(f"{PREFIX}ADAPTERS: {shorten(text, 200)!r} is not NAME=ID or NAME=PATH")
    if id.startswith("/"):
        return name, AdapterRef(Path(id))
    try:
        ref = parse_ref(AdapterRef(id))
    except InvalidAdapterIdError as error:
        raise ConfigError(f"{PREFIX}ADAPTERS: {error.problem}") from None
    return name, replace(ref.plain, use_token=ref.source == "hub")


def _parse(name: str, text: str) -> Any:
    """Return the value of a setting. Raise `ConfigError`, which names its variable."""
    value, field = _PARSERS[name](name, text), name.lower()
    for checks in (StoreConfig, Limits):
        if field in checks.__dataclass_fields__:
            try:
                checks(**{field: value})
            except ConfigError as error:
                raise ConfigError(f"{PREFIX}{name}: {error.problem}") from None
    return value


def _parse_folder(_: str, text: str) -> Path:
    return Path(text)


def _parse_size(name: str, text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise ConfigError(f"{PREFIX}{name} must be bytes, such as 16GiB, not {shorten(text, 40)!r}")
    return size


def _parse_number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ConfigError(f"{PREFIX}{name} must be a number, not {shorten(text, 40)!r}")
    return int(text)


def _parse_seconds(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{PREFIX}{name} must be seconds, not {shorten(text, 40)!r}") from None


def _parse_switch(name: str, text: str) -> bool:
    if text not in {"0", "1"}:
        raise ConfigError(f"{PREFIX}{name} must be 0 or 1, not {shorten(text, 40)!r}")
    return text == "1"


def _parse_base_copies(name: str, text: str) -> str:
    require_one_of(f"{PREFIX}{name}", text, get_args(BaseCopyRule))
    return text


_PARSERS: Mapping[str, Callable[[str, str], Any]] = {
    "CACHE_DIR": _parse_folder,
    "CACHE_BYTES": _parse_size,
    "HOST_BYTES": _parse_size,
    "CONNECTIONS": _parse_number,
    "TIMEOUT": _parse_seconds,
    "REVALIDATE": _parse_seconds,
    "ALLOW_STALE": _parse_switch,
    "CHECK_FINITE": _parse_switch,
    "CONVERT_BIN": _parse_switch,
    "BASE_COPIES": _parse_base_copies,
    "MAX_TENSORS": _parse_number,
}
"""How the values of settings are read, apart from those that name adapters or are secret."""


EXPERTS = frozenset({"num_experts", "num_local_experts", "n_routed_experts"})
"""Keys of the configs of models with experts."""


def layout_for(config: Mapping[str, Any], logger: logging.Logger) -> ModelLayout | None:
    """Return the layout by a base's config, or None, after a warning, where it does not tell."""
    layout = None if EXPERTS & config.keys() else decoder_layout(config)
    if layout is None:
        logger.warning(
            "adapters are not compared with the shapes of the base: its model_type %r is not"
            " known, or has experts, whose adapters have several spellings",
            config.get("model_type"),
        )
    return layout


_FUSED = frozenset({"gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe"})
"""Types of models whose fused experts vLLM adapts: those with `is_3d_moe_weight`."""


def fused_width(config: Mapping[str, Any]) -> int | None:
    """Return the hidden size of a base whose fused experts vLLM adapts, or None."""
    if config.get("model_type") not in _FUSED:
        return None
    for part in ("thinker_config", "text_config"):
        config = config.get(part, config)
    return config.get("hidden_size")


_HEADS: Mapping[str, frozenset[str]] = {"vLLM": frozenset({"classifier", "score"})}
"""The whole modules that an engine applies, where a base has them; others it drops."""


@dataclass(frozen=True, slots=True)
class BaseRequirements:
    """What adapters have to fit: the base's layout, if known, and the server's highest rank."""

    layout: ModelLayout | None
    max_rank: int | None
    _: KW_ONLY
    check_finite: bool = True
    engine: str = ""
    """The engine's name in `tensor_kinds`; "" accepts kinds of tensors that none applies."""
    fused_width: int | None = None
    """The base's hidden size, if the engine adapts its fused experts."""
    base: str = ""
    """The base's folder, or its id in the hub cache, where the layout does not name it."""
    base_copies: BaseCopyRule = "refuse"
    limits: Limits = field(default_factory=Limits)

    def check(self, folder: Path) -> int:
        """Return the bytes of an adapter's weights. Blocks, while it reads them.

        Raise the `AdapterError` that says why it does not fit.
        """
        limits = self.limits
        header, nbytes = read_header(folder, limits)
        if self.engine:
            for span in header.tensors:
                self._require_applied(span.name)
        spec = parse_config((folder / CONFIG).read_bytes(), limits)
        ranks = [spec.rank, *(int(pattern.value) for pattern in spec.rank_patterns)]
        if self.max_rank is not None and max(ranks) > self.max_rank:
            raise IncompatibleAdapterError(
                f"its rank is {max(ranks)}, and this server takes up to {self.max_rank}"
                " (--max-lora-rank)"
            )
        layout = self.layout or layouts.from_adapter(folder, limits=limits)
        _, others = pair_tensors(header, spec, layout, limits)
        if self.engine:
            self._require_others(others, layout)
        if self.base_copies != "trust":
            base = BaseCopies(shard_layout(replace(layout, base=layout.base or self.base), None))
            copies = [BaseCopy.of(it) for it in others if it.part is TensorRole.BASE_COPY]
            require_base_copies(folder, copies, base, limits)
        if self.check_finite:
            require_finite(folder)
        return nbytes

    def _require_applied(self, tensor: str) -> None:
        """Raise `UnsupportedAdapterError` for a tensor of a kind that the engine would drop."""
        name = parse_tensor_name(tensor)
        if name.part in PARAMETERS and self.fused_width is not None:
            return  # see `_require_fused`, which knows what they are of
        if name.part in WHOLE and name.module in _HEADS.get(self.engine, ()):
            return
        self._require_role(tensor, name.part, embedding=name.embedding)

    def _require_others(self, others: Iterable[OtherTensor], layout: ModelLayout) -> None:
        """Raise `UnsupportedAdapterError` for what the engine would drop or confuse."""
        fused: dict[str, dict[str, tuple[int, int]]] = {}
        for other in others:
            owner = layout.at(other.module)
            if isinstance(owner, Parameter) and self.fused_width is not None:
                fused.setdefault(owner.module, {})[owner.key] = owner.sizes
            elif other.part not in WHOLE or owner.name not in _HEADS.get(self.engine, ()):
                self._require_role(other.span.name, other.part)
        for path, sizes in fused.items():
            self._require_fused(path, sizes)

    def _require_fused(self, path: str, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise unless the engine applies all that changes fused experts, as it is."""
        if sizes.keys() != {"gate_up_proj", "down_proj"}:
            raise UnsupportedAdapterError(
                f"it changes {', '.join(sorted(sizes))} of {shorten(path, 200)!r}; {self.engine}"
                " applies gate_up_proj and down_proj of fused experts, both together and nothing"
                " beside them; train these, or serve it with lorax_async's own server"
            )
        widths = sizes["gate_up_proj"][1], sizes["down_proj"][0]
        if widths != (self.fused_width, self.fused_width):
            raise IncompatibleAdapterError(
                f"the experts of {shorten(path, 200)!r} take {widths[0]} features and give"
                f" {widths[1]}, and the base's {self.fused_width}: it is of another base, or peft"
                " 0.17 or 0.18 saved it with swapped axes; save it again with a newer peft"
            )

    def _require_role(
        self, tensor: str, role: TensorRole, *, embedding: bool | None = None
    ) -> None:
        kinds = [kind for kind in KINDS if kind.role is role]
        if embedding is not None:
            kinds = [kind for kind in kinds if kind.embedding == embedding]
        if all(self.engine not in kind.engines for kind in kinds):
            raise UnsupportedAdapterError(
                f"tensor {shorten(tensor, 200)!r} belongs to {FEATURES[role]}, which"
                f" {self.engine} does not apply; serve it with lorax_async's own server, or train"
                " without it"
            )


def explain(error: LoraxError, ref: AdapterRef) -> LoraxError:
    """Return an error whose remedy is one of the plug-ins' users: settings, not arguments."""
    if not isinstance(error, AccessDeniedError):
        return error
    location = parse_ref(ref).location
    if isinstance(location, HubRepository):
        org = location.text.partition("/")[0]
        remedy = (
            f"set HF_TOKEN, for the server, to a token that may read it, and name it in"
            f" {PREFIX}ADAPTERS (NAME={location.text}) or {PREFIX}SOURCES (hub:{org}/): to other"
            " requests no token is lent"
        )
    elif isinstance(location, WebFolder):
        remedy = (
            f"{PREFIX}TOKEN is the token for http(s) sources, and {PREFIX}SOURCES what is allowed"
        )
    elif isinstance(location, LocalFolder):
        remedy = f"requests name folders only inside the folders of {PREFIX}SOURCES"
    else:
        remedy = "the credentials are those of the server's environment"
    if remedy in error.problem:
        return error
    for words in (HUB_REMEDY, OUTSIDE):
        if words in error.problem:
            return error.reworded(error.problem.replace(words, remedy))
    return error.reworded(f"{error.problem}; {remedy}")


MAX_FAILURES = 256
"""Names of failed adapters that are remembered."""


class FailureLog:
    """The last failure of each adapter, with one line in a log.

    Another line follows only after the adapter could be used, or for another kind of failure: a
    name that every request repeats does not fill the log. `counts` has all of them, by kind.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._failures: OrderedDict[str, tuple[tuple[str, str], str]] = OrderedDict()
        self.counts: Counter[tuple[str, str]] = Counter()
        """Failures by the stage of the error, or "none", and its class."""

    def note(self, name: str, error: LoraxError, effect: str = "cannot be used") -> None:
        """Count and remember a failure, and log it unless it is known."""
        kind, text, before = kind_of(error), str(error), self._failures.get(name)
        self.counts[kind] += 1
        remember(self._failures, name, (kind, text), MAX_FAILURES)
        if before is None or before[0] != kind:  # the text alone: an error has frames
            self._logger.warning("the adapter %r %s: %s", shorten(name, 200), effect, text)

    def clear(self, name: str) -> None:
        """Forget a failure: the adapter can be used."""
        self._failures.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return the text of an adapter's last error, or None."""
        failure = self._failures.get(name)
        return None if failure is None else failure[1]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._failures))


_ENGINE_STATUSES = {"over_capacity": 503, "timeout": 503, "fetch_failed": 503}
"""Statuses by code that differ from `HTTP_STATUSES`: engines retry after 503 only."""

RETRY_AFTER = 5.0
"""Seconds in `Retry-After` where the source named none."""


def response_to(error: LoraxError, name: str) -> tuple[int, str, dict[str, str] | None]:
    """Return status, text and headers of a response; `name` is the client's for the adapter."""
    status, code = http_status(error) or (500, "")
    # Engines refuse an adapter with 400.
    status = 400 if status == 422 else _ENGINE_STATUSES.get(code, status)
    shown = error if error.id is None else error.located(id=name)
    headers = None
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = {"Retry-After": str(max(1, ceil(error.retry_after or RETRY_AFTER)))}
    return status, str(shown), headers
