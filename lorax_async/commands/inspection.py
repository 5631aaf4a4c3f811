"""What an adapter on disk is, and everything a load of it would object to. Blocks; loads nothing.

A load stops at the first problem. This goes on as far as each part allows, so that one look shows
all of them, and describes what can be read of an adapter that is refused.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lorax_async import layouts
from lorax_async.adapter import AdapterRef, AdapterSpec
from lorax_async.config import Limits
from lorax_async.core.header import LENGTH_BYTES, Header, TensorSpan, header_size, parse_header
from lorax_async.core.layout import ModelLayout
from lorax_async.core.peft_config import parse_config
from lorax_async.core.peft_fields import FIELDS
from lorax_async.core.peft_names import Part, TensorName, layer_index, parse_tensor_name
from lorax_async.core.split_index import INDEX
from lorax_async.core.strict_json import JsonValue, parse_object
from lorax_async.core.transfer_plan import TransferPlan, plan_transfer
from lorax_async.errors import LoraxError
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.sources.checked_open import located, require_file, translated
from lorax_async.io.sources.local_folder import CONFIG, WEIGHTS, find_adapter
from lorax_async.io.sources.local_ids import parse_place
from lorax_async.io.sources.local_weights import read_header
from lorax_async.runtime.machinery import MOVE_BYTES

SHOWN = (
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
"""The fields of the config that say what the adapter is."""

MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a load would be refused: the error's class and text."""

    error: str
    text: str


@dataclass(frozen=True, slots=True)
class Target:
    """The adapter's modules of one name; each tuple holds the distinct values, sorted.

    `scales` are empty while the config is refused; `shapes` are (in, out) of the modules.
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
    """Everything that could be found out. Bytes; None is what could not.

    `problems_left_out` counts those beyond the first `MAX_PROBLEMS`.
    """

    path: str
    base: str | None
    config: dict[str, JsonValue]
    targets: tuple[Target, ...]
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
    """Read config and header of the adapter in `folder` and check them as a load would.

    Parameters
    ----------
    folder
        The program's own word: links are followed.
    layout
        The base to check it against, called `base`; None checks only that it agrees with itself.

    Raises nothing for an adapter's faults: they are the inspection's `problems`.
    """
    limits, seen = Limits(), _Problems()
    with seen.noted():
        find_adapter(parse_place(AdapterRef(folder), ()), (), limits)
    fields, spec = _read_config(folder, limits, seen)
    header, file_bytes = _read_header(folder, limits, seen)
    tensors = _lora_tensors(header, seen)
    plan = None
    if spec is not None and header is not None:
        with seen.noted():
            plan = _plan(folder, header, spec, layout, limits)
    return Inspection(
        path=str(folder),
        base=base,
        config={name: fields[name] for name in SHOWN if name in fields},
        targets=_targets(tensors, spec),
        tensors=None if header is None else len(header.tensors),
        file_bytes=file_bytes,
        device_bytes=None if plan is None else plan.nbytes,
        device_dtype=None if plan is None else plan.dtype,
        problems=tuple(seen.found[:MAX_PROBLEMS]),
        problems_left_out=max(0, len(seen.found) - MAX_PROBLEMS),
    )


class _Problems:
    """Collects each problem once, in the order in which they are met."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self._texts: set[str] = set()

    @contextmanager
    def noted(self, what: str = "the adapter") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._note(translated(error, what))
        except LoraxError as error:
            self._note(error)

    def _note(self, error: LoraxError) -> None:
        if error.problem not in self._texts:
            self._texts.add(error.problem)
            self.found.append(Problem(type(error).__name__, error.problem))


def _open(folder: Path, name: str) -> BinaryIO | None:
    """The file if it is one and there is one; `find_adapter` has complained of one that is not."""
    try:
        with located(str(folder / name)) as found:
            require_file(name, found, sys.maxsize)
            return os.fdopen(found.open(), "rb")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_config(
    folder: Path, limits: Limits, seen: _Problems
) -> tuple[dict[str, JsonValue], AdapterSpec | None]:
    """The fields as far as they are JSON, and what they mean if all are accepted."""
    fields: dict[str, JsonValue] = {}
    spec = None
    with seen.noted(CONFIG):
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
            spec = parse_config(_accepted(text, fields, seen), limits)
    return fields, spec


def _accepted(text: bytes, fields: Mapping[str, JsonValue], seen: _Problems) -> bytes:
    """The config without the fields that are refused, for `parse_config` stops at the first."""
    accepted = {}
    for name, value in fields.items():
        with seen.noted():
            if name in FIELDS:
                FIELDS[name].check(name, value)
            accepted[name] = value
    return text if len(accepted) == len(fields) else json.dumps(accepted).encode()


def _read_header(folder: Path, limits: Limits, seen: _Problems) -> tuple[Header | None, int | None]:
    """The header if it is well-formed, and the size of the file, or files, if there is one."""
    header = nbytes = None
    with seen.noted(WEIGHTS):
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


class _Tensor(NamedTuple):
    span: TensorSpan
    name: TensorName
    layer: int | None


def _lora_tensors(header: Header | None, seen: _Problems) -> list[_Tensor]:
    """The tensors that are applied; the others are problems."""
    tensors = []
    for span in header.tensors if header is not None else ():
        with seen.noted():
            name = parse_tensor_name(span.name)
            tensors.append(_Tensor(span, name, layer_index(name.module)))
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


def _targets(tensors: Iterable[_Tensor], spec: AdapterSpec | None) -> tuple[Target, ...]:
    groups: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.name.module.rpartition(".")[2], []).append(tensor)
    return tuple(_target(name, groups[name], spec) for name in sorted(groups))


def _target(name: str, tensors: Sequence[_Tensor], spec: AdapterSpec | None) -> Target:
    modules = {tensor.name.module for tensor in tensors}
    a, b = _shapes(tensors, Part.A), _shapes(tensors, Part.B)
    return Target(
        name=name,
        modules=len(modules),
        layers=tuple(sorted({t.layer for t in tensors if t.layer is not None})),
        ranks=tuple(sorted({shape[0] for shape in a.values()})),
        scales=() if spec is None else tuple(sorted({spec.scale_of(m) for m in modules})),
        shapes=tuple(sorted({(a[m][1], b[m][0]) for m in a.keys() & b.keys()})),
        dtypes=tuple(sorted({tensor.span.dtype for tensor in tensors})),
        nbytes=sum(tensor.span.stop - tensor.span.start for tensor in tensors),
    )


def _shapes(tensors: Iterable[_Tensor], part: Part) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name.module: tensor.span.shape
        for tensor in tensors
        if tensor.name.part is part and len(tensor.span.shape) == 2
    }
