"""`lorax-async plan`: how many adapters fit, and what a budget makes of their requests."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from lorax_async.commands.adapter_pool import Kind, Pool, Reckoning, Target, read_pool
from lorax_async.commands.arguments import (
    OK,
    SIZE_HELP,
    AddParser,
    add_base,
    add_command,
    as_size,
    lines_of,
    number_from,
)
from lorax_async.commands.bases import layout_of
from lorax_async.commands.terminal import Screen, size
from lorax_async.config import DTYPES, MAX_SLOTS
from lorax_async.core.policies import EVICTION_POLICIES, PolicyName, policy
from lorax_async.core.popularity import Zipf
from lorax_async.core.simulation import Outcome, Room, fitting, simulate
from lorax_async.errors import ConfigError, shorten

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


def _plan(arguments: argparse.Namespace, screen: Screen) -> int:
    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise ConfigError(f"--rate is more than 0, not {arguments.rate:g}")
    target = _target(arguments, screen)
    with screen.steps() as report:
        report("reading the adapters")
        file_dtype = DTYPES.get(arguments.file_dtype) or target.dtype or target.layout.dtype
        pool = read_pool(arguments.adapters, Reckoning(target, file_dtype, arguments.targets))
        report("drawing the requests")
        asked = _asked(arguments, pool)
        needs, room = [kind.needs for kind in pool.kinds], _room(arguments, target)
        found = dict[PolicyName, Outcome]()
        for name in EVICTION_POLICIES:
            report(f"playing {len(asked):,} requests under {name}")
            found[name] = simulate(asked, needs, room, policy(name))
    told = _told(arguments, target, pool, len(set(asked)), found)
    if arguments.json:
        screen.json(told)
    else:
        _show(told, screen)
    return OK


def _target(arguments: argparse.Namespace, screen: Screen) -> Target:
    from lorax_async.io.devices.cpu import CpuDevice  # noqa: PLC0415 - heavy, and not for the others
    from lorax_async.io.devices.cuda import CudaDevice  # noqa: PLC0415

    device = CudaDevice if arguments.device == "cuda" else CpuDevice
    layout = layout_of(arguments.base, screen)
    return Target(layout, DTYPES.get(arguments.dtype), device.alignment, device.rank_multiple)


def _room(arguments: argparse.Namespace, target: Target) -> Room:
    return Room(arguments.device_bytes, target.alignment, arguments.max_slots)


def _asked(arguments: argparse.Namespace, pool: Pool) -> list[int]:
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
    random, popularity = Random(seed), Zipf(count, exponent)  # noqa: S311 - no secret
    order = list(range(count))
    random.shuffle(order)
    return [order[popularity.pick(random.random())] for _ in range(requests)]


def _told(
    arguments: argparse.Namespace,
    target: Target,
    pool: Pool,
    distinct: int,
    found: dict[PolicyName, Outcome],
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
    arguments: argparse.Namespace, target: Target, kinds: Sequence[Kind]
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


def _outcome(name: PolicyName, found: Outcome, rate: float | None) -> dict[str, Any]:
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


def _show(told: dict[str, Any], screen: Screen) -> None:
    adapters, rate = told["adapters"], told["rate"]
    screen.say(
        f"{adapters['count']:,} adapters for {size(told['device_bytes'])} of device, as"
        f" {told['dtype']}",
        "bold",
    )
    columns = ("rank", " adapters", " device, each", " file, each", " of these alone fit")
    screen.table(columns, [_kind_row(kind) for kind in adapters["kinds"]])
    screen.pairs(
        [
            ("all on the device", size(adapters["device_bytes"])),
            ("all on disk, or in host memory", size(adapters["file_bytes"])),
            ("asked for", f"{told['distinct']:,} of them"),
        ]
    )
    policies = ["policy", " requests", " found there", " loads", " of them first", " evictions"]
    policies += [" to the device", *((" loads/s", " to the device/s") if rate else ())]
    screen.table(policies, [_policy_row(each) for each in told["policies"]])
    refused = told["policies"][0]["refused"]
    if refused:
        screen.say(f"{refused:,} requests were refused: their adapters do not fit", "bold red")


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
