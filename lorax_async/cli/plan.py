"""`lorax-async plan`: compute how many adapters fit, and simulate requests under each policy."""

from __future__ import annotations

import argparse
import csv
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from lorax_async.cli.arguments import (
    OK,
    SIZE_HELP,
    AddParser,
    add_base,
    add_command,
    as_size,
    integer_parser,
    read_layout,
    read_lines,
)
from lorax_async.cli.terminal import Terminal, format_size
from lorax_async.config import DTYPES, MAX_SLOTS, Limits
from lorax_async.errors import ConfigError, LoraxError, shorten
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.safetensors import TensorDescription, parse_header, write_header
from lorax_async.ids import LocalFolder
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.lifecycle.arena import FreeRuns, Kinds, Run, kinds_of
from lorax_async.lifecycle.policies import EVICTION_POLICIES, EvictionPolicy, PolicyName, policy
from lorax_async.lifecycle.residency import reload_cost
from lorax_async.planning.layout import ModelLayout, Module
from lorax_async.planning.transfer_plan import TransferPlan, plan_transfer
from lorax_async.runtime.assembly import MOVE_BYTES
from lorax_async.sources.local import CONFIG, find_adapter, open_weights
from lorax_async.types import AdapterKey

MAX_EXPONENT = 10.0


class ZipfDistribution:
    """Zipf's law: the n-th of `count` items, counted from 1, has weight 1 / n ** exponent.

    Exponent 0 is the uniform distribution. Raises `ConfigError` for a `count` below 1, or an
    exponent that is negative or over 10.
    """

    def __init__(self, count: int, exponent: float) -> None:
        if count < 1 or not 0 <= exponent <= MAX_EXPONENT:
            raise ConfigError(
                f"Zipf's law takes a count of 1 or more and an exponent from 0 to {MAX_EXPONENT:g},"
                f" not {count} and {exponent:g}"
            )
        self._sums = list(accumulate((n + 1) ** -exponent for n in range(count)))

    def pick(self, uniform: float) -> int:
        """Return the index, from 0, for a number drawn uniformly from [0, 1)."""
        sums = self._sums
        return min(bisect_right(sums, uniform * sums[-1]), len(sums) - 1)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Counts of a simulation.

    `hits` found their adapter on the device. `refused` requests name adapters that do not fit an
    empty device. `first_loads` counts distinct loaded adapters. `device_bytes` are copied by all
    loads, `file_bytes` is the size of the files these read.
    """

    requests: int = 0
    hits: int = 0
    refused: int = 0
    loads: int = 0
    first_loads: int = 0
    evictions: int = 0
    device_bytes: int = 0
    file_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """The budget for adapters on a device: bytes, their alignment, and slots."""

    device_bytes: int
    alignment: int
    max_slots: int

    def free(self) -> FreeRuns:
        """Return the empty arena."""
        return FreeRuns.of_whole(self.device_bytes & -self.alignment)


class _SimulatedSlots:
    """The adapters on a device, as `Residency` tracks them but without their extents."""

    def __init__(
        self, capacity: DeviceCapacity, needs: Sequence[GroupSizes], policy: EvictionPolicy
    ) -> None:
        self.policy = policy
        self.keys: dict[int, AdapterKey] = {}
        self.occupied: dict[int, list[Run]] = {}
        self.evictions = 0
        self._needs = needs
        self._free = capacity.free()
        self._total = self._free.nbytes
        self._slots = capacity.max_slots
        self._sizes = {
            id(need): _AdapterSize.of(need, capacity.alignment)
            for need in {id(n): n for n in needs}.values()
        }
        self._positions: dict[AdapterKey, int] = {}

    def load(self, position: int) -> int | None:
        """Load an adapter, evicting others; return its bytes, or None if it can never fit."""
        sizes = self._sizes[id(self._needs[position])]
        if sizes.nbytes > self._total:
            return None
        key = self.keys.get(position) or self._key(position)
        while (runs := self._take(sizes)) is None:
            self._evict()
        self.occupied[position] = runs
        self.policy.admit(key, sizes.nbytes, sizes.cost)
        return sizes.nbytes

    def _take(self, sizes: _AdapterSize) -> list[Run] | None:
        full = len(self.occupied) == self._slots or sizes.nbytes > self._free.nbytes
        return None if full else self._free.take(sizes.kinds)

    def _evict(self) -> None:
        victim = next(self.policy.ranked())
        self._free.give(self.occupied.pop(self._positions[victim]))
        self.policy.remove(victim, evicted=True)
        self.evictions += 1

    def _key(self, position: int) -> AdapterKey:
        key = self.keys[position] = AdapterKey(str(position), ())
        self._positions[key] = position
        return key


class _AdapterSize(NamedTuple):
    """An adapter's extents and bytes on the device, and the cost of its reload."""

    kinds: Kinds
    nbytes: int
    cost: float

    @classmethod
    def of(cls, needs: GroupSizes, alignment: int) -> _AdapterSize:
        kinds = kinds_of(needs.group_nbytes, alignment)
        return cls(kinds, sum(nbytes * count for nbytes, count in kinds), reload_cost(needs))


def simulate(
    requests: Iterable[int],
    needs: Sequence[GroupSizes],
    capacity: DeviceCapacity,
    policy: EvictionPolicy,
) -> SimulationResult:
    """Simulate requests that find their adapter on the device, or evict others and load it.

    Parameters
    ----------
    requests
        Positions in `needs`, in order; each ends before the next begins.
    policy
        A new one; afterwards it ranks the adapters that are on the device.
    """
    slots = _SimulatedSlots(capacity, needs, policy)
    occupied, keys = slots.occupied, slots.keys
    hits = refused = loads = device_bytes = file_bytes = 0
    for position in requests:
        if position in occupied:
            policy.use(keys[position])
            hits += 1
        elif (nbytes := slots.load(position)) is None:
            refused += 1
        else:
            loads += 1
            device_bytes += nbytes
            file_bytes += needs[position].file_nbytes
    return SimulationResult(
        requests=hits + refused + loads,
        hits=hits,
        refused=refused,
        loads=loads,
        first_loads=len(keys),
        evictions=slots.evictions,
        device_bytes=device_bytes,
        file_bytes=file_bytes,
    )


def count_fitting(needs: GroupSizes, capacity: DeviceCapacity) -> int:
    """Count the adapters with these needs that fit an empty device."""
    free, kinds = capacity.free(), kinds_of(needs.group_nbytes, capacity.alignment)
    count = 0
    while count < capacity.max_slots and free.take(kinds) is not None:
        count += 1
    return count


_COUNT_AND_RANK = re.compile(r"([0-9]{1,9})x([0-9]{1,4})")
_INTEGER = re.compile("[0-9]{1,18}")
MAX_ADAPTERS = 10_000_000


class PlanTarget(NamedTuple):
    """The device; `dtype` is in the file format's spelling, or None for the layout's."""

    layout: ModelLayout
    dtype: str | None
    alignment: int
    rank_multiple: int


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """Adapters with equal needs. `rank` is None if only their bytes are known."""

    rank: int | None
    needs: GroupSizes

    @property
    def device_bytes(self) -> int:
        return sum(self.needs.group_nbytes)

    @property
    def file_bytes(self) -> int:
        return self.needs.file_nbytes


@dataclass(slots=True)
class AdapterPool:
    """All adapters by position; `kinds` and `names` are parallel lists."""

    kinds: list[AdapterKind] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, kind: AdapterKind, count: int = 1) -> None:
        """Add `count` adapters of a kind; number their names if there are several."""
        if len(self.names) + count > MAX_ADAPTERS:
            raise ConfigError(f"a plan has at most {MAX_ADAPTERS:,} adapters")
        self.kinds += [kind] * count
        self.names += [name] if count == 1 else [f"{name}/{number}" for number in range(count)]


class MemoryEstimate:
    """The needs of adapters on one device. Blocks while it reads adapters on the disk.

    Parameters
    ----------
    file_dtype
        The dtype of files that are not on the disk, in the file format's spelling.
    targets
        Last parts of the names of the modules that those adapt. Empty: all linear modules of the
        layers.
    """

    def __init__(self, target: PlanTarget, file_dtype: str, targets: Sequence[str]) -> None:
        self._target = target
        self._file_dtype = file_dtype
        self._targets = targets
        self._limits = Limits()
        self.of_rank = lru_cache(maxsize=None)(self._of_rank)
        self.of_bytes = lru_cache(maxsize=None)(self._of_bytes)
        self._planned = lru_cache(maxsize=64)(self._plan)

    def of_folder(self, folder: Path) -> AdapterKind:
        """Return the kind of an adapter on the disk. Raises what a load would raise."""
        try:
            return self._read(folder)
        except LoraxError as error:
            raise error.located(id=str(folder)) from error

    def _read(self, folder: Path) -> AdapterKind:
        key = find_adapter(LocalFolder(str(folder), trusted=True), (), self._limits)
        config = (folder / CONFIG).read_bytes()
        weights = open_weights(key, self._limits)
        try:
            return self._planned(config, weights.prefix, weights.reader.nbytes)
        finally:
            weights.reader.close()

    def _of_rank(self, rank: int) -> AdapterKind:
        """Return the kind of an adapter with this rank on every target."""
        modules = self._modules()
        prefix, places = write_header(_tensors(modules, rank, self._file_dtype))
        names = sorted({module.name.rpartition(".")[2] for module in modules})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
        return self._planned(json.dumps(config).encode(), prefix, places[-1][1])

    def _of_bytes(self, nbytes: int) -> AdapterKind:
        """Return the kind of an adapter of `nbytes`, divided equally among the layers."""
        layers, alignment = self._target.layout.num_layers, self._target.alignment
        if nbytes < 1:
            raise ConfigError(f"an adapter has at least 1 byte, not {nbytes}")
        group = -(-nbytes // layers // alignment) * alignment
        return AdapterKind(None, GroupSizes((max(group, alignment),) * layers, file_nbytes=nbytes))

    def _modules(self) -> list[Module]:
        layout, targets = self._target.layout, self._targets
        modules = [
            module
            for module in layout.modules
            if not module.embedding
            and (
                module.name.rpartition(".")[2] in targets
                if targets
                else 0 <= module.layer < layout.num_layers
            )
        ]
        missing = set(targets) - {module.name.rpartition(".")[2] for module in modules}
        if missing or not modules:
            raise ConfigError(f"the base has no linear modules named {', '.join(sorted(missing))}")
        return modules

    def _plan(self, config: bytes, prefix: bytes, nbytes: int) -> AdapterKind:
        limits, target = self._limits, self._target
        plan: TransferPlan = plan_transfer(
            parse_header(prefix, nbytes, limits),
            parse_config(config, limits),
            target.layout,
            dtype=target.dtype,
            alignment=target.alignment,
            rank_multiple=target.rank_multiple,
            limits=limits,
            staging_move_bytes=MOVE_BYTES,
        )
        return AdapterKind(plan.rank, plan.needs(holdable=False))


def _tensors(modules: Sequence[Module], rank: int, dtype: str) -> Iterator[TensorDescription]:
    for module in modules:
        name = f"base_model.model.{module.name}"
        yield TensorDescription(f"{name}.lora_A.weight", dtype, (rank, module.in_features))
        yield TensorDescription(f"{name}.lora_B.weight", dtype, (module.out_features, rank))


def read_pool(texts: Sequence[str], estimate: MemoryEstimate) -> AdapterPool:
    """Return the adapters of `--adapters`. Raises `ConfigError`, and what a load would raise."""
    pool = AdapterPool()
    for text in texts:
        for name, kind, count in _read_adapters(text, estimate):
            pool.add(name, kind, count)
    return pool


def _read_adapters(text: str, estimate: MemoryEstimate) -> Iterator[tuple[str, AdapterKind, int]]:
    path, generated = Path(text), _COUNT_AND_RANK.fullmatch(text)
    if path.is_dir():
        yield from _read_folder(path, estimate)
    elif path.is_file():
        for row in _read_rows(path):
            yield _parse_row(row, path, estimate)
    elif generated is not None:
        count, rank = int(generated[1]), int(generated[2])
        yield f"r{rank}", estimate.of_rank(rank), count
    else:
        raise ConfigError(f"{shorten(text)!r} is not a folder, a file or COUNTxRANK")


def _read_folder(folder: Path, estimate: MemoryEstimate) -> Iterator[tuple[str, AdapterKind, int]]:
    adapters = [folder] if (folder / CONFIG).exists() else []
    adapters = adapters or sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not adapters:
        raise ConfigError(f"{folder} is not an adapter, and contains none")
    for adapter in adapters:
        yield adapter.resolve().name, estimate.of_folder(adapter), 1


def _read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a JSON list, or the rows of a CSV with a header line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = text.lstrip()[:1] == "["
        rows = json.loads(text) if is_json else list(csv.DictReader(text.splitlines()))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path} is not JSON or CSV in UTF-8: {error}") from None
    if not rows:
        raise ConfigError(f"{path} lists no adapter")
    for row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{path} must list objects, not {shorten(repr(row))}")
        yield row


def _parse_row(
    row: Mapping[str, Any], path: Path, estimate: MemoryEstimate
) -> tuple[str, AdapterKind, int]:
    """Parse a row with `name`, one of `rank`, `bytes` and `path`, and an optional `count`."""
    fields = [word for word in ("rank", "bytes", "path") if row.get(word) not in (None, "")]
    name = row.get("name") or row.get("path")
    if len(fields) != 1 or not isinstance(name, str):
        raise ConfigError(
            f"{path}: an adapter has a name and exactly one of rank, bytes and path, not"
            f" {shorten(json.dumps(dict(row), default=str))}"
        )
    field, count = fields[0], _parse_integer(row.get("count") or 1, "count", path)
    if field == "path":
        kind = estimate.of_folder(path.parent / str(row[field]))
    else:
        kind_of = estimate.of_rank if field == "rank" else estimate.of_bytes
        kind = kind_of(_parse_integer(row[field], field, path))
    return name, kind, count


def _parse_integer(value: object, what: str, path: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not _INTEGER.fullmatch(text) or not int(text):
        raise ConfigError(f"{path}: {what} is an integer of 1 or more, not {shorten(text)!r}")
    return int(text)


SHOWN_KINDS = 20
REQUESTS = 100_000
MAX_REQUESTS = 100_000_000


def add_to(add: AddParser) -> None:
    about = "compute how many adapters fit, and how often they would be found on the device"
    more = (
        "Nothing is loaded: requests are simulated, one after the other, with the loader's own"
        " budgets and each of its eviction policies."
    )
    parser = add_command(add, "plan", about, _plan, more)
    add_base(parser, required=True)
    _add_adapters(parser)
    _add_device(parser)
    _add_requests(parser)


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters",
        nargs="+",
        required=True,
        metavar="DIR|FILE|NxR",
        help="an adapter's folder, a folder of such folders, a JSON or CSV list with a name and a"
        " rank, bytes or path for each, or 10000x16 for 10,000 of rank 16",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules, as q_proj, of adapters that are not on the disk (default: every linear"
        " module of the layers)",
    )
    parser.add_argument(
        "--file-dtype",
        choices=DTYPES,
        help="dtype of files that are not on the disk (default: as on the device)",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device-bytes",
        type=as_size,
        required=True,
        metavar="N",
        help=f"device memory for adapters: {SIZE_HELP}",
    )
    parser.add_argument(
        "--max-slots",
        type=integer_parser(1, MAX_SLOTS),
        default=MAX_SLOTS,
        metavar="N",
        help="adapters on the device at a time (default: as many as fit, up to %(default)s)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="on the device (default: the base's dtype)")


def _add_requests(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--zipf",
        type=float,
        default=1.0,
        metavar="S",
        help="request the n-th most popular in proportion to 1/n^S (default: %(default)s)",
    )
    source.add_argument(
        "--trace", type=Path, metavar="FILE", help="recorded requests: one adapter's name per line"
    )
    parser.add_argument(
        "--requests",
        type=integer_parser(1, MAX_REQUESTS),
        metavar="N",
        help=f"number of requests (default: all of a trace, else {REQUESTS})",
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests per second, to report bytes per second"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def _plan(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise ConfigError(f"--rate must be a positive number, not {arguments.rate:g}")
    target = _target(arguments, terminal)
    with terminal.steps() as report:
        report("reading the adapters")
        file_dtype = DTYPES.get(arguments.file_dtype) or target.dtype or target.layout.dtype
        pool = read_pool(arguments.adapters, MemoryEstimate(target, file_dtype, arguments.targets))
        report("drawing the requests")
        requests = _requests(arguments, pool)
        needs, capacity = [kind.needs for kind in pool.kinds], _capacity(arguments, target)
        results = dict[PolicyName, SimulationResult]()
        for name in EVICTION_POLICIES:
            report(f"simulating {len(requests):,} requests under {name}")
            results[name] = simulate(requests, needs, capacity, policy(name))
    plan = _plan_as_json(arguments, target, pool, len(set(requests)), results)
    if arguments.json:
        terminal.json(plan)
    else:
        _show(plan, terminal)
    return OK


def _target(arguments: argparse.Namespace, terminal: Terminal) -> PlanTarget:
    from lorax_async.devices.cpu import CpuDevice  # noqa: PLC0415 - slow to import, and unused by other commands
    from lorax_async.devices.cuda import CudaDevice  # noqa: PLC0415

    device = CudaDevice if arguments.device == "cuda" else CpuDevice
    layout = read_layout(arguments.base, terminal)
    return PlanTarget(layout, DTYPES.get(arguments.dtype), device.alignment, device.rank_multiple)


def _capacity(arguments: argparse.Namespace, target: PlanTarget) -> DeviceCapacity:
    return DeviceCapacity(arguments.device_bytes, target.alignment, arguments.max_slots)


def _requests(arguments: argparse.Namespace, pool: AdapterPool) -> list[int]:
    if arguments.trace is not None:
        return read_trace(arguments.trace, pool.names, arguments.requests)
    count = arguments.requests or REQUESTS
    return draw_requests(len(pool.names), arguments.zipf, count, arguments.seed)


def read_trace(path: Path, names: Sequence[str], limit: int | None) -> list[int]:
    """Return the positions in `names` of the adapters that the first `limit` lines name.

    Raises `ConfigError` for other names.
    """
    places = {name: position for position, name in enumerate(names)}
    if len(places) < len(names):
        duplicate = next(name for name, count in Counter(names).items() if count > 1)
        raise ConfigError(f"two adapters are named {shorten(duplicate)!r}: the trace is ambiguous")
    requests = list(islice(read_lines(path), limit))
    try:
        return [places[name] for name in requests]
    except KeyError as error:
        raise ConfigError(
            f"{path} names {shorten(str(error.args[0]))!r}, which is not in --adapters"
        ) from None


def draw_requests(count: int, exponent: float, requests: int, seed: int) -> list[int]:
    """Draw positions of `count` adapters by Zipf's law, with popularity in random order."""
    random, popularity = Random(seed), ZipfDistribution(count, exponent)  # noqa: S311 - not for secrets
    order = list(range(count))
    random.shuffle(order)
    return [order[popularity.pick(random.random())] for _ in range(requests)]


def _plan_as_json(
    arguments: argparse.Namespace,
    target: PlanTarget,
    pool: AdapterPool,
    distinct: int,
    results: dict[PolicyName, SimulationResult],
) -> dict[str, Any]:
    return {
        "base": arguments.base,
        "dtype": target.dtype or target.layout.dtype,
        "device_bytes": arguments.device_bytes,
        "adapters": {
            "count": len(pool.kinds),
            "device_bytes": sum(kind.device_bytes for kind in pool.kinds),
            "file_bytes": sum(kind.file_bytes for kind in pool.kinds),
            "kinds": _kinds_as_json(arguments, target, pool.kinds),
        },
        "distinct": distinct,
        "rate": arguments.rate,
        "policies": [
            _result_as_json(name, result, arguments.rate) for name, result in results.items()
        ],
    }


def _kinds_as_json(
    arguments: argparse.Namespace, target: PlanTarget, kinds: Sequence[AdapterKind]
) -> list[dict[str, Any]]:
    """Return the most frequent kinds; `fit` is how many of one kind fit an empty device."""
    counts = Counter(map(id, kinds))
    by_id = {id(kind): kind for kind in kinds}
    rows = []
    for number, count in counts.most_common(SHOWN_KINDS):
        kind = by_id[number]
        rows.append(
            {
                "rank": kind.rank,
                "count": count,
                "device_bytes": kind.device_bytes,
                "file_bytes": kind.file_bytes,
                "fit": count_fitting(kind.needs, _capacity(arguments, target)),
            }
        )
    return rows


def _result_as_json(
    name: PolicyName, result: SimulationResult, rate: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "policy": name,
        "requests": result.requests,
        "hits": result.hits,
        "hit_rate": result.hit_rate,
        "loads": result.loads,
        "first_loads": result.first_loads,
        "evictions": result.evictions,
        "refused": result.refused,
        "device_bytes": result.device_bytes,
        "file_bytes": result.file_bytes,
    }
    if rate is not None and result.requests:
        row["loads_per_second"] = result.loads / result.requests * rate
        row["bytes_per_second"] = result.device_bytes / result.requests * rate
    return row


def _show(plan: dict[str, Any], terminal: Terminal) -> None:
    adapters, rate = plan["adapters"], plan["rate"]
    terminal.say(
        f"{adapters['count']:,} adapters for {format_size(plan['device_bytes'])} of device, as"
        f" {plan['dtype']}",
        "bold",
    )
    columns = ("rank", " adapters", " device, each", " file, each", " of these alone fit")
    terminal.table(columns, [_kind_row(kind) for kind in adapters["kinds"]])
    terminal.pairs(
        [
            ("all on the device", format_size(adapters["device_bytes"])),
            ("all on disk, or in host memory", format_size(adapters["file_bytes"])),
            ("asked for", f"{plan['distinct']:,} of them"),
        ]
    )
    policies = ["policy", " requests", " found there", " loads", " of them first", " evictions"]
    policies += [" to the device", *((" loads/s", " to the device/s") if rate else ())]
    terminal.table(policies, [_policy_row(row) for row in plan["policies"]])
    refused = plan["policies"][0]["refused"]
    if refused:
        terminal.say(f"{refused:,} requests were refused: their adapters do not fit", "bold red")


def _kind_row(kind: dict[str, Any]) -> tuple[str, ...]:
    rank = "?" if kind["rank"] is None else str(kind["rank"])
    sizes = (format_size(kind["device_bytes"]), format_size(kind["file_bytes"]))
    return (rank, f"{kind['count']:,}", *sizes, f"{kind['fit']:,}")


def _policy_row(outcome: dict[str, Any]) -> tuple[str, ...]:
    row = (
        outcome["policy"],
        f"{outcome['requests']:,}",
        f"{outcome['hit_rate']:.1%}",
        *(f"{outcome[name]:,}" for name in ("loads", "first_loads", "evictions")),
        format_size(outcome["device_bytes"]),
    )
    if "bytes_per_second" in outcome:
        row += (
            f"{outcome['loads_per_second']:.1f}",
            format_size(round(outcome["bytes_per_second"])),
        )
    return row
