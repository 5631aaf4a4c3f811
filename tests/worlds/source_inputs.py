"""Adapters for tests of sources, and reads of their bytes."""

import json
import struct

import pytest
import safetensors.torch
import torch

from lorax_async.files import Reader
from lorax_async.formats.spans import ByteSpan

CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}).encode()
LAYERS = 3


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.layers.{layer}.q.lora_{part}.weight": torch.randn(4, 24, generator=draw)
        for layer in range(LAYERS)
        for part in "AB"
    }


def weights(seed: int, metadata: dict[str, str] | None = None) -> bytes:
    content: bytes = safetensors.torch.save(tensors(seed), metadata or {"format": "pt"})
    return content


def header_bytes(content: bytes) -> int:
    return 8 + int(struct.unpack_from("<Q", content)[0])


def groups_of(content: bytes) -> list[list[ByteSpan]]:
    """Return groups with the last third first, so that their order is not the file's."""
    first, size = header_bytes(content), len(content)
    third = (size - first) // 3
    middle = first + third
    cuts = [(size - third, size), (first, middle), (middle, size - third)]
    return [[ByteSpan(start, stop)] for start, stop in cuts]


def read(reader: Reader, start: int, stop: int) -> bytes:
    content = bytearray(stop - start)
    reader.read_into([memoryview(content)], start)
    return bytes(content)


def read_rows(reader: Reader, span: ByteSpan) -> bytes:
    """Return rows that lie apart in the file."""
    content = bytearray(span.nbytes)
    reader.read_into([memoryview(content)], span.start, span.rows, span.pitch)
    return bytes(content)


def cannot_read(reader: Reader, span: ByteSpan, kind: type[Exception], words: str) -> None:
    """Assert that neither its rows nor the range around them can be read."""
    stop = max(stop for _, stop in span.ranges())
    with pytest.raises(kind, match=words):
        read(reader, span.start, stop)
    with pytest.raises(kind, match=words):
        read_rows(reader, span)


def rows_of(content: bytes, span: ByteSpan) -> bytes:
    return b"".join(content[start:stop] for start, stop in span.ranges())
