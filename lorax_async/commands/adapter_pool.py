"""The adapters of a plan: folders, lists in a file, or so many of a rank that nobody has yet."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.core.header import parse_header
from lorax_async.core.header_writing import Described, write_header
from lorax_async.core.layout import ModelLayout, Module
from lorax_async.core.life import Needs
from lorax_async.core.peft_config import parse_config
from lorax_async.core.transfer_plan import TransferPlan, plan_transfer
from lorax_async.errors import ConfigError, LoraxError, shorten
from lorax_async.io.sources.local_folder import CONFIG, find_adapter
from lorax_async.io.sources.local_ids import parse_place
from lorax_async.io.sources.local_weights import open_weights
from lorax_async.runtime.machinery import MOVE_BYTES

_MANY = re.compile(r"([0-9]{1,9})x([0-9]{1,4})")
_NUMBER = re.compile("[0-9]{1,18}")
MOST = 10_000_000


class Target(NamedTuple):
    """Where they are to go: `dtype` as the file format spells it, None for the layout's."""

    layout: ModelLayout
    dtype: str | None
    alignment: int
    rank_multiple: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Adapters that need the same. `rank` is None where only bytes are known."""

    rank: int | None
    needs: Needs

    @property
    def device_bytes(self) -> int:
        return sum(self.needs.group_nbytes)

    @property
    def file_bytes(self) -> int:
        return self.needs.file_nbytes


@dataclass(slots=True)
class Pool:
    """The adapters, each by its position; `kinds` and `names` are equally long."""

    kinds: list[Kind] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, kind: Kind, count: int = 1) -> None:
        """So many of a kind; where they are several each has its number."""
        if len(self.names) + count > MOST:
            raise ConfigError(f"a plan is for {MOST:,} adapters at most")
        self.kinds += [kind] * count
        self.names += [name] if count == 1 else [f"{name}/{number}" for number in range(count)]


class Reckoning:
    """What adapters need of one device. Blocks where they are on the disk.

    Parameters
    ----------
    file_dtype
        Of the files of adapters that are not on the disk, in the file format's spelling.
    targets
        The last parts of the names of the modules that those adapt; empty: all that are linear and
        in the layers.
    """

    def __init__(self, target: Target, file_dtype: str, targets: Sequence[str]) -> None:
        self._target = target
        self._file_dtype = file_dtype
        self._targets = targets
        self._limits = Limits()
        self.of_rank = lru_cache(maxsize=None)(self._of_rank)
        self.of_bytes = lru_cache(maxsize=None)(self._of_bytes)
        self._planned = lru_cache(maxsize=64)(self._plan)

    def of_folder(self, folder: Path) -> Kind:
        """Of an adapter on the disk, as a load would find it. Raises what a load would raise."""
        try:
            return self._found(folder)
        except LoraxError as error:
            raise error.located(id=str(folder)) from error

    def _found(self, folder: Path) -> Kind:
        key = find_adapter(parse_place(AdapterRef(folder), ()), (), self._limits)
        config = (folder / CONFIG).read_bytes()
        weights = open_weights(key, self._limits)
        try:
            return self._planned(config, weights.prefix, weights.reader.nbytes)
        finally:
            weights.reader.close()

    def _of_rank(self, rank: int) -> Kind:
        """Of an adapter with this rank on every module that is adapted."""
        modules = self._modules()
        prefix, places = write_header(_tensors(modules, rank, self._file_dtype))
        names = sorted({module.name.rpartition(".")[2] for module in modules})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
        return self._planned(json.dumps(config).encode(), prefix, places[-1][1])

    def _of_bytes(self, nbytes: int) -> Kind:
        """Of one whose bytes are all that is known: in equal parts, one for each layer."""
        layers, alignment = self._target.layout.num_layers, self._target.alignment
        if nbytes < 1:
            raise ConfigError(f"an adapter has 1 byte or more, not {nbytes}")
        group = -(-nbytes // layers // alignment) * alignment
        return Kind(None, Needs((max(group, alignment),) * layers, file_nbytes=nbytes))

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

    def _plan(self, config: bytes, prefix: bytes, nbytes: int) -> Kind:
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
        return Kind(plan.rank, plan.needs(holdable=False))


def _tensors(modules: Sequence[Module], rank: int, dtype: str) -> Iterator[Described]:
    for module in modules:
        name = f"base_model.model.{module.name}"
        yield Described(f"{name}.lora_A.weight", dtype, (rank, module.in_features))
        yield Described(f"{name}.lora_B.weight", dtype, (module.out_features, rank))


def read_pool(given: Sequence[str], reckoning: Reckoning) -> Pool:
    """The adapters of `--adapters`. Raises `ConfigError`, and what a load of one would raise."""
    pool = Pool()
    for text in given:
        for name, kind, count in _adapters(text, reckoning):
            pool.add(name, kind, count)
    return pool


def _adapters(text: str, reckoning: Reckoning) -> Iterator[tuple[str, Kind, int]]:
    path, many = Path(text), _MANY.fullmatch(text)
    if path.is_dir():
        yield from _below(path, reckoning)
    elif path.is_file():
        for row in _rows(path):
            yield _listed(row, path, reckoning)
    elif many is not None:
        yield f"r{int(many[2])}", reckoning.of_rank(int(many[2])), int(many[1])
    else:
        raise ConfigError(f"{shorten(text)!r} is no folder, no file, and not as 10000x16")


def _below(folder: Path, reckoning: Reckoning) -> Iterator[tuple[str, Kind, int]]:
    found = [folder] if (folder / CONFIG).exists() else []
    found = found or sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise ConfigError(f"{folder} is no adapter, and holds none")
    for each in found:
        yield each.resolve().name, reckoning.of_folder(each), 1


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


def _listed(row: Mapping[str, Any], path: Path, reckoning: Reckoning) -> tuple[str, Kind, int]:
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
        kind = reckoning.of_folder(path.parent / str(row[word]))
    else:
        reckon = reckoning.of_rank if word == "rank" else reckoning.of_bytes
        kind = reckon(_number(row[word], word, path))
    return name, kind, count


def _number(value: object, what: str, path: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not _NUMBER.fullmatch(text) or not int(text):
        raise ConfigError(f"{path}: {what} is a whole number of 1 or more, not {shorten(text)!r}")
    return int(text)
