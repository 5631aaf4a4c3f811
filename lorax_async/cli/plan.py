"""`lorax-async plan`: compute how many adapters fit, and simulate requests under each policy."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import Any

from lorax_async.cli.command_line import (
    ABOUTS,
    OK,
    AddParser,
    Terminal,
    adapter_folders,
    add_base,
    add_command,
    add_device,
    add_device_bytes,
    as_size,
    format_size,
    integer_parser,
    read_layout,
)
from lorax_async.cli.simulation import (
    DeviceCapacity,
    SimulationResult,
    count_fitting,
    simulate,
    simulate_fleet,
)
from lorax_async.config import DTYPES, MAX_SLOTS, Limits
from lorax_async.devices.base import Device
from lorax_async.errors import ConfigError, LoraxError, shorten
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.safetensors import TensorDescription, parse_header, write_header
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.lifecycle.policies import EVICTION_POLICIES, PolicyName, policy
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.runtime.assembly import MOVE_BYTES
from lorax_async.sources.local import CONFIG, find_trusted_adapter, open_weights

MAX_EXPONENT = 10.0
SHOWN_KINDS = 20
REQUESTS = 100_000
MAX_REQUESTS = 100_000_000
MAX_REPLICAS = 10_000


# -- adapters -------------------------------------------------------------------------------------

_COUNT_AND_RANK = re.compile(r"([0-9]{1,9})x([0-9]{1,4})")
_INTEGER = re.compile("[0-9]{1,18}")
MAX_ADAPTERS = 10_000_000


@dataclass(frozen=True, slots=True, eq=False)
class AdapterKind:
    """Adapters with equal needs; one object stands for them all.

    `rank` is None if only their bytes are known.
    """

    rank: int | None
    needs: GroupSizes

    @property
    def device_bytes(self) -> int:
        return sum(self.needs.group_nbytes)


class MemoryEstimate:
    """The needs of adapters on one device. Blocks while it reads adapters on the disk.

    `dtype` is that on the device, in the file format's spelling, or None for the layout's. Files
    that are not on the disk have `file_dtype` and adapt modules whose names end in `targets`; if
    there are none, all linear modules of the layers.
    """

    def __init__(
        self,
        layout: ModelLayout,
        device: type[Device],
        dtype: str | None,
        file_dtype: str,
        targets: Sequence[str],
    ) -> None:
        self._layout = layout
        self._device = device
        self._dtype = dtype
        self._file_dtype = file_dtype
        self._targets = targets
        self._limits = Limits()
        self.of_rank = cache(self._of_rank)
        self.of_bytes = cache(self._of_bytes)
        self._planned = lru_cache(maxsize=64)(self._plan)

    def of_folder(self, folder: Path) -> AdapterKind:
        """Return the kind of an adapter on the disk. Raises what a load would raise."""
        try:
            key = find_trusted_adapter(folder, self._limits)
            config = (folder / CONFIG).read_bytes()
            weights = open_weights(key, self._limits)
            with closing(weights.reader) as reader:
                return self._planned(config, weights.prefix, reader.nbytes)
        except LoraxError as error:
            raise error.located(id=str(folder)) from error

    def _of_rank(self, rank: int) -> AdapterKind:
        """Return the kind of an adapter with this rank on every target."""
        tensors, names = [], set[str]()
        for module in self._layout.modules:
            last = module.name.rpartition(".")[2]
            in_layers = 0 <= module.layer < self._layout.num_layers
            if module.embedding or not (last in self._targets if self._targets else in_layers):
                continue
            names.add(last)
            for part, shape in (
                ("A", (rank, module.in_features)),
                ("B", (module.out_features, rank)),
            ):
                name = f"base_model.model.{module.name}.lora_{part}.weight"
                tensors.append(TensorDescription(name, self._file_dtype, shape))
        missing = set(self._targets) - names
        if missing or not names:
            raise ConfigError(f"the base has no linear modules named {', '.join(sorted(missing))}")
        prefix, places = write_header(tensors)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        config["target_modules"] = sorted(names)
        return self._planned(json.dumps(config).encode(), prefix, places[-1][1])

    def _of_bytes(self, nbytes: int) -> AdapterKind:
        """Return the kind of an adapter of `nbytes`, divided equally among the layers."""
        layers, alignment = self._layout.num_layers, self._device.alignment
        group = -(-nbytes // layers // alignment) * alignment
        return AdapterKind(None, GroupSizes((max(group, alignment),) * layers, file_nbytes=nbytes))

    def _plan(self, config: bytes, prefix: bytes, nbytes: int) -> AdapterKind:
        limits = self._limits
        plan = plan_transfer(
            parse_header(prefix, nbytes, limits),
            parse_config(config, limits),
            self._layout,
            dtype=self._dtype,
            alignment=self._device.alignment,
            rank_multiple=self._device.rank_multiple,
            limits=limits,
            staging_move_bytes=MOVE_BYTES,
        )
        return AdapterKind(plan.rank, plan.needs(holdable=False))


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
                raise ConfigError(f"a plan has at most {MAX_ADAPTERS:,} adapters")
            names += [name] if count == 1 else [f"{name}/{number}" for number in range(count)]
            kinds += [kind] * count
    return names, kinds


def _read_adapters(text: str, estimate: MemoryEstimate) -> Iterator[tuple[str, AdapterKind, int]]:
    path, generated = Path(text), _COUNT_AND_RANK.fullmatch(text)
    if path.is_dir():
        for folder in adapter_folders(path):
            yield folder.resolve().name, estimate.of_folder(folder), 1
    elif path.is_file():
        for row in _read_rows(path):
            yield _parse_row(row, path, estimate)
    elif generated is not None:
        count, rank = int(generated[1]), int(generated[2])
        yield f"r{rank}", estimate.of_rank(rank), count
    else:
        raise ConfigError(f"{shorten(text)!r} is not a folder, a file or COUNTxRANK")


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
    of_value = estimate.of_rank if fields == ["rank"] else estimate.of_bytes
    return name, of_value(value), count


def _parse_integer(value: object, what: str, path: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not _INTEGER.fullmatch(text) or not int(text):
        raise ConfigError(f"{path}: {what} is an integer of 1 or more, not {shorten(text)!r}")
    return int(text)


# -- the command ----------------------------------------------------------------------------------


def add_to(add: AddParser) -> None:
    about = ABOUTS["plan"]
    more = (
        "Nothing is loaded: requests are simulated, one after the other, with the loader's own"
        " budgets and each of its eviction policies."
    )
    parser = add_command(add, "plan", about, _plan, more)
    add_base(parser, required=True)
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
    add_device_bytes(parser, None)
    parser.add_argument(
        "--max-slots",
        type=integer_parser(1, MAX_SLOTS),
        default=MAX_SLOTS,
        metavar="N",
        help="adapters on the device at a time (default: as many as fit, up to %(default)s)",
    )
    add_device(parser, "on the device (default: the base's dtype)")
    _add_requests(parser)
    _add_fleet(parser)


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


def _plan(arguments: argparse.Namespace, terminal: Terminal) -> int:
    from lorax_async.devices.cpu import CpuDevice  # noqa: PLC0415 - slow to import, and unused by other commands
    from lorax_async.devices.cuda import CudaDevice  # noqa: PLC0415

    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise ConfigError(f"--rate must be a positive number, not {arguments.rate:g}")
    device = CudaDevice if arguments.device == "cuda" else CpuDevice
    capacity = DeviceCapacity(arguments.device_bytes, device.alignment, arguments.max_slots)
    layout = read_layout(arguments.base, terminal)
    dtype = DTYPES.get(arguments.dtype)
    file_dtype = DTYPES.get(arguments.file_dtype) or dtype or layout.dtype
    estimate = MemoryEstimate(layout, device, dtype, file_dtype, arguments.targets)
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
    plan = {
        "base": arguments.base,
        "dtype": dtype or layout.dtype,
        "device_bytes": arguments.device_bytes,
        "adapters": _adapters_as_json(kinds, capacity),
        "distinct": len(set(requests)),
        "rate": arguments.rate,
        "policies": policies,
        "replicas": arguments.replicas,
        "routings": routings,
    }
    if arguments.json:
        terminal.json(plan)
    else:
        _show(plan, terminal)
    return OK


def _adapters_as_json(kinds: Sequence[AdapterKind], capacity: DeviceCapacity) -> dict[str, Any]:
    return {
        "count": len(kinds),
        "device_bytes": sum(kind.device_bytes for kind in kinds),
        "file_bytes": sum(kind.needs.file_nbytes for kind in kinds),
        "kinds": [
            {
                "rank": kind.rank,
                "count": count,
                "device_bytes": kind.device_bytes,
                "file_bytes": kind.needs.file_nbytes,
                "fit": count_fitting(kind.needs, capacity),
            }
            for kind, count in Counter(kinds).most_common(SHOWN_KINDS)
        ],
    }


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
    random, order = Random(seed), list(range(count))  # noqa: S311 - not for secrets
    random.shuffle(order)
    sums = list(accumulate((n + 1) ** -exponent for n in range(count)))
    return random.choices(order, cum_weights=sums, k=requests)


def _result_as_json(
    name: PolicyName, result: SimulationResult, rate: float | None
) -> dict[str, Any]:
    row = {"policy": name, "hit_rate": result.hit_rate} | asdict(result)
    if rate is not None and result.requests:
        row["loads_per_second"] = result.loads / result.requests * rate
        row["bytes_per_second"] = result.device_bytes / result.requests * rate
    return row


def _show(plan: dict[str, Any], terminal: Terminal) -> None:
    adapters = plan["adapters"]
    capacity = f"{format_size(plan['device_bytes'])} of device, as {plan['dtype']}"
    terminal.say(f"{adapters['count']:,} adapters for {capacity}", "bold")
    terminal.table([
        {
            "rank": "?" if kind["rank"] is None else str(kind["rank"]),
            " adapters": f"{kind['count']:,}",
            " device, each": format_size(kind["device_bytes"]),
            " file, each": format_size(kind["file_bytes"]),
            " of these alone fit": f"{kind['fit']:,}",
        }
        for kind in adapters["kinds"]
    ])  # fmt: skip
    terminal.pairs([
        ("all on the device", format_size(adapters["device_bytes"])),
        ("all on disk, or in host memory", format_size(adapters["file_bytes"])),
        ("asked for", f"{plan['distinct']:,} of them"),
    ])  # fmt: skip
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
