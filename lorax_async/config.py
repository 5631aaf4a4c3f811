"""The settings of a store and of a loader: immutable, checked when they are made."""

from __future__ import annotations

import os
import re
from dataclasses import InitVar, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, Self, get_args

from lorax_async.errors import ConfigError, UsageError, shorten, shorten_repr
from lorax_async.ids import Allow, as_allow
from lorax_async.types import (
    MAX_SECONDS,
    require_bool,
    require_count,
    require_one_of,
    require_seconds,
)
from lorax_async.urls import InvalidUrlError, parse_folder_url

__all__ = [
    "DTYPES",
    "MAX_SLOTS",
    "MAX_THREADS",
    "Allow",
    "BaseCopyRule",
    "Checking",
    "Eviction",
    "HubCache",
    "Limits",
    "LoaderConfig",
    "LocalRoot",
    "Root",
    "Shard",
    "StoreConfig",
    "as_local_roots",
]

PEERS_REMOVED = (
    "peers, their mirrors and their fleet were removed in 0.3.0: leave them out, and put a caching"
    " proxy before the adapters' origin, as docs/fleet.md shows it"
)

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


_SIZE = re.compile(r"([0-9]+)\s*(|[KMGT]iB)")
_UNITS = {"": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": 1 << 40}


def parse_size(text: str) -> int | None:
    """Return the bytes of a text such as "2GiB" or "4096"; None if it is no size."""
    match = _SIZE.fullmatch(text)
    return None if match is None else int(match[1]) * _UNITS[match[2]]


class ByteSize:
    """A field of a dataclass: a number of bytes, or text with a unit ("2GiB"); kept as an int."""

    def __init__(self, default: int, *, least: int = 1) -> None:
        self._default = default
        self._least = least

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, _: type | None = None) -> int:
        size: int = self._default if instance is None else vars(instance)[self._name]
        return size

    def __set__(self, instance: object, value: int | str) -> None:
        size: object = value
        if isinstance(value, str) and value.endswith("B"):  # without a unit, it may mean anything
            parsed = parse_size(value)
            size = value if parsed is None else parsed
        try:
            require_count(self._name, size, least=self._least)
        except ConfigError as error:
            hint = '; as text, a size is "64MiB" or "2GiB"' if isinstance(value, str) else ""
            raise ConfigError(f"{error.problem}{hint}") from None
        vars(instance)[self._name] = size


# These classes have no slots: a slot would take the place of a `ByteSize`.


@dataclass(frozen=True)
class Limits:
    """Limits on untrusted adapters, in bytes or counts.

    Unless `max_header_bytes` is set, a header may have 160 bytes for each of `max_tensors`, and
    10 MiB in any case. Adapters with one Linear per expert, whose names are the longest, use 142.
    `max_tokenizer_bytes` is for all files of an adapter's own tokenizer together.
    """

    max_header_bytes: ByteSize = ByteSize(10 * MiB)
    max_tensors: int = 65_536
    max_name_bytes: int = 512
    max_dimensions: int = 8
    max_json_depth: int = 16
    max_config_bytes: ByteSize = ByteSize(256 * KiB)
    max_rank: int = 256
    max_adapter_bytes: ByteSize = ByteSize(4 * GiB)
    max_tokenizer_bytes: ByteSize = ByteSize(64 * MiB)

    def __post_init__(self) -> None:
        for entry in fields(self):
            require_count(entry.name, getattr(self, entry.name))
        if self.max_header_bytes == Limits.max_header_bytes:  # the default
            wanted = max(self.max_header_bytes, 160 * self.max_tensors)
            object.__setattr__(self, "max_header_bytes", wanted)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of every tensor-parallel module that a loader holds: `rank` of `world_size`.

    Raises `ConfigError` unless 0 <= rank < world_size.
    """

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require_count("world_size", self.world_size)
        require_count("rank", self.rank, least=0)
        if self.rank >= self.world_size:
            raise ConfigError(
                f"rank {self.rank} is outside 0 … {self.world_size - 1}: ranks in a world of"
                f" {self.world_size} start at 0"
            )


@dataclass(frozen=True, slots=True)
class LocalRoot:
    """A folder from which a `str` id may name an adapter. `path` is kept as an absolute `Path`.

    `immutable=True` asserts that no file below it is changed in place or truncated (new versions
    are renamed into place), so that files may be mapped and kept in host memory. Truncating a
    mapped file can kill the process.

    Raises `ConfigError` if there is no such folder.
    """

    path: str | os.PathLike[str]
    immutable: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise ConfigError(
                f"a local root must be the path of a folder, not {shorten_repr(self.path)}"
            )
        require_bool("immutable", self.immutable)
        name = os.fsdecode(self.path)
        if not name:  # an unset variable must not open the current folder
            raise ConfigError("local root '' is not a folder; '.' is the current one")
        path = Path(name).absolute()
        if not os.path.isdir(path):  # Path.is_dir may raise PermissionError
            raise ConfigError(f"local root {shorten(str(path), 500)!r} is not a folder")
        object.__setattr__(self, "path", path)


Root = str | os.PathLike[str] | LocalRoot
"""A local root; a plain path means `immutable=False`."""


def as_local_roots(roots: object) -> tuple[LocalRoot, ...]:
    """Convert a tuple or list of `Root`s. Raises `ConfigError`."""
    if not isinstance(roots, tuple | list) or not all(
        isinstance(root, str | os.PathLike | LocalRoot) for root in roots
    ):
        raise ConfigError(
            f"local_roots must be a tuple of folders, as ('adapters',), not {shorten_repr(roots)}"
        )
    return tuple(root if isinstance(root, LocalRoot) else LocalRoot(root) for root in roots)


MAX_SLOTS = 65_536
"""A slot takes 24 bytes per module of the base in the device's tables."""

MAX_THREADS = 256

Eviction = Literal["lru", "lfu", "gdsf"]
"""The eviction policy."""

HubCache = Literal["read", "off"]
"""The use of the standard hub cache."""

BaseCopyRule = Literal["refuse", "trust"]
"""What becomes of copies of the base's own weights that cannot be compared with the base."""

Checking = Literal["none", "stream", "before_use", "always"]
"""When the digest of an adapter's weights is checked."""

_DEVICE = re.compile(r"cpu|simulated|cuda(:(0|[1-9][0-9]?))?")

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes of adapters on a device: torch's name to safetensors' name."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Settings of an `AdapterStore`: where adapters may come from, and the cache on disk.

    A size is a number of bytes, or text with its unit: "2GiB".

    Parameters
    ----------
    timeout
        The default timeout of calls, in seconds.
    local_roots
        Folders below which a `str` id may name an adapter: paths or `LocalRoot`s; kept as
        `LocalRoot`s. A `pathlib.Path` id needs none.
    allow
        Places from which remote adapters may be loaded, as `Allow` entries (docs/sources.md).
        Without entries: the hub. Entries for the hub limit it to what they name.
    hub_endpoint
        URL of the hub. None: huggingface_hub's own, https://huggingface.co or `HF_ENDPOINT` at its
        import. The hosts to which it redirects are allowed.
    hub_cache
        The standard hub cache, shared with other programs: "read" uses its files, "off" ignores it.
        It is never written: downloads go to `cache_dir`.
    hub_cache_dir
        Its folder. None: huggingface_hub's.
    offline
        Make no request: load from local folders and the two caches only.
    verify
        When to check digests: "stream" returns from `load` when the weights are on the device, and
        checks meanwhile; "before_use" waits for the check, of local files too; "none" checks none.
        A cached file is hashed once a boot, unless it was touched since; "always" is "before_use"
        that hashes it for each load. A store's folders are always checked before use, local ones
        with "before_use" and "always" only.
    cache_dir
        The folder of the disk cache, private to this user; made when first needed. None:
        `$XDG_CACHE_HOME/lorax-async`, else `~/.cache/lorax-async` (see `cache_folder`).
    cache_bytes
        Budget of that folder.
    connections
        Connections to all sources together; each has a thread.
    revalidate
        Seconds for which a source's answer about a movable revision, or about access to an adapter,
        is reused; 0 always asks again.
    revalidate_files
        The same for a look at the files of a local folder. Within these seconds `load` looks at a
        path's files on the event loop, with two stat calls that the kernel answers from memory,
        unless they are on a network file system or FUSE. 0 always takes a thread.
    convert_bin
        Load adapters whose weights are `adapter_model.bin` only, a pickle, too: a restricted
        unpickler in a process of its own, with limits of memory and time, converts the file once
        into an entry of the disk cache. False refuses them.
    eviction
        The eviction policy, on disk, in host memory and on the device: "lru", "lfu" (with ageing),
        or "gdsf" (frequency and cost per byte).
    limits
        Limits on untrusted adapters.

    Raises
    ------
    ConfigError
        A value is out of range or not available here.
    """

    timeout: float = 300.0
    local_roots: tuple[Root, ...] = ()
    allow: tuple[Allow, ...] = ()
    hub_endpoint: str | None = None
    hub_cache: HubCache = "read"
    hub_cache_dir: str | os.PathLike[str] | None = None
    offline: bool = False
    verify: Checking = "stream"
    cache_dir: str | os.PathLike[str] | None = None
    cache_bytes: ByteSize = ByteSize(16 * GiB)
    connections: int = 16
    revalidate: float = 60.0
    revalidate_files: float = 1.0
    convert_bin: bool = False
    eviction: Eviction = "lru"
    limits: Limits = field(default_factory=Limits)
    peers: InitVar[None] = None
    """Refused: see `PEERS_REMOVED`."""

    def __post_init__(self, peers: object) -> None:
        if peers is not None:
            raise ConfigError(PEERS_REMOVED)
        if str(self.hub_cache) == "write":
            raise ConfigError(
                'hub_cache="write" was removed: what comes from the hub goes to cache_dir. Use'
                ' hub_cache="read", and `hf download` to fill the standard hub cache'
            )
        for name, words in (("eviction", Eviction), ("hub_cache", HubCache), ("verify", Checking)):
            require_one_of(name, getattr(self, name), get_args(words))
        require_bool("offline", self.offline)
        require_bool("convert_bin", self.convert_bin)
        if not isinstance(self.limits, Limits):
            raise ConfigError(f"limits must be Limits(…), not {shorten_repr(self.limits)}")
        _require_at_most("connections", self.connections, MAX_THREADS)
        require_seconds("timeout", self.timeout)
        _require_zero_or_seconds("revalidate", self.revalidate)
        _require_zero_or_seconds("revalidate_files", self.revalidate_files)
        normalized = {
            "local_roots": as_local_roots(self.local_roots),
            "allow": as_allow(self.allow),
            "hub_endpoint": _endpoint(self.hub_endpoint),
            "hub_cache_dir": _as_folder("hub_cache_dir", self.hub_cache_dir),
            "cache_dir": _as_folder("cache_dir", self.cache_dir),
        }
        for name, value in normalized.items():
            object.__setattr__(self, name, value)

    @property
    def checks_before_use(self) -> bool:
        return self.verify in {"before_use", "always"}

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, or the default folder by the current environment."""
        return Path(self.cache_dir) if self.cache_dir is not None else _default_cache_folder()

    def seconds(self, timeout: float | None) -> float:
        """Check and return a call's timeout; None is the configured one. Raises `UsageError`."""
        if timeout is None:
            return self.timeout
        plain = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if plain and 0 <= timeout <= MAX_SECONDS:
            return float(timeout)
        raise UsageError(
            f"a timeout is from 0 to {MAX_SECONDS:g} seconds, not {shorten_repr(timeout)}"
        )


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(StoreConfig):
    """Settings of an `AdapterLoader`: those of its `StoreConfig`, the device, and the budgets.

    Parameters
    ----------
    device
        The device: "cpu", "cuda", "cuda:N", or "simulated" (for tests of servers: host memory with
        delayed copies).
    dtype
        The dtype of adapters on the device: a torch dtype or its name. None: the layout's.
    shard
        The part of a tensor-parallel base that this process runs, split as in Megatron-LM: B's rows
        of a column-parallel module, A's columns of a row-parallel one, whose delta is added before
        the all-reduce. Only these bytes are read. None: the whole base.
    device_bytes, staging_bytes
        Budgets: the arena, and the staging buffers for casts and padding (page-locked on cuda,
        where all bytes pass through them).
    host_bytes
        Budget of the host tier: file pages below immutable `LocalRoot`s that are kept in memory.
    memory_bytes
        Budget of host copies: adapters loaded from tensors, until they are unloaded or replaced.
    pinned_bytes
        Budget of pinned images, on devices other than "cpu": page-locked copies of adapters in
        device form, which reload without reading a file.
    max_slots
        Adapters that can be resident or streaming at once.
    io_threads
        Threads that read and copy bytes. Small metadata has two threads of its own.
    starvation_age
        Seconds after which a request that waits for a slot blocks new leases on an adapter that is
        always leased, so that its slot becomes free. Also the worth of one level of priority.
    min_residency
        Seconds for which a resident adapter is not evicted for requests that have waited less than
        `starvation_age`.
    check_finite
        Refuse adapters with NaN or infinite weights, one of which can ruin the outputs of a whole
        batch or prefix cache. Reads every copied byte once more, off the loop.
    base_copies
        PEFT's default save adds the base's weights of `embed_tokens` and `lm_head` where these are
        targeted. "refuse" compares such a copy with the attached model or, without one, with the
        base's files that the layout names, and refuses what differs or cannot be compared. "trust"
        ignores copies, as vLLM does.

    Raises
    ------
    ConfigError
        A value is out of range or not available here.
    """

    cache_bytes: ByteSize = ByteSize(16 * GiB)  # again: mypy does not inherit descriptors
    device: str = "cpu"
    dtype: object | None = None
    shard: Shard | None = None
    device_bytes: ByteSize = ByteSize(256 * MiB)
    staging_bytes: ByteSize = ByteSize(16 * MiB)
    host_bytes: ByteSize = ByteSize(256 * MiB, least=0)
    memory_bytes: ByteSize = ByteSize(256 * MiB, least=0)
    spill: bool = False
    pinned_bytes: ByteSize = ByteSize(0, least=0)
    max_slots: int = 16
    io_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    starvation_age: float = 5.0
    min_residency: float = 0.0
    check_finite: bool = True
    base_copies: BaseCopyRule = "refuse"

    def __post_init__(self, peers: object) -> None:
        super().__post_init__(peers)
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device {self.device!r} is not 'cpu', 'cuda', 'cuda:N' or 'simulated'"
            )
        require_bool("check_finite", self.check_finite)
        require_one_of("base_copies", self.base_copies, get_args(BaseCopyRule))
        if self.spill:
            raise ConfigError(
                "spill=True was removed: tensors are not written to disk. Raise memory_bytes, or"
                " save the adapter to a folder and load that"
            )
        if not isinstance(self.shard, Shard | None):
            raise ConfigError(
                f"shard must be Shard(rank, world_size) or None, not {shorten_repr(self.shard)}"
            )
        _require_at_most("max_slots", self.max_slots, MAX_SLOTS)
        _require_at_most("io_threads", self.io_threads, MAX_THREADS)
        require_seconds("starvation_age", self.starvation_age)
        _require_zero_or_seconds("min_residency", self.min_residency)
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))

    @property
    def storage_dtype(self) -> str | None:
        """`dtype` by safetensors' name ("BF16"), or None for the layout's."""
        return None if self.dtype is None else DTYPES[str(self.dtype)]

    def resolved(self, layout_dtype: str) -> Self:
        """Return these settings with the layout's dtype ("BF16") if `dtype` is None."""
        if self.dtype is not None:
            return self
        name = next(name for name, word in DTYPES.items() if word == layout_dtype)
        return replace(self, dtype=name)


def _require_at_most(name: str, value: object, maximum: int) -> None:
    require_count(name, value)
    if isinstance(value, int) and value > maximum:
        raise ConfigError(f"{name} must be {maximum:,} at most, not {value:,}")


def _require_zero_or_seconds(name: str, value: object) -> None:
    if value != 0 or isinstance(value, bool):
        require_seconds(name, value)


def _dtype_name(dtype: object) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"dtype must be one of {', '.join(DTYPES)} or None, not {shorten_repr(name)}"
        )
    return name


def _endpoint(url: object) -> str | None:
    """Normalize a URL, without a "/" at the end."""
    if url is None:
        return None
    if not isinstance(url, str):
        raise ConfigError(f"hub_endpoint must be a URL or None, not {shorten_repr(url)}")
    try:
        return parse_folder_url(url).text.removesuffix("/")
    except InvalidUrlError as error:  # do not repeat the URL: it may hold a secret
        raise ConfigError(f"hub_endpoint is not accepted: {error}") from None


def _as_folder(name: str, value: object) -> Path | None:
    """Return the absolute path of an existing or future folder; None stays None."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name} must be the path of a folder or None, not {shorten_repr(value)}")
    path = Path(os.fsdecode(value)).absolute()
    if "\0" in str(path) or (os.path.lexists(path) and not os.path.isdir(path)):
        raise ConfigError(f"{name} {shorten(str(path), 500)!r} is not a folder")
    return path


def _default_cache_folder() -> Path:
    """Return the folder by the XDG specification, which ignores relative paths."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(cache_home) if os.path.isabs(cache_home) else Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError("this process has no home folder; name a cache_dir") from error
    return base / "lorax-async"
