"""`lorax-async plan`: compute how many adapters fit a budget, and what all of them take."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from lorax_async.cli.command_line import (
    ABOUTS,
    OK,
    SIMULATION,
    AddParser,
    Terminal,
    add_base,
    add_command,
    add_device,
    add_device_bytes,
    format_size,
    integer_parser,
    read_layout,
)
from lorax_async.cli.memory_estimate import AdapterKind, MemoryEstimate, count_fitting
from lorax_async.config import DTYPES, MAX_SLOTS


def add_to(add: AddParser) -> None:
    more = f"Nothing is loaded. {SIMULATION} simulates requests."
    parser = add_command(add, "plan", ABOUTS["plan"], _plan, more)
    help = "an adapter's folder, a folder of such folders, or 10000x16 for 10,000 of rank 16"
    parser.add_argument("--adapters", nargs="+", required=True, metavar="DIR|NxR", help=help)
    add_estimate_options(parser)


def add_estimate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the base, the device, and adapters that are not on the disk."""
    add_base(parser, required=True)
    help = "modules, as q_proj, that NxR adapts (default: every linear module of the layers)"
    parser.add_argument("--targets", nargs="+", default=[], metavar="MODULE", help=help)
    help = "dtype of NxR's files (default: as on the device)"
    parser.add_argument("--file-dtype", choices=DTYPES, help=help)
    add_device_bytes(parser, None)
    parser.add_argument(
        "--max-slots",
        type=integer_parser(1, MAX_SLOTS),
        default=MAX_SLOTS,
        metavar="N",
        help="adapters on the device at a time (default: as many as fit, up to %(default)s)",
    )
    add_device(parser, "on the device (default: the base's dtype)")


def estimate_for(arguments: argparse.Namespace, terminal: Terminal) -> MemoryEstimate:
    """Return the estimate for these options. Raises `ConfigError`."""
    from lorax_async.devices.cpu import CpuDevice  # noqa: PLC0415 - slow to import, as the next
    from lorax_async.devices.cuda import CudaDevice  # noqa: PLC0415

    device = CudaDevice if arguments.device == "cuda" else CpuDevice
    layout = read_layout(arguments.base, terminal)
    dtype = DTYPES.get(arguments.dtype)
    file_dtype = DTYPES.get(arguments.file_dtype) or dtype or layout.dtype
    return MemoryEstimate(layout, device, dtype, file_dtype, tuple(arguments.targets))


def _plan(arguments: argparse.Namespace, terminal: Terminal) -> int:
    estimate, counts = estimate_for(arguments, terminal), Counter[AdapterKind]()
    with terminal.steps("reading the adapters"):
        for text in arguments.adapters:
            for _, kind, count in estimate.of_text(text):
                counts[kind] += count
    plan = plan_as_json(counts, estimate, arguments)
    if arguments.json:
        terminal.json(plan)
    else:
        show_plan(plan, terminal)
    return OK


def plan_as_json(
    counts: Counter[AdapterKind], estimate: MemoryEstimate, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what the adapters take, in all and by kind, and how many of a kind fit alone."""
    nbytes, alignment = arguments.device_bytes, estimate.device.alignment
    kinds = [
        {
            "rank": kind.rank,
            "count": count,
            "device_bytes": kind.device_bytes,
            "file_bytes": kind.needs.file_nbytes,
            "fit": count_fitting(kind.needs, nbytes, alignment, arguments.max_slots),
        }
        for kind, count in counts.most_common(20)
    ]
    adapters = {
        "count": counts.total(),
        "device_bytes": sum(kind.device_bytes * count for kind, count in counts.items()),
        "file_bytes": sum(kind.needs.file_nbytes * count for kind, count in counts.items()),
        "kinds": kinds,
    }
    plan = {"base": arguments.base, "dtype": estimate.dtype or estimate.layout.dtype}
    return plan | {"device_bytes": nbytes, "adapters": adapters}


def show_plan(plan: dict[str, Any], terminal: Terminal) -> None:
    """Print the plan as text."""
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
    ])  # fmt: skip
