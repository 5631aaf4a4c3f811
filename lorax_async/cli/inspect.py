"""`lorax-async inspect`: describe an adapter and list the errors a load of it would raise."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

from lorax_async import layouts
from lorax_async.cli.arguments import (
    ID_HELP,
    OK,
    REFUSED,
    TOKENS,
    AddParser,
    add_base,
    add_command,
    add_sources,
    as_place,
    loader_settings,
    read_layout,
)
from lorax_async.cli.load import run_on_uvloop
from lorax_async.cli.terminal import Terminal, format_runs
from lorax_async.config import Limits, LoaderConfig
from lorax_async.devices.cpu import CpuDevice
from lorax_async.errors import LoraxError
from lorax_async.files import locate, require_file, to_adapter_error
from lorax_async.formats.peft_config import FIELDS, parse_config
from lorax_async.formats.peft_names import TensorName, TensorRole, layer_index, parse_tensor_name
from lorax_async.formats.safetensors import (
    LENGTH_BYTES,
    Header,
    TensorSpan,
    header_size,
    parse_header,
)
from lorax_async.formats.split_weights import INDEX
from lorax_async.formats.strict_json import JsonValue, parse_object
from lorax_async.ids import LocalFolder
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import TransferPlan, plan_transfer
from lorax_async.remote.remote_source import RemoteSource, open_remote_source
from lorax_async.runtime.assembly import MOVE_BYTES
from lorax_async.sources.local import CONFIG, WEIGHTS, find_adapter, read_header
from lorax_async.types import AdapterRef, AdapterSpec


@dataclass(frozen=True, slots=True)
class RemoteMetadata:
    """The config and header of a remote adapter.

    `nbytes` is the size of its weights as one file; `file_bytes` that of its actual weight files.
    """

    config: bytes
    prefix: bytes
    nbytes: int
    file_bytes: int

    @contextmanager
    def as_folder(self) -> Iterator[Path]:
        """Yield a folder like a local adapter's, whose weights after the header are a hole."""
        with TemporaryDirectory(prefix="lorax-async-") as name:
            folder = Path(name)
            (folder / CONFIG).write_bytes(self.config)
            with (folder / WEIGHTS).open("wb") as file:
                file.write(self.prefix)
                file.truncate(self.nbytes)
            yield folder


def download_metadata(ref: AdapterRef, settings: Mapping[str, Any]) -> RemoteMetadata:
    """Download the config and header of `ref`. Blocks; raises what a load would."""
    with TemporaryDirectory(prefix="lorax-async-") as name:
        config = LoaderConfig(**{**settings, "cache_dir": Path(name) / "cache"})
        with open_remote_source(config) as source:
            return run_on_uvloop(_download_metadata(source, ref))


async def _download_metadata(source: RemoteSource, ref: AdapterRef) -> RemoteMetadata:
    metadata = await source.metadata(await source.resolve(ref))
    file_bytes = sum(part.nbytes for part in metadata.parts)
    return RemoteMetadata(metadata.config[1], metadata.prefix, metadata.nbytes, file_bytes)


SHOWN_FIELDS = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
)
"""The fields of the config that describe the adapter."""

MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason to refuse a load: the error's class and text."""

    error: str
    text: str


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


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts and problems of an adapter. None is unknown.

    `problems_left_out` counts problems beyond the first `MAX_PROBLEMS`.
    """

    path: str
    base: str | None
    config: dict[str, JsonValue]
    targets: tuple[TargetModules, ...]
    tensors: int | None
    file_bytes: int | None
    device_bytes: int | None
    device_dtype: str | None
    problems: tuple[Problem, ...]
    problems_left_out: int = 0

    @property
    def loadable(self) -> bool:
        return not self.problems


def inspect_adapter(
    folder: Path, layout: ModelLayout | None = None, base: str | None = None
) -> Inspection:
    """Read the config and header in `folder` and check them as a load would.

    Parameters
    ----------
    folder
        A trusted path: links are followed.
    layout
        The base to check against, named `base`; None checks only that config and header agree.

    Faults of the adapter are not raised: they are the inspection's `problems`.
    """
    limits, problems = Limits(), _ProblemList()
    with problems.collect():
        find_adapter(LocalFolder(str(folder), trusted=True), (), limits)
    fields, spec = _read_config(folder, limits, problems)
    header, file_bytes = _read_header(folder, limits, problems)
    tensors = _lora_tensors(header, problems)
    plan = None
    if spec is not None and header is not None:
        with problems.collect():
            plan = _plan(folder, header, spec, layout, limits)
    return Inspection(
        path=str(folder),
        base=base,
        config={name: fields[name] for name in SHOWN_FIELDS if name in fields},
        targets=_targets(tensors, spec),
        tensors=None if header is None else len(header.tensors),
        file_bytes=file_bytes,
        device_bytes=None if plan is None else plan.nbytes,
        device_dtype=None if plan is None else plan.dtype,
        problems=tuple(problems.items[:MAX_PROBLEMS]),
        problems_left_out=max(0, len(problems.items) - MAX_PROBLEMS),
    )


class _ProblemList:
    """Distinct problems in order of discovery."""

    def __init__(self) -> None:
        self.items: list[Problem] = []
        self._texts: set[str] = set()

    @contextmanager
    def collect(self, what: str = "the adapter") -> Iterator[None]:
        """Add errors of the block instead of raising them; `what` names the file it reads."""
        try:
            yield
        except OSError as error:
            self._add(to_adapter_error(error, what))
        except LoraxError as error:
            self._add(error)

    def _add(self, error: LoraxError) -> None:
        if error.problem not in self._texts:
            self._texts.add(error.problem)
            self.items.append(Problem(type(error).__name__, error.problem))


def _open(folder: Path, name: str) -> BinaryIO | None:
    """Open a regular file; return None if it is missing, which `find_adapter` has reported."""
    try:
        with locate(str(folder / name)) as place:
            require_file(name, place, sys.maxsize)
            return os.fdopen(place.open(), "rb")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_config(
    folder: Path, limits: Limits, problems: _ProblemList
) -> tuple[dict[str, JsonValue], AdapterSpec | None]:
    """Return the fields of a JSON config, and the spec of its accepted fields if it has one."""
    fields: dict[str, JsonValue] = {}
    spec = None
    with problems.collect(CONFIG):
        file = _open(folder, CONFIG)
        if file is not None:
            with file:
                text = file.read(limits.max_config_bytes + 1)
            fields = parse_object(
                text,
                what=CONFIG,
                max_bytes=limits.max_config_bytes,
                max_depth=limits.max_json_depth,
            )
            spec = parse_config(_accepted_fields(text, fields, problems), limits)
    return fields, spec


def _accepted_fields(text: bytes, fields: Mapping[str, JsonValue], problems: _ProblemList) -> bytes:
    """Return the config without refused fields, since `parse_config` stops at the first."""
    accepted = {}
    for name, value in fields.items():
        with problems.collect():
            if name in FIELDS:
                FIELDS[name].check(name, value)
            accepted[name] = value
    return text if len(accepted) == len(fields) else json.dumps(accepted).encode()


def _read_header(
    folder: Path, limits: Limits, problems: _ProblemList
) -> tuple[Header | None, int | None]:
    """Return the header if it is well-formed, and the size of all weight files if there are any."""
    header = nbytes = None
    with problems.collect(WEIGHTS):
        file = _open(folder, WEIGHTS)
        if file is not None:
            with file:
                nbytes = os.fstat(file.fileno()).st_size
                first = file.read(LENGTH_BYTES)
                rest = file.read(header_size(first, nbytes) - LENGTH_BYTES)
            header = parse_header(first + rest, nbytes)
        elif (folder / INDEX).exists():
            header, nbytes = read_header(folder, limits)
    return header, nbytes


class _LoraTensor(NamedTuple):
    span: TensorSpan
    name: TensorName
    layer: int | None


def _lora_tensors(header: Header | None, problems: _ProblemList) -> list[_LoraTensor]:
    """Return the tensors of A and B matrices; report the others."""
    tensors = []
    for span in header.tensors if header is not None else ():
        with problems.collect():
            name = parse_tensor_name(span.name)
            tensors.append(_LoraTensor(span, name, layer_index(name.module)))
    return tensors


def _plan(
    folder: Path, header: Header, spec: AdapterSpec, layout: ModelLayout | None, limits: Limits
) -> TransferPlan:
    return plan_transfer(
        header,
        spec,
        layout or layouts.from_adapter(folder, limits=limits),
        dtype=None,
        alignment=CpuDevice.alignment,
        rank_multiple=CpuDevice.rank_multiple,
        limits=limits,
        staging_move_bytes=MOVE_BYTES,
    )


def _targets(tensors: Iterable[_LoraTensor], spec: AdapterSpec | None) -> tuple[TargetModules, ...]:
    groups: dict[str, list[_LoraTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.name.module.rpartition(".")[2], []).append(tensor)
    return tuple(_target(name, groups[name], spec) for name in sorted(groups))


def _target(name: str, tensors: Sequence[_LoraTensor], spec: AdapterSpec | None) -> TargetModules:
    modules = {tensor.name.module for tensor in tensors}
    a, b = _shapes(tensors, TensorRole.A), _shapes(tensors, TensorRole.B)
    return TargetModules(
        name=name,
        modules=len(modules),
        layers=tuple(sorted({t.layer for t in tensors if t.layer is not None})),
        ranks=tuple(sorted({shape[0] for shape in a.values()})),
        scales=() if spec is None else tuple(sorted({spec.scale_of(m) for m in modules})),
        shapes=tuple(sorted({(a[m][1], b[m][0]) for m in a.keys() & b.keys()})),
        dtypes=tuple(sorted({tensor.span.dtype for tensor in tensors})),
        nbytes=sum(tensor.span.stop - tensor.span.start for tensor in tensors),
    )


def _shapes(tensors: Iterable[_LoraTensor], part: TensorRole) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name.module: tensor.span.shape
        for tensor in tensors
        if tensor.name.part is part and len(tensor.span.shape) == 2
    }


def add_to(add: AddParser) -> None:
    about = "describe an adapter, and list every reason to refuse it"
    more = f"Of a remote adapter, config and header are downloaded, and not kept. {TOKENS}"
    parser = add_command(add, "inspect", about, _inspect, more)
    parser.add_argument(
        "path", type=as_place, metavar="PATH", help=f"the adapter's folder, or else {ID_HELP}"
    )
    add_base(parser, required=False)
    add_sources(parser)


def _inspect(arguments: argparse.Namespace, terminal: Terminal) -> int:
    base: str | None = arguments.base
    layout = read_layout(base, terminal) if base is not None else None
    inspection = _inspect_path(arguments, layout, terminal)
    if arguments.json:
        terminal.json({"loadable": inspection.loadable} | asdict(inspection))
    else:
        _show_inspection(inspection, terminal)
    return OK if inspection.loadable else REFUSED


def _inspect_path(
    arguments: argparse.Namespace, layout: ModelLayout | None, terminal: Terminal
) -> Inspection:
    ref: AdapterRef = arguments.path
    if isinstance(ref.id, Path):
        return inspect_adapter(ref.id, layout, arguments.base)
    with terminal.steps() as report:
        report(f"downloading config and header of {ref.text}")
        metadata = download_metadata(ref, loader_settings(arguments, [ref]))
    with metadata.as_folder() as folder:
        inspection = inspect_adapter(folder, layout, arguments.base)
    return replace(inspection, path=ref.text, file_bytes=metadata.file_bytes)


def _show_inspection(inspection: Inspection, terminal: Terminal) -> None:
    verdict, style = ("can be loaded", "green") if inspection.loadable else ("refused", "bold red")
    terminal.say(f"{inspection.path}: {verdict}", style)
    for problem in inspection.problems:
        terminal.say(f"  {problem.error}: {problem.text}")
    if inspection.problems_left_out:
        terminal.say(f"  … and {inspection.problems_left_out} more")
    terminal.say()
    terminal.pairs(list(_facts(inspection)))
    if inspection.targets:
        columns = ("target", " modules", "layers", "rank", "scale", "in → out", "dtype", " bytes")
        terminal.table(columns, [_target_row(target) for target in inspection.targets])


def _facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    for name, value in inspection.config.items():
        if value not in (None, [], {}):
            yield name, json.dumps(value, ensure_ascii=False)
    yield "checked against", inspection.base or "itself; use --base to check it against a base"
    if inspection.file_bytes is not None:
        yield "file", f"{inspection.file_bytes:,} bytes"
    if inspection.device_bytes is not None:
        yield "on a device", f"{inspection.device_bytes:,} bytes as {inspection.device_dtype}"


def _target_row(target: TargetModules) -> tuple[str, ...]:
    return (
        target.name,
        str(target.modules),
        format_runs(target.layers),
        ", ".join(map(str, target.ranks)),
        ", ".join(f"{scale:g}" for scale in target.scales),
        ", ".join(f"{into} → {out}" for into, out in target.shapes),
        ", ".join(target.dtypes),
        f"{target.nbytes:,}",
    )
