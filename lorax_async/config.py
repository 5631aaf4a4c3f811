"""The settings of a loader: frozen, checked at construction, with defaults for a laptop."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from lorax_async.errors import ConfigError, UsageError, shorten

MAX_SECONDS = 1e9
"""The longest wait: what locks, event loops and their C clocks can all count to."""

MAX_SLOTS = 65_536
"""A slot is a column of the device's tables, with 24 bytes for every module of the base."""

MAX_THREADS = 256

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

Eviction = Literal["lru", "lfu", "gdsf"]
"""Who makes room."""

Verify = Literal["none", "stream", "before_use"]
"""What is waited for before bytes are used."""

_DEVICE = re.compile(r"cpu|simulated|cuda(:(0|[1-9][0-9]?))?")

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes an adapter can have on a device, by torch's name, with the file format's word."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a stranger's adapter is accepted. Bytes, or counts."""

    max_header_bytes: int = 16 * MiB
    max_tensors: int = 65_536
    max_name_bytes: int = 512
    max_dimensions: int = 8
    max_json_depth: int = 16
    max_config_bytes: int = 256 * KiB
    max_rank: int = 256
    max_adapter_bytes: int = 4 * GiB

    def __post_init__(self) -> None:
        for entry in fields(self):
            _require_positive(entry.name, getattr(self, entry.name))


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
        if not isinstance(self.immutable, bool):
            raise ConfigError(f"immutable must be True or False, not {self.immutable!r}")
        object.__setattr__(self, "path", _folder(os.fsdecode(self.path)))


Root = str | os.PathLike[str] | LocalRoot
"""What names a local root: a plain path says nothing of how its files change."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of the `world_size` parts of every tensor-parallel module a loader holds: the `rank`th.

    Raises `ConfigError` unless 0 <= rank < world_size.
    """

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        _require_positive("world_size", self.world_size)
        _require_count("rank", self.rank, least=0)
        if self.rank >= self.world_size:
            raise ConfigError(
                f"rank {self.rank} is outside 0 … {self.world_size - 1}: a world of"
                f" {self.world_size} counts its ranks from 0"
            )


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
        Budget of adapters that were given as tensors: copies in host memory, kept until they are
        unloaded or replaced.
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
    check_finite
        Refuse adapters with NaN or infinite weights (reads every byte once more, off the loop).
    verify
        What a load waits for: with "stream" a layer is used when its bytes are here, and the digest
        of all of them follows; with "before_use" it comes first, of local files, too; "none"
        compares none but a call's own.
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
    pinned_bytes: int = 0
    staging_bytes: int = 16 * MiB
    max_slots: int = 16
    io_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    timeout: float = 300.0
    starvation_age: float = 5.0
    min_residency: float = 0.0
    eviction: Eviction = "lru"
    local_roots: tuple[Root, ...] = ()
    check_finite: bool = False
    verify: Verify = "stream"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device {self.device!r} is not 'cpu', 'cuda', 'cuda:N' or 'simulated'"
            )
        if self.eviction not in get_args(Eviction):
            raise ConfigError(f"eviction must be one of {', '.join(get_args(Eviction))}")
        if self.verify not in get_args(Verify):
            raise ConfigError(f"verify must be one of {', '.join(get_args(Verify))}")
        if not isinstance(self.check_finite, bool):
            raise ConfigError(f"check_finite must be True or False, not {self.check_finite!r}")
        if not isinstance(self.limits, Limits):
            raise ConfigError(f"limits must be Limits(…), not {self.limits!r}")
        if not isinstance(self.shard, Shard | None):
            raise ConfigError(f"shard must be Shard(rank, world_size) or None, not {self.shard!r}")
        self._check_numbers()
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        object.__setattr__(self, "local_roots", as_local_roots(self.local_roots))

    def _check_numbers(self) -> None:
        for name in ("device_bytes", "staging_bytes", "max_slots", "io_threads"):
            _require_positive(name, getattr(self, name))
        for name in ("host_bytes", "memory_bytes", "pinned_bytes"):
            _require_count(name, getattr(self, name), least=0)
        for name, most in (("max_slots", MAX_SLOTS), ("io_threads", MAX_THREADS)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be {most:,} at most, not {getattr(self, name):,}")
        for name in ("timeout", "starvation_age"):
            _require_seconds(name, getattr(self, name))
        if self.min_residency != 0 or isinstance(self.min_residency, bool):
            _require_seconds("min_residency", self.min_residency)

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


def _require_positive(name: str, value: object) -> None:
    _require_count(name, value, least=1)


def _require_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise ConfigError(f"{name} must be {kind}, not {value!r}")


def _require_seconds(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not 0 < number <= MAX_SECONDS:
        raise ConfigError(
            f"{name} must be a positive number of seconds up to {MAX_SECONDS:g}, not {value!r}"
        )


def _dtype_name(dtype: object) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)} or None, not {name!r}")
    return name


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
