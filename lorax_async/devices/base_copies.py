"""Compare the copies of a base's own weights in adapters' files with the base.

PEFT writes the weights of `embed_tokens` and `lm_head` beside A and B where these are targeted. It
loads them into the base, so a copy that differs changes the answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Lock
from typing import Any

import torch

from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer
from lorax_async.errors import IncompatibleAdapterError, UnsupportedAdapterError, shorten
from lorax_async.files import HASH_STEP_BYTES, Reader
from lorax_async.planning.sharding import Sharding
from lorax_async.planning.transfer_plan import BaseCopy

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_REMEDY = (
    "save the adapter with save_pretrained(…, save_embedding_layers=False), or set base_copies to"
    " 'trust' if it was trained on this base"
)


def plain_weight(module: Any) -> torch.Tensor | None:
    """Return a module's weight, or None if it is packed or has no memory.

    Any type but torch's own is packed, whatever dtype and shape it reports.
    """
    weight: object = getattr(module, "weight", None)
    if type(weight) not in {torch.Tensor, torch.nn.Parameter} or not isinstance(
        weight, torch.Tensor
    ):
        return None
    return weight.detach() if weight.is_floating_point() and not weight.is_meta else None


@dataclass(eq=False)
class BaseCopies:
    """The base's weights by their digests, each computed once. Thread-safe.

    They are those of the attached model; without one, those of the base's files, if these are on
    this machine: in the folder, or in the standard hub cache, that `layout.base` names.
    """

    sharding: Sharding
    _model: Mapping[int, torch.Tensor] = field(default_factory=dict, init=False)
    _digests: dict[tuple[int, str], str | None] = field(default_factory=dict, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    def use_model(self, modules: Iterable[Any]) -> None:
        """Compare with the weights of these modules, in the layout's order; with none, by files."""
        weights = {n: plain_weight(module) for n, module in enumerate(modules)}
        with self._lock:
            self._model = {n: weight for n, weight in weights.items() if weight is not None}
            self._digests.clear()

    def require_comparable(self, copies: Sequence[BaseCopy]) -> None:
        """Raise `UnsupportedAdapterError` if no base is known to compare copies with. No I/O."""
        for copy in copies if not self.sharding.whole.base else ():
            if copy.module not in self._model:
                raise self._unknown_error(copy.module)

    def require_equal(self, copy: BaseCopy, reader: Reader) -> None:
        """Raise `IncompatibleAdapterError` if a copy differs from the base's weight. Blocks."""
        expected = self._digest(copy.module, copy.dtype)
        if expected is None:
            raise self._unknown_error(copy.module)
        found = sha256()
        buffer = bytearray(HASH_STEP_BYTES)
        for source in copy.sources:
            for first in range(0, source.nbytes, HASH_STEP_BYTES):
                for piece in source.cut(first, min(source.nbytes, first + HASH_STEP_BYTES)):
                    content = memoryview(buffer)[: piece.nbytes]
                    reader.read_into([content], piece.start, piece.rows, piece.pitch)
                    found.update(content)
        if found.hexdigest() != expected:
            raise IncompatibleAdapterError(
                f"its copy of the base's weight of {self._name(copy.module)!r} differs from the"
                " base's, and PEFT would load it into the base; use the base it was trained on, or"
                f" {_REMEDY}"
            )

    def _digest(self, module: int, dtype: str) -> str | None:
        with self._lock:
            if (module, dtype) not in self._digests:
                weight = self._model.get(module)
                pieces = self._pieces_of_file(module) if weight is None else _pieces(weight)
                self._digests[module, dtype] = _digest_of(pieces, TORCH_DTYPES[dtype])
            return self._digests[module, dtype]

    def _name(self, module: int) -> str:
        return shorten(self.sharding.whole.modules[module].name, 200)

    def _unknown_error(self, module: int) -> UnsupportedAdapterError:
        return UnsupportedAdapterError(
            f"it has a copy of the base's weight of {self._name(module)!r}, and there is no base to"
            " compare it with: no model is attached, and the layout names no folder with the base's"
            f" safetensors files; {_REMEDY}"
        )

    # -- the base's files --------------------------------------------------------------------------

    def _file_of(self, module: int) -> tuple[str, str] | None:
        """Return the file with a module's weight, and its name there; None if there is none."""
        layout = self.sharding.whole
        folder = _folder_of(layout.base)
        files = {} if folder is None else _read_files(folder)
        names = [layout.modules[module].name]
        if not layout.modules[module].embedding:  # a head without a weight of its own is tied
            names += [other.name for other in layout.modules if other.embedding][:1]
        for name in names:
            for known in (name, name.removeprefix(layout.backbone_prefix)):
                if path := files.get(f"{known}.weight"):
                    return path, f"{known}.weight"
        return None

    def _pieces_of_file(self, module: int) -> Iterator[torch.Tensor] | None:
        found = self._file_of(module)
        if found is None:
            return None
        path, name = found
        rows: tuple[tuple[int, int], ...] = (
            (0, self.sharding.whole.modules[module].weight_shape[0]),
        )
        if self.sharding.cuts and not self.sharding.whole.modules[module].embedding:
            rows = self.sharding.cuts[module].rows
        return _file_pieces(path, name, rows)


def _folder_of(base: str) -> str | None:
    """Return the folder of a base's files on this machine, without a request."""
    if os.path.isdir(base):
        return base
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (slow)

    name, _, revision = base.partition("@")
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except (OSError, ValueError):
        return None
    return os.path.dirname(found) if isinstance(found, str) else None


def _open(path: str) -> Any:
    """Open a safetensors file. Raises `OSError`, also for one that is damaged."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 (not for every import)

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(f"{path} is damaged: {error}") from error


def _read_files(folder: str) -> Mapping[str, str]:
    """Return the file of each tensor of a base in safetensors; none if it has no such files."""
    try:
        if os.path.exists(f"{folder}/{_INDEX}"):
            with open(f"{folder}/{_INDEX}", encoding="utf-8") as index:
                files: Mapping[str, str] = json.load(index)["weight_map"]
            return {name: f"{folder}/{os.path.basename(file)}" for name, file in files.items()}
        with _open(f"{folder}/{_WEIGHTS}") as weights:
            return dict.fromkeys(weights.keys(), f"{folder}/{_WEIGHTS}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def _file_pieces(path: str, name: str, rows: Iterable[tuple[int, int]]) -> Iterator[torch.Tensor]:
    with _open(path) as weights:
        weight: Any = weights.get_slice(name)
        step = _step(weight.get_shape(), 4)
        for first, last in rows:
            for start in range(first, last, step):
                yield weight[start : min(last, start + step)]


def _pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(weight, _step(weight.shape, weight.element_size()))


def _step(shape: Sequence[int], item: int) -> int:
    return max(1, HASH_STEP_BYTES // (item * max(1, shape[-1])))


def _digest_of(pieces: Iterable[torch.Tensor] | None, dtype: torch.dtype) -> str | None:
    """Return the SHA-256 of rows once cast to `dtype`; None if they cannot be read."""
    if pieces is None:
        return None
    digest = sha256()
    try:
        for piece in pieces:
            content = piece.to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
            digest.update(StagingBuffer.of(content).memory)
    except OSError:
        return None
    return digest.hexdigest()
