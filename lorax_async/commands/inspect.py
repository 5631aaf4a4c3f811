"""`lorax-async inspect`: what an adapter is, shown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from lorax_async.commands.arguments import OK, REFUSED, AddParser, add_base, add_command
from lorax_async.commands.bases import layout_of
from lorax_async.commands.inspection import Inspection, Target, inspect_adapter
from lorax_async.commands.looking import look
from lorax_async.commands.places import ID_HELP, TOKENS, add_sources, as_place, settings_of
from lorax_async.commands.terminal import Screen, spans
from lorax_async.core.layout import ModelLayout
from lorax_async.identity import AdapterRef


def add_to(add: AddParser) -> None:
    about = "show what an adapter is, and everything it would be refused for"
    more = f"Of what lies elsewhere, config and header are asked for, and not kept. {TOKENS}"
    parser = add_command(add, "inspect", about, _inspect, more)
    parser.add_argument(
        "path", type=as_place, metavar="PATH", help=f"the adapter's folder, or else {ID_HELP}"
    )
    add_base(parser, required=False)
    add_sources(parser)


def _inspect(arguments: argparse.Namespace, screen: Screen) -> int:
    base: str | None = arguments.base
    layout = layout_of(base, screen) if base is not None else None
    found = _inspected(arguments, layout, screen)
    if arguments.json:
        screen.json({"loadable": found.loadable} | asdict(found))
    else:
        _show_inspection(found, screen)
    return OK if found.loadable else REFUSED


def _inspected(
    arguments: argparse.Namespace, layout: ModelLayout | None, screen: Screen
) -> Inspection:
    ref: AdapterRef = arguments.path
    if isinstance(ref.id, Path):
        return inspect_adapter(ref.id, layout, arguments.base)
    with screen.steps() as report:
        report(f"asking for config and header of {ref.text}")
        looked = look(ref, settings_of(arguments, [ref]))
    with looked.as_folder() as folder:
        found = inspect_adapter(folder, layout, arguments.base)
    return replace(found, path=ref.text, file_bytes=looked.file_bytes)


def _show_inspection(found: Inspection, screen: Screen) -> None:
    verdict, style = ("can be loaded", "green") if found.loadable else ("refused", "bold red")
    screen.say(f"{found.path}: {verdict}", style)
    for problem in found.problems:
        screen.say(f"  {problem.error}: {problem.text}")
    if found.problems_left_out:
        screen.say(f"  … and {found.problems_left_out} more")
    screen.say()
    screen.pairs(list(_facts(found)))
    if found.targets:
        columns = ("target", " modules", "layers", "rank", "scale", "in → out", "dtype", " bytes")
        screen.table(columns, [_target_row(target) for target in found.targets])


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    for name, value in found.config.items():
        if value not in (None, [], {}):
            yield name, json.dumps(value, ensure_ascii=False)
    yield "checked against", found.base or "itself only; --base checks that it fits one"
    if found.file_bytes is not None:
        yield "file", f"{found.file_bytes:,} bytes"
    if found.device_bytes is not None:
        yield "on a device", f"{found.device_bytes:,} bytes as {found.device_dtype}"


def _target_row(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        str(target.modules),
        spans(target.layers),
        ", ".join(map(str, target.ranks)),
        ", ".join(f"{scale:g}" for scale in target.scales),
        ", ".join(f"{into} → {out}" for into, out in target.shapes),
        ", ".join(target.dtypes),
        f"{target.nbytes:,}",
    )
