"""Simulate requests to one device or to a fleet of replicas; docs/capacity.md shows the output.

    python benchmarks/simulate_capacity.py --base smollm2 --adapters 10000x16 --device-bytes 1GiB

Nothing is loaded. Requests come one after the other, to the loader's own budgets, eviction policies
and router; the adapters are estimated as `lorax-async plan` does.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from lorax_async.cli.command_line import Terminal, as_size, format_size, integer_parser
from lorax_async.cli.memory_estimate import AdapterKind, MemoryEstimate
from lorax_async.cli.plan import add_estimate_options, estimate_for, plan_as_json, show_plan
from lorax_async.engines.ray.routing import MAX_IDS, ReplicaResidency, RoutingPolicy
from lorax_async.errors import ConfigError, LoraxError, shorten
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.lifecycle.arena import FreeRuns, Kinds, Run, kinds_of
from lorax_async.lifecycle.policies import EVICTION_POLICIES, EvictionPolicy, PolicyName, policy
from lorax_async.lifecycle.residency import reload_cost
from lorax_async.types import AdapterKey

MAX_EXPONENT = 10.0
REQUESTS = 100_000
MAX_REQUESTS = 100_000_000
MAX_REPLICAS = 10_000
MAX_ADAPTERS = 10_000_000


# -- adapters and requests ------------------------------------------------------------------------

_INTEGER = re.compile("[0-9]{1,18}")


def read_adapters(
    texts: Sequence[str], estimate: MemoryEstimate
) -> tuple[list[str], list[AdapterKind]]:
    """Return names and kinds of all adapters of `--adapters`; several of a kind are numbered.

    Raises `ConfigError`, and what a load would raise.
    """
    names, kinds = list[str](), list[AdapterKind]()
    for text in texts:
        for name, kind, count in _read_adapters(text, estimate):
            if len(names) + count > MAX_ADAPTERS:
                raise ConfigError(f"a simulation has at most {MAX_ADAPTERS:,} adapters")
            names += [name] if count == 1 else [f"{name}/{number}" for number in range(count)]
            kinds += [kind] * count
    return names, kinds


def _read_adapters(text: str, estimate: MemoryEstimate) -> Iterator[tuple[str, AdapterKind, int]]:
    path = Path(text)
    if path.is_file():
        for row in _read_rows(path):
            yield _parse_row(row, path, estimate)
    else:
        yield from estimate.of_text(text)


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
    count = _parse_integer(row.get("count") or 1, "count", path)
    if fields == ["path"]:
        return name, estimate.of_folder(path.parent / str(row["path"])), count
    value = _parse_integer(row[fields[0]], fields[0], path)
    kind = estimate.of_rank(value) if fields == ["rank"] else kind_of_bytes(value, estimate)
    return name, kind, count


def _parse_integer(value: object, what: str, path: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not _INTEGER.fullmatch(text) or not int(text):
        raise ConfigError(f"{path}: {what} is an integer of 1 or more, not {shorten(text)!r}")
    return int(text)


def kind_of_bytes(nbytes: int, estimate: MemoryEstimate) -> AdapterKind:
    """Return the kind of an adapter of `nbytes`, divided equally among the layers."""
    layers, alignment = estimate.layout.num_layers, estimate.device.alignment
    group = max(-(-nbytes // layers // alignment) * alignment, alignment)
    return AdapterKind(None, GroupSizes((group,) * layers, file_nbytes=nbytes))


def read_requests(path: Path, names: Sequence[str], limit: int | None) -> list[int]:
    """Return the positions in `names` of the adapters that the first `limit` lines name.

    Raises `ConfigError` for other names.
    """
    places = {name: position for position, name in enumerate(names)}
    if len(places) < len(names):
        duplicate = next(name for name, count in Counter(names).items() if count > 1)
        raise ConfigError(f"two adapters are named {shorten(duplicate)!r}: the trace is ambiguous")
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = (line.strip() for line in file if line.strip())
            return [places[name] for name in islice(lines, limit)]
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except KeyError as error:
        raise ConfigError(
            f"{path} names {shorten(str(error.args[0]))!r}, which is not in --adapters"
        ) from None


def draw_requests(count: int, exponent: float, requests: int, seed: int) -> list[int]:
    """Draw positions of `count` adapters by Zipf's law, with popularity in random order.

    The n-th most popular has weight 1 / n ** exponent; exponent 0 is the uniform distribution.
    """
    if count < 1 or not 0 <= exponent <= MAX_EXPONENT:
        raise ConfigError(
            f"Zipf's law takes a count of 1 or more and an exponent from 0 to {MAX_EXPONENT:g},"
            f" not {count} and {exponent:g}"
        )
    random, order = Random(seed), list(range(count))
    random.shuffle(order)
    sums = list(accumulate((n + 1) ** -exponent for n in range(count)))
    return random.choices(order, cum_weights=sums, k=requests)


# -- a device -------------------------------------------------------------------------------------


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


class DeviceCapacity(NamedTuple):
    """The budget for adapters on a device: bytes, their alignment, and slots."""

    device_bytes: int
    alignment: int
    max_slots: int

    def free(self) -> FreeRuns:
        """Return the empty arena."""
        return FreeRuns.of_whole(self.device_bytes & -self.alignment)


class DeviceContents:
    """The adapters on one simulated device, by their positions in `needs`.

    Evicts and loads as `Residency`, whose arena it uses without the extents of each group. `policy`
    is a new one, which ranks the adapters on the device afterwards. Devices of a fleet share
    `keys`, which has a key for each adapter that was ever loaded.
    """

    def __init__(
        self,
        needs: Sequence[GroupSizes],
        capacity: DeviceCapacity,
        policy: EvictionPolicy,
        keys: dict[int, AdapterKey],
    ) -> None:
        self._needs = needs
        self._capacity = capacity
        self._policy = policy
        self._keys = keys
        self._free = capacity.free()
        self._total = self._free.nbytes
        self._kinds: dict[int, Kinds] = {}
        self.occupied: dict[AdapterKey, list[Run]] = {}
        self.evictions = self.device_bytes = self.file_bytes = 0

    def use(self, position: int) -> bool:
        """Count a request; return whether it finds its adapter on the device."""
        key = self._keys.get(position)
        if key not in self.occupied:
            return False
        self._policy.use(key)
        return True

    def load(self, position: int) -> bool:
        """Load an adapter; return whether it fits an empty device."""
        need, capacity, free, policy = (
            self._needs[position],
            self._capacity,
            self._free,
            self._policy,
        )
        kinds = self._kinds.get(id(need))
        if kinds is None:
            kinds = self._kinds[id(need)] = kinds_of(need.group_nbytes, capacity.alignment)
        nbytes = sum(size * count for size, count in kinds)
        if nbytes > self._total:
            return False
        key = self._keys.get(position)
        if key is None:
            key = self._keys[position] = AdapterKey(str(position), ())
        while (
            len(self.occupied) == capacity.max_slots
            or nbytes > free.nbytes
            or (runs := free.take(kinds)) is None
        ):
            victim = next(policy.ranked())
            free.give(self.occupied.pop(victim))
            policy.remove(victim, evicted=True)
            self.evictions += 1
        self.occupied[key] = runs
        policy.admit(key, nbytes, reload_cost(need))
        self.device_bytes += nbytes
        self.file_bytes += need.file_nbytes
        return True


def simulate(
    requests: Iterable[int],
    needs: Sequence[GroupSizes],
    capacity: DeviceCapacity,
    policy: EvictionPolicy,
) -> SimulationResult:
    """Simulate requests that find their adapter on the device, or evict others and load it.

    Requests are positions in `needs`; each ends before the next begins. `policy` is a new one.
    """
    keys: dict[int, AdapterKey] = {}
    device = DeviceContents(needs, capacity, policy, keys)
    hits = refused = loads = 0
    for position in requests:
        if device.use(position):
            hits += 1
        elif device.load(position):
            loads += 1
        else:
            refused += 1
    return SimulationResult(
        requests=hits + refused + loads,
        hits=hits,
        refused=refused,
        loads=loads,
        first_loads=len(keys),
        evictions=device.evictions,
        device_bytes=device.device_bytes,
        file_bytes=device.file_bytes,
    )


# -- a fleet --------------------------------------------------------------------------------------

PUBLISHED_AFTER = 100
"""Requests of a replica after which it publishes what it has: 10 s at 10 requests per second."""

Routing = Literal["adapters", "hash", "random"]
"""`RoutingPolicy`; consistent hashing alone; or any replica, as Ray's default while none queues."""


@dataclass(slots=True, kw_only=True)
class FleetResult:
    """Counts of a simulation.

    `hits` found their adapter on the device of their replica. `refused` requests name adapters that
    do not fit an empty device. Of the requests whose adapter some replica `had`, `affine` went to
    one that had it. A replica that does not have it fetches it: of these `fetches`, `repeated` are
    of adapters that the fleet has fetched before. `busiest` is the most requests of a replica, as a
    multiple of the mean.
    """

    routing: Routing
    requests: int = 0
    hits: int = 0
    refused: int = 0
    had: int = 0
    affine: int = 0
    fetches: int = 0
    repeated: int = 0
    fetched_bytes: int = 0
    busiest: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Affinity, and the share of requests that waited for a load."""
        cold = self.requests - self.hits - self.refused
        return {
            "affinity": self.affine / self.had if self.had else 1.0,
            "cold": cold / self.requests if self.requests else 0.0,
        }


@dataclass(slots=True, eq=False)
class SimulatedReplica:
    """What a replica has on its device, and on its disk, the least recently used first."""

    device: DeviceContents
    disk: OrderedDict[int, None] = field(default_factory=OrderedDict)
    disk_bytes: int = 0
    requests: int = 0


class SimulatedFleet:
    """Replicas that serve one request after the other. Requests are positions in `needs`."""

    def __init__(
        self,
        names: Sequence[str],
        needs: Sequence[GroupSizes],
        capacity: DeviceCapacity,
        cache_bytes: int,
        result: FleetResult,
    ) -> None:
        self.replicas: dict[str, SimulatedReplica] = {}
        self.result = result
        self.router = RoutingPolicy()
        self._names = names
        self._needs = needs
        self._capacity = capacity
        self._cache_bytes = cache_bytes
        self._keys: dict[int, AdapterKey] = {}
        self._holders: Counter[int] = Counter()
        self._fetched: set[int] = set()
        self._made = 0

    def add(self, count: int) -> None:
        """Let empty replicas join."""
        for _ in range(count):
            device = DeviceContents(self._needs, self._capacity, policy("lru"), self._keys)
            self.replicas[f"replica {self._made}"] = SimulatedReplica(device)
            self._made += 1
        self.router.set_replicas(self.replicas)

    def lose(self, name: str) -> None:
        """Let a replica die with all that it has."""
        self._holders.subtract(self.replicas.pop(name).disk.keys())
        self.router.set_replicas(self.replicas)

    def serve(self, name: str, position: int) -> None:
        """Serve a request at a replica, and count it."""
        replica, result = self.replicas[name], self.result
        replica.requests += 1
        has = position in replica.disk
        result.had += self._holders[position] > 0
        result.affine += has
        if replica.device.use(position):
            result.hits += 1
        elif not replica.device.load(position):
            result.refused += 1
            return
        if has:
            replica.disk.move_to_end(position)
        else:
            self._fetch(replica, position)

    def _fetch(self, replica: SimulatedReplica, position: int) -> None:
        result, nbytes = self.result, self._needs[position].file_nbytes
        result.fetches += 1
        result.fetched_bytes += nbytes
        result.repeated += position in self._fetched
        self._fetched.add(position)
        replica.disk[position] = None
        replica.disk_bytes += nbytes
        self._holders[position] += 1
        while replica.disk_bytes > self._cache_bytes and len(replica.disk) > 1:
            oldest, _ = replica.disk.popitem(last=False)
            replica.disk_bytes -= self._needs[oldest].file_nbytes
            self._holders[oldest] -= 1

    def publish(self, name: str) -> None:
        """Tell the router what a replica has, as the replicas of Ray Serve do."""
        replica, names = self.replicas[name], self._names
        tiers = {names[int(key.location)]: "device" for key in replica.device.occupied}
        for position in islice(reversed(replica.disk), MAX_IDS):
            if len(tiers) == MAX_IDS:
                break
            tiers.setdefault(names[position], "disk")
        self.router.publish(name, ReplicaResidency(tiers))


def simulate_fleet(
    requests: Sequence[int],
    names: Sequence[str],
    needs: Sequence[GroupSizes],
    capacity: DeviceCapacity,
    cache_bytes: int,
    replicas: int,
    deaths: int = 0,
) -> list[FleetResult]:
    """Return the counts of each routing.

    `deaths` replicas, at equal distances in time, die, and empty ones take their places. A replica
    keeps on its disk what it has on its device: `cache_bytes` is at least the device's.
    """
    results = []
    for routing in get_args(Routing):
        result = FleetResult(routing=routing, requests=len(requests))
        fleet = SimulatedFleet(names, needs, capacity, cache_bytes, result)
        fleet.add(replicas)
        choose = _chooser(routing, fleet, names)
        lost, busiest = 0, 0
        for number, position in enumerate(requests):
            if lost < deaths and number * (deaths + 1) >= len(requests) * (lost + 1):
                dying = next(iter(fleet.replicas))
                busiest = max(busiest, fleet.replicas[dying].requests)
                fleet.lose(dying)
                fleet.add(1)
                lost += 1
            name = choose(position)
            fleet.serve(name, position)
            if routing == "adapters" and fleet.replicas[name].requests % PUBLISHED_AFTER == 0:
                fleet.publish(name)
        busiest = max(busiest, *(replica.requests for replica in fleet.replicas.values()))
        result.busiest = busiest * replicas / len(requests) if requests else 0.0
        results.append(result)
    return results


def _chooser(routing: Routing, fleet: SimulatedFleet, names: Sequence[str]) -> Callable[[int], str]:
    """Return a function that chooses the replica of a request."""
    router, random = fleet.router, Random(0)
    if routing == "random":
        return lambda _: random.choice(router.replicas)
    if routing == "hash":
        return lambda position: router.first_on_ring(names[position])

    def choose(position: int) -> str:
        (name,) = router.choose(names[position])
        router.sent(names[position], name)
        return name

    return choose


# -- the command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="simulate_capacity", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--adapters",
        nargs="+",
        required=True,
        metavar="DIR|FILE|NxR",
        help="an adapter's folder, a folder of such folders, a JSON or CSV list with a name and a"
        " rank, bytes or path for each, or 10000x16 for 10,000 of rank 16",
    )
    add_estimate_options(parser)
    _add_requests(parser)
    _add_fleet(parser)
    terminal = Terminal(sys.stdout, sys.stderr)
    try:
        run(parser.parse_args(argv), terminal)
    except (LoraxError, OSError) as error:
        terminal.complain(f"{type(error).__name__}: {error}")
        return 1
    return 0


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


def _add_fleet(parser: argparse.ArgumentParser) -> None:
    fleet = parser.add_argument_group("a fleet behind AdapterRouter (docs/fleet.md)")
    fleet.add_argument(
        "--replicas",
        type=integer_parser(1, MAX_REPLICAS),
        metavar="N",
        help="simulate N replicas, each with this device and --cache-bytes, and three ways to route"
        " requests to them, instead of one device and three eviction policies",
    )
    fleet.add_argument(
        "--cache-bytes",
        type=as_size,
        default="16GiB",
        metavar="N",
        help="each replica's cache on disk (default: %(default)s)",
    )
    fleet.add_argument(
        "--deaths",
        type=integer_parser(0, MAX_REPLICAS),
        default=0,
        metavar="N",
        help="replicas that lose everything and are replaced, at equal distances in time",
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise ConfigError(f"--rate must be a positive number, not {arguments.rate:g}")
    estimate = estimate_for(arguments, terminal)
    alignment = estimate.device.alignment
    capacity = DeviceCapacity(arguments.device_bytes, alignment, arguments.max_slots)
    with terminal.steps("reading the adapters") as report:
        names, kinds = read_adapters(arguments.adapters, estimate)
        report("drawing the requests")
        if arguments.trace is not None:
            requests = read_requests(arguments.trace, names, arguments.requests)
        else:
            count = arguments.requests or REQUESTS
            requests = draw_requests(len(names), arguments.zipf, count, arguments.seed)
        needs = [kind.needs for kind in kinds]
        policies, routings = [], []
        if arguments.replicas is not None:
            count, lost, disk = arguments.replicas, arguments.deaths, arguments.cache_bytes
            report(f"simulating {len(requests):,} requests to {count:,} replicas")
            fleet = simulate_fleet(requests, names, needs, capacity, disk, count, lost)
            routings = [asdict(result) | result.shares for result in fleet]
        else:
            for name in EVICTION_POLICIES:
                report(f"simulating {len(requests):,} requests under {name}")
                result = simulate(requests, needs, capacity, policy(name))
                policies.append(_result_as_json(name, result, arguments.rate))
    plan = plan_as_json(Counter(kinds), estimate, arguments) | {
        "distinct": len(set(requests)),
        "rate": arguments.rate,
        "policies": policies,
        "replicas": arguments.replicas,
        "routings": routings,
    }
    if arguments.json:
        terminal.json(plan)
    else:
        show_plan(plan, terminal)
        _show(plan, terminal)


def _result_as_json(
    name: PolicyName, result: SimulationResult, rate: float | None
) -> dict[str, Any]:
    row = {"policy": name, "hit_rate": result.hit_rate} | asdict(result)
    if rate is not None and result.requests:
        row["loads_per_second"] = result.loads / result.requests * rate
        row["bytes_per_second"] = result.device_bytes / result.requests * rate
    return row


def _show(plan: dict[str, Any], terminal: Terminal) -> None:
    terminal.pairs([("asked for", f"{plan['distinct']:,} of them")])
    if plan["replicas"]:
        terminal.say(f"{plan['replicas']:,} replicas, each with this device", "bold")
        terminal.table([_routing_row(row) for row in plan["routings"]])
    else:
        terminal.table([_policy_row(row) for row in plan["policies"]])
    refused = (plan["policies"] or plan["routings"])[0]["refused"]
    if refused:
        terminal.say(f"{refused:,} requests were refused: their adapters do not fit", "bold red")


def _policy_row(result: dict[str, Any]) -> dict[str, str]:
    row = {
        "policy": result["policy"],
        " requests": f"{result['requests']:,}",
        " found there": f"{result['hit_rate']:.1%}",
        " loads": f"{result['loads']:,}",
        " of them first": f"{result['first_loads']:,}",
        " evictions": f"{result['evictions']:,}",
        " to the device": format_size(result["device_bytes"]),
    }
    if "bytes_per_second" in result:
        row[" loads/s"] = f"{result['loads_per_second']:.1f}"
        row[" to the device/s"] = format_size(round(result["bytes_per_second"]))
    return row


def _routing_row(result: dict[str, Any]) -> dict[str, str]:
    return {
        "routing": result["routing"],
        " requests": f"{result['requests']:,}",
        " affinity": f"{result['affinity']:.1%}",
        " cold": f"{result['cold']:.1%}",
        " busiest ÷ mean": f"{result['busiest']:.2f}",
        " fetches": f"{result['fetches']:,}",
        " repeated": f"{result['repeated']:,}",
        " in all": format_size(result["fetched_bytes"]),
    }


if __name__ == "__main__":
    sys.exit(main())
