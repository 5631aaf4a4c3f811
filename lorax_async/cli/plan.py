"""`lorax-async plan`: how many adapters fit, and what a budget makes of their requests."""

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
    layout_of,
    lines_of,
    number_from,
)
from lorax_async.cli.terminal import Terminal, size
from lorax_async.config import DTYPES, MAX_SLOTS, Limits
from lorax_async.errors import ConfigError, LoraxError, shorten
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.safetensors import TensorDescription, parse_header, write_header
from lorax_async.ids.parsing import parse_place
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.lifecycle.arena import FreeRuns, Kinds, Run, kinds_of
from lorax_async.lifecycle.policies import EVICTION_POLICIES, EvictionPolicy, PolicyName, policy
from lorax_async.lifecycle.residency import reload_cost
from lorax_async.planning.layout import ModelLayout, Module
from lorax_async.planning.transfer_plan import TransferPlan, plan_transfer
from lorax_async.runtime.assembly import MOVE_BYTES
from lorax_async.sources.local_folder import CONFIG, find_adapter
from lorax_async.sources.local_weights import open_weights
from lorax_async.types import AdapterKey, AdapterRef

MOST_EXPONENT = 10.0


class ZipfDistribution:
    """The n-th of `count`, counted from 1, is asked for in proportion to 1 / n ** exponent.

    0 asks for all alike. Raises `ConfigError` where there is nobody, or for an exponent that is
    negative or over 10.
    """

    def __init__(self, count: int, exponent: float) -> None:
        if count < 1 or not 0 <= exponent <= MOST_EXPONENT:
            raise ConfigError(
                f"Zipf's law is for 1 or more and an exponent from 0 to {MOST_EXPONENT:g}, not for"
                f" {count} and {exponent:g}"
            )
        self._sums = list(accumulate((n + 1) ** -exponent for n in range(count)))

    def pick(self, uniform: float) -> int:
        """Who it is, from 0 on, for a number drawn evenly from [0, 1)."""
        sums = self._sums
        return min(bisect_right(sums, uniform * sums[-1]), len(sums) - 1)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """How often an adapter was on the device when it was asked for, and what moved where not.

    `refused` requests ask for what does not fit an empty device. `first_loads` are the loads of
    adapters that were not loaded before. `device_bytes` are copied by all loads, `file_bytes` are
    those of the files they come from.
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
    """What adapters have on a device: its bytes, which are aligned, and its slots."""

    device_bytes: int
    alignment: int
    max_slots: int

    def free(self) -> FreeRuns:
        """All of it."""
        return FreeRuns.of_whole(self.device_bytes & -self.alignment)


class _SimulatedSlots:
    """What `Residency` holds, without where each layer group lies."""

    def __init__(
        self, room: DeviceCapacity, needs: Sequence[GroupSizes], policy: EvictionPolicy
    ) -> None:
        self.policy = policy
        self.keys: dict[int, AdapterKey] = {}
        self.held: dict[int, list[Run]] = {}
        self.evictions = 0
        self._needs = needs
        self._free = room.free()
        self._whole = self._free.nbytes
        self._slots = room.max_slots
        self._sizes = {
            id(need): _AdapterSize.of(need, room.alignment)
            for need in {id(n): n for n in needs}.values()
        }
        self._positions: dict[AdapterKey, int] = {}

    def load(self, position: int) -> int | None:
        """The bytes of this one, which is not held, once there is room; None if there never is."""
        sizes = self._sizes[id(self._needs[position])]
        if sizes.nbytes > self._whole:
            return None
        key = self.keys.get(position) or self._key(position)
        while (runs := self._taken(sizes)) is None:
            self._evict()
        self.held[position] = runs
        self.policy.admit(key, sizes.nbytes, sizes.cost)
        return sizes.nbytes

    def _taken(self, sizes: _AdapterSize) -> list[Run] | None:
        full = len(self.held) == self._slots or sizes.nbytes > self._free.nbytes
        return None if full else self._free.take(sizes.kinds)

    def _evict(self) -> None:
        victim = next(self.policy.ranked())
        self._free.give(self.held.pop(self._positions[victim]))
        self.policy.remove(victim, evicted=True)
        self.evictions += 1

    def _key(self, position: int) -> AdapterKey:
        key = self.keys[position] = AdapterKey(str(position), ())
        self._positions[key] = position
        return key


class _AdapterSize(NamedTuple):
    """What one adapter takes, and what its reload costs."""

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
    room: DeviceCapacity,
    policy: EvictionPolicy,
) -> SimulationResult:
    """Let each request find its adapter on the device, or make room and load it.

    Parameters
    ----------
    requests
        Positions in `needs`, in the order in which they come; each is through before the next.
    policy
        Of nobody yet; it ranks those that are on the device afterwards.
    """
    residents = _SimulatedSlots(room, needs, policy)
    held, keys = residents.held, residents.keys
    hits = refused = loads = device_bytes = file_bytes = 0
    for position in requests:
        if position in held:
            policy.use(keys[position])
            hits += 1
        elif (nbytes := residents.load(position)) is None:
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
        evictions=residents.evictions,
        device_bytes=device_bytes,
        file_bytes=file_bytes,
    )


def fitting(needs: GroupSizes, room: DeviceCapacity) -> int:
    """How many adapters of this kind an empty device holds."""
    free, kinds = room.free(), kinds_of(needs.group_nbytes, room.alignment)
    count = 0
    while count < room.max_slots and free.take(kinds) is not None:
        count += 1
    return count


_MANY = re.compile(r"([0-9]{1,9})x([0-9]{1,4})")
_NUMBER = re.compile("[0-9]{1,18}")
MOST = 10_000_000


class PlanTarget(NamedTuple):
    """Where they are to go: `dtype` as the file format spells it, None for the layout's."""

    layout: ModelLayout
    dtype: str | None
    alignment: int
    rank_multiple: int


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """Adapters that need the same. `rank` is None where only bytes are known."""

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
    """The adapters, each by its position; `kinds` and `names` are equally long."""

    kinds: list[AdapterKind] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, kind: AdapterKind, count: int = 1) -> None:
        """So many of a kind; where they are several each has its number."""
        if len(self.names) + count > MOST:
            raise ConfigError(f"a plan is for {MOST:,} adapters at most")
        self.kinds += [kind] * count
        self.names += [name] if count == 1 else [f"{name}/{number}" for number in range(count)]


class MemoryEstimate:
    """What adapters need of one device. Blocks where they are on the disk.

    Parameters
    ----------
    file_dtype
        Of the files of adapters that are not on the disk, in the file format's spelling.
    targets
        The last parts of the names of the modules that those adapt; empty: all that are linear and
        in the layers.
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
        """Of an adapter on the disk, as a load would find it. Raises what a load would raise."""
        try:
            return self._found(folder)
        except LoraxError as error:
            raise error.located(id=str(folder)) from error

    def _found(self, folder: Path) -> AdapterKind:
        key = find_adapter(parse_place(AdapterRef(folder), ()), (), self._limits)
        config = (folder / CONFIG).read_bytes()
        weights = open_weights(key, self._limits)
        try:
            return self._planned(config, weights.prefix, weights.reader.nbytes)
        finally:
            weights.reader.close()

    def _of_rank(self, rank: int) -> AdapterKind:
        """Of an adapter with this rank on every module that is adapted."""
        modules = self._modules()
        prefix, places = write_header(_tensors(modules, rank, self._file_dtype))
        names = sorted({module.name.rpartition(".")[2] for module in modules})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
        return self._planned(json.dumps(config).encode(), prefix, places[-1][1])

    def _of_bytes(self, nbytes: int) -> AdapterKind:
        """Of one whose bytes are all that is known: in equal parts, one for each layer."""
        layers, alignment = self._target.layout.num_layers, self._target.alignment
        if nbytes < 1:
            raise ConfigError(f"an adapter has 1 byte or more, not {nbytes}")
        group = -(-nbytes // layers // alignment) * alignment
        return AdapterKind(None, GroupSizes((max(group, alignment),) * layers, file_nbytes=nbytes))

    def _modules(self) -> list[Module]:
        layout, targets = self._target.layout, self._targets
        found = [
            module
            for module in layout.modules
            if not module.embedding
            and (
                module.name.rpartition(".")[2] in targets
                if targets
                else 0 <= module.layer < layout.num_layers
            )
        ]
        missing = set(targets) - {module.name.rpartition(".")[2] for module in found}
        if missing or not found:
            raise ConfigError(f"the base has no linear modules called {', '.join(sorted(missing))}")
        return found

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


def read_pool(given: Sequence[str], estimate: MemoryEstimate) -> AdapterPool:
    """The adapters of `--adapters`. Raises `ConfigError`, and what a load of one would raise."""
    pool = AdapterPool()
    for text in given:
        for name, kind, count in _adapters(text, estimate):
            pool.add(name, kind, count)
    return pool


def _adapters(text: str, estimate: MemoryEstimate) -> Iterator[tuple[str, AdapterKind, int]]:
    path, many = Path(text), _MANY.fullmatch(text)
    if path.is_dir():
        yield from _below(path, estimate)
    elif path.is_file():
        for row in _rows(path):
            yield _listed(row, path, estimate)
    elif many is not None:
        yield f"r{int(many[2])}", estimate.of_rank(int(many[2])), int(many[1])
    else:
        raise ConfigError(f"{shorten(text)!r} is no folder, no file, and not as 10000x16")


def _below(folder: Path, estimate: MemoryEstimate) -> Iterator[tuple[str, AdapterKind, int]]:
    found = [folder] if (folder / CONFIG).exists() else []
    found = found or sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise ConfigError(f"{folder} is no adapter, and holds none")
    for each in found:
        yield each.resolve().name, estimate.of_folder(each), 1


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Of a JSON list of objects, or of a CSV with a line of names."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = text.lstrip()[:1] == "["
        rows = json.loads(text) if is_json else list(csv.DictReader(text.splitlines()))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path} is no JSON or CSV in UTF-8: {error}") from None
    if not rows:
        raise ConfigError(f"{path} lists no adapter")
    for row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{path} is a list of objects, and {shorten(repr(row))} is none")
        yield row


def _listed(
    row: Mapping[str, Any], path: Path, estimate: MemoryEstimate
) -> tuple[str, AdapterKind, int]:
    """One row: `name`, and one of `rank`, `bytes` and `path`; maybe `count`."""
    said = [word for word in ("rank", "bytes", "path") if row.get(word) not in (None, "")]
    name = row.get("name") or row.get("path")
    if len(said) != 1 or not isinstance(name, str):
        raise ConfigError(
            f"{path}: an adapter has a name, and one of rank, bytes and path, not"
            f" {shorten(json.dumps(dict(row), default=str))}"
        )
    word, count = said[0], _number(row.get("count") or 1, "count", path)
    if word == "path":
        kind = estimate.of_folder(path.parent / str(row[word]))
    else:
        reckon = estimate.of_rank if word == "rank" else estimate.of_bytes
        kind = reckon(_number(row[word], word, path))
    return name, kind, count


def _number(value: object, what: str, path: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not _NUMBER.fullmatch(text) or not int(text):
        raise ConfigError(f"{path}: {what} is a whole number of 1 or more, not {shorten(text)!r}")
    return int(text)


SHOWN_KINDS = 20
REQUESTS = 100_000
MOST_REQUESTS = 100_000_000


def add_to(add: AddParser) -> None:
    about = "say how many adapters fit, and how often they would be found on the device"
    more = (
        "Nothing is loaded: the loader's own budgets are asked, one request after the other, under"
        " each eviction policy."
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
        " rank, bytes or path for each, or 10000x16 for so many of rank 16",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="what adapters that are not on the disk adapt, as q_proj (default: every linear module"
        " of the layers)",
    )
    parser.add_argument(
        "--file-dtype", choices=DTYPES, help="of their files (default: as on the device)"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device-bytes",
        type=as_size,
        required=True,
        metavar="N",
        help=f"the room for adapters: {SIZE_HELP}",
    )
    parser.add_argument(
        "--max-slots",
        type=number_from(1, MAX_SLOTS),
        default=MAX_SLOTS,
        metavar="N",
        help="adapters on the device at a time (default: as many as fit, up to %(default)s)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="stored as (default: the base's dtype)")


def _add_requests(parser: argparse.ArgumentParser) -> None:
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--zipf",
        type=float,
        default=1.0,
        metavar="S",
        help="the n-th most popular is asked for in proportion to 1/n^S (default: %(default)s)",
    )
    asked.add_argument(
        "--trace", type=Path, metavar="FILE", help="recorded requests: an adapter's name a line"
    )
    parser.add_argument(
        "--requests",
        type=number_from(1, MOST_REQUESTS),
        metavar="N",
        help=f"how many (default: all of a trace, else {REQUESTS})",
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests per second, to tell bytes per second"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def _plan(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise ConfigError(f"--rate is more than 0, not {arguments.rate:g}")
    target = _target(arguments, terminal)
    with terminal.steps() as report:
        report("reading the adapters")
        file_dtype = DTYPES.get(arguments.file_dtype) or target.dtype or target.layout.dtype
        pool = read_pool(arguments.adapters, MemoryEstimate(target, file_dtype, arguments.targets))
        report("drawing the requests")
        asked = _asked(arguments, pool)
        needs, room = [kind.needs for kind in pool.kinds], _room(arguments, target)
        found = dict[PolicyName, SimulationResult]()
        for name in EVICTION_POLICIES:
            report(f"playing {len(asked):,} requests under {name}")
            found[name] = simulate(asked, needs, room, policy(name))
    told = _told(arguments, target, pool, len(set(asked)), found)
    if arguments.json:
        terminal.json(told)
    else:
        _show(told, terminal)
    return OK


def _target(arguments: argparse.Namespace, terminal: Terminal) -> PlanTarget:
    from lorax_async.devices.cpu import CpuDevice  # noqa: PLC0415 - heavy, and not for the others
    from lorax_async.devices.cuda import CudaDevice  # noqa: PLC0415

    device = CudaDevice if arguments.device == "cuda" else CpuDevice
    layout = layout_of(arguments.base, terminal)
    return PlanTarget(layout, DTYPES.get(arguments.dtype), device.alignment, device.rank_multiple)


def _room(arguments: argparse.Namespace, target: PlanTarget) -> DeviceCapacity:
    return DeviceCapacity(arguments.device_bytes, target.alignment, arguments.max_slots)


def _asked(arguments: argparse.Namespace, pool: AdapterPool) -> list[int]:
    if arguments.trace is not None:
        return read_trace(arguments.trace, pool.names, arguments.requests)
    return draw(len(pool.names), arguments.zipf, arguments.requests or REQUESTS, arguments.seed)


def read_trace(path: Path, names: Sequence[str], most: int | None) -> list[int]:
    """Positions of the adapters that the lines name. Raises `ConfigError` for one that is none."""
    places = {name: position for position, name in enumerate(names)}
    if len(places) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ConfigError(f"two adapters are called {shorten(twice)!r}: a trace would mean either")
    asked = list(islice(lines_of(path), most))
    try:
        return [places[name] for name in asked]
    except KeyError as error:
        raise ConfigError(
            f"{path} names {shorten(str(error.args[0]))!r}, which --adapters has not"
        ) from None


def draw(count: int, exponent: float, requests: int, seed: int) -> list[int]:
    """Positions of `count` adapters by Zipf's law; who is popular has nothing to do with order."""
    random, popularity = Random(seed), ZipfDistribution(count, exponent)  # noqa: S311 - no secret
    order = list(range(count))
    random.shuffle(order)
    return [order[popularity.pick(random.random())] for _ in range(requests)]


def _told(
    arguments: argparse.Namespace,
    target: PlanTarget,
    pool: AdapterPool,
    distinct: int,
    found: dict[PolicyName, SimulationResult],
) -> dict[str, Any]:
    return {
        "base": arguments.base,
        "dtype": target.dtype or target.layout.dtype,
        "device_bytes": arguments.device_bytes,
        "adapters": {
            "count": len(pool.kinds),
            "device_bytes": sum(kind.device_bytes for kind in pool.kinds),
            "file_bytes": sum(kind.file_bytes for kind in pool.kinds),
            "kinds": _kinds(arguments, target, pool.kinds),
        },
        "distinct": distinct,
        "rate": arguments.rate,
        "policies": [_outcome(name, each, arguments.rate) for name, each in found.items()],
    }


def _kinds(
    arguments: argparse.Namespace, target: PlanTarget, kinds: Sequence[AdapterKind]
) -> list[dict[str, Any]]:
    """Each that has other needs, the most frequent first; `fit` is how many, alone."""
    counts = Counter(map(id, kinds))
    by_id = {id(kind): kind for kind in kinds}
    told = []
    for number, count in counts.most_common(SHOWN_KINDS):
        kind = by_id[number]
        told.append(
            {
                "rank": kind.rank,
                "count": count,
                "device_bytes": kind.device_bytes,
                "file_bytes": kind.file_bytes,
                "fit": fitting(kind.needs, _room(arguments, target)),
            }
        )
    return told


def _outcome(name: PolicyName, found: SimulationResult, rate: float | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "policy": name,
        "requests": found.requests,
        "hits": found.hits,
        "hit_rate": found.hit_rate,
        "loads": found.loads,
        "first_loads": found.first_loads,
        "evictions": found.evictions,
        "refused": found.refused,
        "device_bytes": found.device_bytes,
        "file_bytes": found.file_bytes,
    }
    if rate is not None and found.requests:
        told["loads_per_second"] = found.loads / found.requests * rate
        told["bytes_per_second"] = found.device_bytes / found.requests * rate
    return told


def _show(told: dict[str, Any], terminal: Terminal) -> None:
    adapters, rate = told["adapters"], told["rate"]
    terminal.say(
        f"{adapters['count']:,} adapters for {size(told['device_bytes'])} of device, as"
        f" {told['dtype']}",
        "bold",
    )
    columns = ("rank", " adapters", " device, each", " file, each", " of these alone fit")
    terminal.table(columns, [_kind_row(kind) for kind in adapters["kinds"]])
    terminal.pairs(
        [
            ("all on the device", size(adapters["device_bytes"])),
            ("all on disk, or in host memory", size(adapters["file_bytes"])),
            ("asked for", f"{told['distinct']:,} of them"),
        ]
    )
    policies = ["policy", " requests", " found there", " loads", " of them first", " evictions"]
    policies += [" to the device", *((" loads/s", " to the device/s") if rate else ())]
    terminal.table(policies, [_policy_row(each) for each in told["policies"]])
    refused = told["policies"][0]["refused"]
    if refused:
        terminal.say(f"{refused:,} requests were refused: their adapters do not fit", "bold red")


def _kind_row(kind: dict[str, Any]) -> tuple[str, ...]:
    rank = "?" if kind["rank"] is None else str(kind["rank"])
    each = (size(kind["device_bytes"]), size(kind["file_bytes"]))
    return (rank, f"{kind['count']:,}", *each, f"{kind['fit']:,}")


def _policy_row(each: dict[str, Any]) -> tuple[str, ...]:
    row = (
        each["policy"],
        f"{each['requests']:,}",
        f"{each['hit_rate']:.1%}",
        *(f"{each[name]:,}" for name in ("loads", "first_loads", "evictions")),
        size(each["device_bytes"]),
    )
    if "bytes_per_second" in each:
        row += (f"{each['loads_per_second']:.1f}", size(round(each["bytes_per_second"])))
    return row
