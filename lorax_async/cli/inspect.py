"""`lorax-async inspect`: describe an adapter and list the errors a load of it would raise."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from lorax_async import layouts
from lorax_async.adapters.weights_file import require_base_copies, require_finite
from lorax_async.cli.command_line import (
    ABOUTS,
    ID_HELP,
    OK,
    REFUSED,
    TOKENS,
    AddParser,
    Terminal,
    add_base,
    add_command,
    add_sources,
    as_folder_or_id,
    format_runs,
    loader_settings,
    read_layout,
    run_on_uvloop,
)
from lorax_async.config import Limits, StoreConfig
from lorax_async.devices.base_copies import BaseCopies
from lorax_async.devices.cpu import CpuDevice
from lorax_async.devices.staging import MOVE_BYTES
from lorax_async.errors import LoraxError, shorten
from lorax_async.files import locate, require_file, to_adapter_error
from lorax_async.formats.peft_config import FIELDS, parse_config
from lorax_async.formats.peft_names import TensorName, layer_index, parse_tensor_name
from lorax_async.formats.safetensors import (
    LENGTH_BYTES,
    Header,
    TensorSpan,
    header_size,
    parse_header,
)
from lorax_async.formats.strict_json import JsonValue, parse_object
from lorax_async.formats.tensor_kinds import TensorRole
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.sharding import shard_layout
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.remote.base import AdapterMetadata
from lorax_async.runtime.assembly import StoreParts
from lorax_async.sources.local import CONFIG, WEIGHTS, find_trusted_adapter
from lorax_async.types import AdapterRef, AdapterSpec

SHOWN_FIELDS = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "target_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
)
"""The fields of the config that describe the adapter."""

MAX_PROBLEMS = 20

_A = frozenset({TensorRole.A, TensorRole.PARAMETER_A})
_B = frozenset({TensorRole.B, TensorRole.PARAMETER_B})


@dataclass(frozen=True, slots=True)
class TargetModules:
    """The adapter's modules of one name; each tuple holds the distinct values, sorted.

    `scales` is empty if the config is refused; `shapes` are (in, out).
    """

    name: str
    modules: int
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    nbytes: int


@dataclass(slots=True)
class Inspection:
    """The facts of an adapter. None is unknown.

    `problems` are the classes of errors by their distinct texts, in order of discovery.
    """

    path: str
    base: str | None
    config: dict[str, JsonValue] = field(default_factory=dict)
    targets: list[TargetModules] = field(default_factory=list)
    tensors: int | None = None
    file_bytes: int | None = None
    device_bytes: int | None = None
    device_dtype: str | None = None
    base_copies: list[str] = field(default_factory=list)
    """The modules of which the file has copies of the base's weights."""
    problems: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def collect(self, what: str = "the adapter") -> Iterator[None]:
        """Add errors of the block instead of raising them; `what` names the file it reads."""
        try:
            yield
        except (OSError, LoraxError) as raised:
            error = to_adapter_error(raised, what) if isinstance(raised, OSError) else raised
            self.problems.setdefault(error.problem, type(error).__name__)


def inspect_adapter(
    folder: Path,
    layout: ModelLayout | None = None,
    base: str | None = None,
    *,
    has_weights: bool = True,
) -> Inspection:
    """Read the config and header in `folder` and check them as a load would.

    The folder is trusted: links are followed. `layout` is that of the base to check against, named
    `base`; None checks only that config and header agree. Faults of the adapter are not raised:
    they are the inspection's `problems`.
    """
    limits, found = Limits(), Inspection(str(folder), base)
    with found.collect():
        find_trusted_adapter(folder, limits)
    spec = _read_config(folder, limits, found)
    header = _read_header(folder, found)
    if header is not None:
        found.tensors = len(header.tensors)
        found.targets = _find_targets(header.tensors, spec, found)
    if spec is not None and header is not None:
        with found.collect():
            checked = layout or layouts.from_adapter(folder, limits=limits)
            plan = plan_transfer(
                header,
                spec,
                checked,
                dtype=None,
                alignment=CpuDevice.alignment,
                rank_multiple=CpuDevice.rank_multiple,
                limits=limits,
                staging_move_bytes=MOVE_BYTES,
            )
            found.device_bytes, found.device_dtype = plan.nbytes, plan.dtype
            found.base_copies = [checked.modules[copy.module].name for copy in plan.copies]
            if has_weights:
                require_finite(folder)
            if has_weights and layout is not None:
                require_base_copies(folder, plan.copies, BaseCopies(shard_layout(layout, None)))
    return found


def _open(folder: Path, name: str) -> BinaryIO | None:
    """Open a regular file; return None if it is missing, which `find_adapter` has reported."""
    try:
        with locate(str(folder / name)) as place:
            require_file(name, place, sys.maxsize)
            return os.fdopen(place.open(), "rb")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_config(folder: Path, limits: Limits, found: Inspection) -> AdapterSpec | None:
    """Return the spec of a JSON config's accepted fields if it has one."""
    spec = None
    with found.collect(CONFIG):
        file = _open(folder, CONFIG)
        if file is None:
            return None
        with file:
            text = file.read(limits.max_config_bytes + 1)
        fields = parse_object(
            text, what=CONFIG, max_bytes=limits.max_config_bytes, max_depth=limits.max_json_depth
        )
        found.config = {name: fields[name] for name in SHOWN_FIELDS if name in fields}
        accepted = {}  # `parse_config` would stop at the first field that it refuses
        for name, value in fields.items():
            with found.collect():
                if name in FIELDS:
                    FIELDS[name].check(name, value)
                accepted[name] = value
        if len(accepted) < len(fields):
            text = json.dumps(accepted).encode()
        spec = parse_config(text, limits)
    return spec  # noqa: RET504 - the block collects errors


def _read_header(folder: Path, found: Inspection) -> Header | None:
    """Return the header if it is well-formed; `found` gets the size of the weights."""
    header = None
    with found.collect(WEIGHTS):
        file = _open(folder, WEIGHTS)
        if file is None:
            return None
        with file:
            nbytes = found.file_bytes = os.fstat(file.fileno()).st_size
            first = file.read(LENGTH_BYTES)
            rest = file.read(header_size(first, nbytes) - LENGTH_BYTES)
        header = parse_header(first + rest, nbytes)
    return header  # noqa: RET504 - the block collects errors


def _find_targets(
    spans: Iterable[TensorSpan], spec: AdapterSpec | None, found: Inspection
) -> list[TargetModules]:
    """Group the tensors of A and B matrices by their modules' names; report the others."""
    groups: dict[str, list[tuple[TensorSpan, TensorName, int | None]]] = {}
    for span in spans:
        with found.collect():
            name = parse_tensor_name(span.name)
            tensor = span, name, layer_index(name.module)
            last = name.module.rpartition(".")[2] + ".base_layer" * name.depth
            groups.setdefault(last, []).append(tensor)
    targets = []
    for last, tensors in sorted(groups.items()):
        modules = {name.module for _, name, _ in tensors}
        a, b = (
            {
                name.module: span.shape
                for span, name, _ in tensors
                if name.part in parts and len(span.shape) == 2
            }
            for parts in (_A, _B)
        )
        target = TargetModules(
            name=last,
            modules=len(modules),
            layers=tuple(sorted({layer for _, _, layer in tensors if layer is not None})),
            ranks=tuple(sorted({_rank(m, shape[0], spec) for m, shape in a.items()})),
            scales=() if spec is None else tuple(sorted({spec.scale_of(m) for m in modules})),
            shapes=tuple(sorted({(a[m][1], b[m][0]) for m in a.keys() & b.keys()})),
            dtypes=tuple(sorted({span.dtype for span, _, _ in tensors})),
            nbytes=sum(span.stop - span.start for span, _, _ in tensors),
        )
        targets.append(target)
    return targets


def _rank(module: str, rows: int, spec: AdapterSpec | None) -> int:
    """Return the rank of an A of `rows`, which bare parameters have for each expert."""
    if spec is None or not spec.parameters or rows % spec.rank_of(module):
        return rows
    return spec.rank_of(module)


# -- the command ----------------------------------------------------------------------------------


def add_to(add: AddParser) -> None:
    about = ABOUTS["inspect"]
    more = f"Of a remote adapter, config and header are downloaded, and not kept. {TOKENS}"
    parser = add_command(add, "inspect", about, _inspect, more)
    parser.add_argument(
        "path",
        type=as_folder_or_id,
        metavar="PATH",
        help=f"the adapter's folder, or else {ID_HELP}",
    )
    add_base(parser, required=False)
    add_sources(parser)


def _inspect(arguments: argparse.Namespace, terminal: Terminal) -> int:
    base: str | None = arguments.base
    ref: AdapterRef = arguments.path
    layout = read_layout(base, terminal, arguments.hub_endpoint) if base is not None else None
    if isinstance(ref.id, Path):
        found = inspect_adapter(ref.id, layout, base)
    else:
        with terminal.steps(f"downloading config and header of {ref.text}"):
            metadata = _download_metadata(ref, loader_settings(arguments, [ref]))
        with TemporaryDirectory(prefix="lorax-async-") as name:
            folder = Path(name)
            (folder / CONFIG).write_bytes(metadata.config.prefix)
            with (folder / WEIGHTS).open("wb") as file:
                file.write(metadata.weights.prefix)
                file.truncate(metadata.weights.nbytes)  # after the header is a hole
            found = inspect_adapter(folder, layout, base, has_weights=False)
        found.path = ref.text
        found.file_bytes = metadata.weights.nbytes
    if arguments.json:
        problems = [{"error": error, "text": text} for text, error in found.problems.items()]
        terminal.json(
            {"loadable": not problems}
            | asdict(found)
            | {"problems": problems[:MAX_PROBLEMS]}
            | {"problems_left_out": len(problems[MAX_PROBLEMS:])}
        )
    else:
        _show(found, terminal)
    return REFUSED if found.problems else OK


def _download_metadata(ref: AdapterRef, settings: Mapping[str, Any]) -> AdapterMetadata:
    """Download config and header. Blocks; raises what a load would."""

    async def download(config: StoreConfig) -> AdapterMetadata:
        parts = StoreParts(config, None, lambda: None)
        try:
            return await parts.remote.metadata(await parts.remote.resolve(ref))
        except LoraxError as error:
            raise error.located(id=ref.text) from error.__cause__
        finally:
            await parts.close(0)

    with TemporaryDirectory(prefix="lorax-async-") as name:
        settings = {**settings, "cache_dir": Path(name) / "cache"}
        return run_on_uvloop(download(StoreConfig(**settings)))


def _show(found: Inspection, terminal: Terminal) -> None:
    verdict, style = ("refused", "bold red") if found.problems else ("can be loaded", "green")
    terminal.say(f"{shorten(found.path, 200)}: {verdict}", style)
    for text, error in islice(found.problems.items(), MAX_PROBLEMS):
        terminal.say(f"  {error}: {text}")
    if len(found.problems) > MAX_PROBLEMS:
        terminal.say(f"  … and {len(found.problems) - MAX_PROBLEMS} more")
    terminal.say()
    facts = [
        (name, json.dumps(value, ensure_ascii=False))
        for name, value in found.config.items()
        if value not in (None, [], {})
    ]
    against = found.base or "itself; use --base to check it against a base"
    facts.append(("checked against", against))
    if found.file_bytes is not None:
        facts.append(("file", f"{found.file_bytes:,} bytes"))
    if found.device_bytes is not None:
        facts.append(("on a device", f"{found.device_bytes:,} bytes as {found.device_dtype}"))
    if found.base_copies:
        how = "compared with the base" if found.base else "a load compares them with the base"
        facts.append(("copies of its weights", f"{', '.join(found.base_copies)}; {how}"))
    terminal.pairs(facts)
    if found.targets:
        terminal.table([_target_row(target) for target in found.targets])


def _target_row(target: TargetModules) -> dict[str, str]:
    return {
        "target": target.name,
        " modules": str(target.modules),
        "layers": format_runs(target.layers),
        "rank": ", ".join(map(str, target.ranks)),
        "scale": ", ".join(f"{scale:g}" for scale in target.scales),
        "in → out": ", ".join(f"{into} → {out}" for into, out in target.shapes),
        "dtype": ", ".join(target.dtypes),
        " bytes": f"{target.nbytes:,}",
    }
