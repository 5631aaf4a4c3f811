"""The settings of a loader: frozen, checked at construction, with defaults for a laptop."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from lorax_async.errors import ConfigError, InvalidAdapterIdError, UsageError, shorten
from lorax_async.ids.allow import Allow, as_allow
from lorax_async.ids.grammar import parse_folder_url
from lorax_async.validation import (
    MAX_SECONDS,
    as_folder_to_be,
    require_bool,
    require_count,
    require_one_of,
    require_positive,
    require_seconds,
)

__all__ = [
    "DTYPES",
    "MAX_SLOTS",
    "MAX_THREADS",
    "Allow",
    "Checking",
    "Eviction",
    "HubCache",
    "Limits",
    "LoaderConfig",
    "LocalRoot",
    "Root",
    "Shard",
    "as_local_roots",
]


KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a stranger's adapter is accepted. Bytes, or counts."""

    max_header_bytes: int = 2 * MiB
    max_tensors: int = 65_536
    max_name_bytes: int = 512
    max_dimensions: int = 8
    max_json_depth: int = 16
    max_config_bytes: int = 256 * KiB
    max_rank: int = 256
    max_adapter_bytes: int = 4 * GiB

    def __post_init__(self) -> None:
        for entry in fields(self):
            require_positive(entry.name, getattr(self, entry.name))


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of the `world_size` parts of every tensor-parallel module a loader holds: the `rank`th.

    Raises `ConfigError` unless 0 <= rank < world_size.
    """

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require_positive("world_size", self.world_size)
        require_count("rank", self.rank, least=0)
        if self.rank >= self.world_size:
            raise ConfigError(
                f"rank {self.rank} is outside 0 … {self.world_size - 1}: a world of"
                f" {self.world_size} counts its ranks from 0"
            )


@dataclass(frozen=True, slots=True)
class LocalRoot:
    """A folder from which a `str` id may name an adapter. `path` is kept as an absolute `Path`.

    `immutable=True` is the operator's word that no file below it is ever changed in place or
    truncated (new versions come by rename), so that such files may be mapped and held in host
    memory. A file that is cut while it is mapped can kill the process.

    Raises `ConfigError` if there is no such folder.
    """

    path: str | os.PathLike[str]
    immutable: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise ConfigError(f"a local root must be the path of a folder, not {self.path!r}")
        require_bool("immutable", self.immutable)
        object.__setattr__(self, "path", _folder(os.fsdecode(self.path)))


Root = str | os.PathLike[str] | LocalRoot
"""What names a local root: a plain path says nothing of how its files change."""


def as_local_roots(roots: object) -> tuple[LocalRoot, ...]:
    """Of a tuple or list of `Root`s; those that are `LocalRoot`s already stay as they are."""
    if not isinstance(roots, tuple | list) or not all(
        isinstance(root, str | os.PathLike | LocalRoot) for root in roots
    ):
        raise ConfigError("local_roots must be a tuple of folders")
    return tuple(root if isinstance(root, LocalRoot) else LocalRoot(root) for root in roots)


def _folder(name: str) -> Path:
    if not name:  # an unset variable, say, must not open the present folder
        raise ConfigError("local root '' is not a folder; '.' is the present one")
    path = Path(name).absolute()
    if not os.path.isdir(path):  # Path.is_dir raises where it may not look
        raise ConfigError(f"local root {shorten(str(path), 500)!r} is not a folder")
    return path


MAX_SLOTS = 65_536
"""A slot is a column of the device's tables, with 24 bytes for every module of the base."""

MAX_THREADS = 256

_MOST = {"max_slots": MAX_SLOTS, "io_threads": MAX_THREADS, "connections": MAX_THREADS}

Eviction = Literal["lru", "lfu", "gdsf"]
"""Who makes room."""

HubCache = Literal["read", "off"]
"""What the standard hub cache of this machine is for."""

Checking = Literal["none", "stream", "before_use"]
"""What a load waits for, of the digest of an adapter's weights."""

_DEVICE = re.compile(r"cpu|simulated|cuda(:(0|[1-9][0-9]?))?")

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes an adapter can have on a device, by torch's name, with the file format's word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """Settings of an `AdapterLoader`.

    Parameters
    ----------
    device
        Where adapters become resident: "cpu", "cuda", "cuda:N", or "simulated" (a device for tests
        of servers: host memory behind copies that run late).
    dtype
        What they are stored as there: a torch dtype or its name; None takes the layout's.
    shard
        The part of a tensor-parallel base that this process runs, cut as Megatron-LM cuts: of a
        column-parallel module B's rows are held, of a row-parallel one A's columns, and its delta
        is added before the all-reduce. Only these bytes are read. None: all of it.
    device_bytes, staging_bytes
        Budgets: the arena, and the buffers in which casts and padding happen (page-locked on cuda,
        where everything passes through them).
    host_bytes
        Budget of the host tier: file pages below immutable `LocalRoot`s that are held in memory.
    memory_bytes
        Budget of copies in host memory: of adapters that were given as tensors, until they are
        unloaded, replaced or spilled, and of merges, until others need the room.
    spill
        Let those that were used longest ago go on in `cache_dir`, within `cache_bytes`, where a new
        one finds no room in `memory_bytes`; False writes no tensors to the disk.
    pinned_bytes
        Budget, on other devices than "cpu", of page-locked memory beside staging: adapters are
        kept there as they lie on the device, and come back without reading a file.
    max_slots
        Adapters that can be resident or streaming at once.
    io_threads
        Threads that read and copy bytes. Small metadata has two more of its own.
    timeout
        Seconds a call waits unless it says otherwise.
    starvation_age
        Seconds after which a request that waits for a slot stops new leases on an adapter that is
        always leased, so that its slot comes free; and what each level of priority is worth.
    min_residency
        Seconds for which an adapter that became resident is not evicted for others that have not
        waited for `starvation_age`.
    eviction
        Who makes room: "lru", "lfu" (with ageing), or "gdsf" (by frequency and cost per byte).
    local_roots
        Folders from which a `str` id may name an adapter: paths, or `LocalRoot`s, as which they
        are kept. A `pathlib.Path` id needs none.
    allow
        From where adapters may come that are not local, in `Allow` entries (docs/sources.md).
        Without any: from the hub. Once there is one for the hub, from what the hub's entries name.
    hub_endpoint
        URL of the hub. None is huggingface_hub's own: https://huggingface.co, or what `HF_ENDPOINT`
        said when huggingface_hub was imported; nothing here reads it. Wherever it leads is allowed.
    hub_cache
        The standard hub cache, which other programs share: "read" uses what is stored there, "off"
        ignores it. It is never written: what comes from the hub goes to `cache_dir`.
    hub_cache_dir
        Its folder; None is huggingface_hub's.
    offline
        Ask no source: adapters come from local folders and the two caches only.
    verify
        What `load` waits for: "stream" for the weights on the device, while their digest follows;
        "before_use" for the digest too, also of local files; "none" checks no digest at all.
    cache_dir
        Where adapters from elsewhere are kept, private to this user; made when first needed. None
        is `$XDG_CACHE_HOME/lorax-async`, else `~/.cache/lorax-async` (`cache_folder` says it).
    cache_bytes
        Budget of that folder.
    connections
        To all sources together: each has a thread.
    revalidate
        Seconds for which an answer of a source about a revision that may move, or about who may
        have an adapter, is taken again without asking; 0 asks each time.
    check_finite
        Refuse adapters with NaN or infinite weights (reads every byte once more, off the loop).
    limits
        How much of a stranger's adapter is accepted.

    Raises
    ------
    ConfigError
        A value is out of range or not available here.
    """

    device: str = "cpu"
    dtype: object | None = None
    shard: Shard | None = None
    device_bytes: int = 256 * MiB
    host_bytes: int = 256 * MiB
    memory_bytes: int = 256 * MiB
    spill: bool = True
    pinned_bytes: int = 0
    staging_bytes: int = 16 * MiB
    max_slots: int = 16
    io_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    timeout: float = 300.0
    starvation_age: float = 5.0
    min_residency: float = 0.0
    eviction: Eviction = "lru"
    local_roots: tuple[Root, ...] = ()
    allow: tuple[Allow, ...] = ()
    hub_endpoint: str | None = None
    hub_cache: HubCache = "read"
    hub_cache_dir: str | os.PathLike[str] | None = None
    offline: bool = False
    verify: Checking = "stream"
    cache_dir: str | os.PathLike[str] | None = None
    cache_bytes: int = 16 * GiB
    connections: int = 16
    revalidate: float = 60.0
    check_finite: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device {self.device!r} is not 'cpu', 'cuda', 'cuda:N' or 'simulated'"
            )
        if str(self.hub_cache) == "write":
            raise ConfigError(
                'hub_cache="write" was removed: what comes from the hub goes to cache_dir. Use'
                ' hub_cache="read", and `hf download` to fill the standard hub cache'
            )
        for name, words in (("eviction", Eviction), ("hub_cache", HubCache), ("verify", Checking)):
            require_one_of(name, getattr(self, name), get_args(words))
        for name in ("check_finite", "spill", "offline"):
            require_bool(name, getattr(self, name))
        if not isinstance(self.limits, Limits):
            raise ConfigError(f"limits must be Limits(…), not {self.limits!r}")
        if not isinstance(self.shard, Shard | None):
            raise ConfigError(f"shard must be Shard(rank, world_size) or None, not {self.shard!r}")
        self._check_numbers()
        settled = {
            "dtype": _dtype_name(self.dtype),
            "local_roots": as_local_roots(self.local_roots),
            "allow": as_allow(self.allow),
            "hub_endpoint": _endpoint(self.hub_endpoint),
            "hub_cache_dir": as_folder_to_be("hub_cache_dir", self.hub_cache_dir),
            "cache_dir": as_folder_to_be("cache_dir", self.cache_dir),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for name in ("device_bytes", "staging_bytes", "cache_bytes"):
            require_positive(name, getattr(self, name))
        for name, most in _MOST.items():
            require_positive(name, getattr(self, name))
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be {most:,} at most, not {getattr(self, name):,}")
        for name in ("host_bytes", "memory_bytes", "pinned_bytes"):
            require_count(name, getattr(self, name), least=0)
        for name in ("timeout", "starvation_age"):
            require_seconds(name, getattr(self, name))
        for name in ("min_residency", "revalidate"):
            if getattr(self, name) != 0 or isinstance(getattr(self, name), bool):
                require_seconds(name, getattr(self, name))

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, or the folder that stands for None, as the environment has it now."""
        return Path(self.cache_dir) if self.cache_dir is not None else _usual_cache_folder()

    @property
    def storage_dtype(self) -> str | None:
        """`dtype` in the file format's spelling ("BF16"), or None for the layout's."""
        return None if self.dtype is None else DTYPES[str(self.dtype)]

    def resolved(self, layout_dtype: str) -> Self:
        """These settings with a dtype: where None was given, the layout's ("BF16")."""
        if self.dtype is not None:
            return self
        name = next(name for name, word in DTYPES.items() if word == layout_dtype)
        return replace(self, dtype=name)

    def seconds(self, timeout: object) -> float:
        """A call's own timeout, or the configured one where it says None."""
        number: Any = self.timeout if timeout is None else timeout
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if plain and 0 <= number <= MAX_SECONDS:
            return float(number)
        raise UsageError(f"a timeout is from 0 to {MAX_SECONDS:g} seconds, not {timeout!r}")


def _dtype_name(dtype: object) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)} or None, not {name!r}")
    return name


def _endpoint(url: object) -> str | None:
    """In its one spelling, without a "/" at the end."""
    if url is None:
        return None
    if not isinstance(url, str):
        raise ConfigError(f"hub_endpoint must be a URL or None, not {url!r}")
    try:
        return parse_folder_url(url).text.removesuffix("/")
    except InvalidAdapterIdError as error:  # the URL may hold a secret: it is not repeated
        raise ConfigError(f"hub_endpoint is not accepted: {error.problem}") from None


def _usual_cache_folder() -> Path:
    """By the XDG base directory specification, which ignores what is not absolute."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError("this process has no home folder; name a cache_dir") from error
    return base / "lorax-async"
