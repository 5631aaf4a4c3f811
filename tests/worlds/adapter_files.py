"""Adapter files in memory, with tensors in any order; execution of plans by torch on the CPU."""

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorax_async.config import Limits
from lorax_async.formats.safetensors import parse_header
from lorax_async.formats.spans import ByteSpan
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.planning.transfer_plan import GroupPlan, TransferPlan, plan_transfer
from lorax_async.types import AdapterSpec

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS = {dtype: word for word, dtype in TORCH.items()}
POISON = 0xA5
ALIGNMENT = 64


def file_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """Return a safetensors file with the tensors' bytes in this order."""
    entries: dict[str, object] = {}
    body = b""
    for name, tensor in tensors:
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "dtype": WORDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + body


def pad_header(weights: Path, nbytes: int) -> None:
    """Append blanks to a header, which safetensors' format allows."""
    content = weights.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].ljust(nbytes)
    weights.write_bytes(nbytes.to_bytes(8, "little") + header + content[end:])


def pair(
    path: str,
    inputs: int,
    outputs: int,
    *,
    rank: int = 16,
    dtype: str = "BF16",
    vector: str | None = None,
    own: str = "F32",
    embedding: bool = False,
) -> list[tuple[str, torch.Tensor]]:
    """Return what PEFT writes for one module: A, B, and a vector of dtype `own`."""
    stem, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
    made = [
        (f"base_model.model.{path}.{stem}A{end}", torch.randn(rank, inputs).to(TORCH[dtype])),
        (f"base_model.model.{path}.{stem}B{end}", torch.randn(outputs, rank).to(TORCH[dtype])),
    ]
    if vector is not None:
        made.append((f"base_model.model.{path}.{vector}", torch.randn(outputs).to(TORCH[own])))
    return made


def layout_of(
    *modules: tuple[str, int, int, int], num_layers: int = 12, transposed: bool = False
) -> ModelLayout:
    """Return a BF16 layout of (name, in, out, layer); the model's backbone is `model`."""
    made = tuple(Module(*module, Parallelism.COLUMN, transposed) for module in modules)
    return ModelLayout(made, num_layers, "BF16", "model.")


def plan(file: bytes, spec: AdapterSpec, layout: ModelLayout, **how: Any) -> TransferPlan:
    plain: dict[str, Any] = {
        "dtype": None,
        "alignment": ALIGNMENT,
        "rank_multiple": 1,
        "limits": Limits(),
    }
    plain |= {"staging_move_bytes": 1 << 20, "cuts": ()}
    return plan_transfer(parse_header(file, len(file)), spec, layout, **(plain | how))


def content_of(spans: Iterable[ByteSpan], file: bytes) -> bytes:
    """Return the bytes of all rows, concatenated."""
    return b"".join(file[start:stop] for span in spans for start, stop in span.ranges())


def carry_out(group: GroupPlan, file: bytes, dtype: str) -> torch.Tensor:
    """Return the extent after the group's moves; assert that they neither overlap nor leave it."""
    extent = torch.full((group.nbytes,), POISON, dtype=torch.uint8)
    written = torch.zeros(group.nbytes, dtype=torch.int32)

    def write(target: int, content: torch.Tensor) -> None:
        flat = content.contiguous().view(torch.uint8).flatten()
        extent[target : target + len(flat)] = flat
        written[target : target + len(flat)] += 1
        assert target + len(flat) <= group.nbytes

    for read in group.reads:
        data = content_of([read.source], file)
        assert len(data) == read.nbytes
        write(read.target, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    for convert in group.converts:
        data = content_of(convert.sources, file)
        assert len(data) == convert.nbytes
        source = torch.frombuffer(bytearray(data), dtype=TORCH[convert.source_dtype])
        content = torch.zeros(convert.rows, convert.row_pitch, dtype=TORCH[dtype])
        content[:, : convert.columns] = source.reshape(convert.rows, convert.columns)
        write(convert.target, content)
    for zero in group.zeros:
        write(zero.target, torch.zeros(zero.nbytes, dtype=torch.uint8))
    assert written.max() <= 1
    return extent


def matrix(extent: torch.Tensor, offset: int, rows: int, columns: int, dtype: str) -> torch.Tensor:
    """Return the matrix at `offset` of an extent."""
    nbytes = rows * columns * TORCH[dtype].itemsize
    return extent[offset : offset + nbytes].view(TORCH[dtype]).reshape(rows, columns)
