"""Two hundred adapters of 0.1 to 16 MB that nobody has to keep: their bytes follow from a seed.

Both processes of a soak make the same ones. Needs neither torch nor this package.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property

COUNT = 200
LAYERS = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
HIDDEN = 512
ITEM = 2
"""Bytes of a bfloat16."""

MODULES = tuple(
    f"model.layers.{layer}.self_attn.{target}" for layer in range(LAYERS) for target in TARGETS
)
BYTES_PER_RANK = len(MODULES) * 2 * HIDDEN * ITEM
LARGEST = 256 * BYTES_PER_RANK

_PERIOD = 1_000_003
"""A prime: what is read from a wrong place is no other place's bytes."""
_STRIDE = 7_919


@dataclass(frozen=True)
class Stored:
    """One adapter as its source has it.

    `promised`: the source tells the digests of its files before they are read.
    """

    number: int
    rank: int
    pattern: bytes

    @property
    def name(self) -> str:
        return f"a{self.number:03d}"

    @property
    def promised(self) -> bool:
        return self.number % 2 == 0

    @cached_property
    def config(self) -> bytes:
        said = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": 8,
            "target_modules": list(TARGETS),
        }
        return json.dumps(said).encode()

    @cached_property
    def header(self) -> bytes:
        """As safetensors writes it, the tensors in the order of their names."""
        fields, at = {}, 0
        for name, shape in sorted(_shapes(self.rank).items()):
            nbytes = shape[0] * shape[1] * ITEM
            fields[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Of the weights' file."""
        return len(self.header) + self.rank * BYTES_PER_RANK

    def weights(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of the weights' file."""
        stop = self.nbytes if stop is None else stop
        first, last = max(0, start - len(self.header)), max(0, stop - len(self.header))
        return self.header[start:stop] + self._data(first, last - first)

    def _data(self, at: int, count: int) -> bytes:
        first = (at + self.number * _STRIDE) % _PERIOD
        return (self.pattern * (count // _PERIOD + 2))[first : first + count]

    @cached_property
    def digests(self) -> tuple[str, str]:
        """sha256 of config and weights."""
        contents = (self.config, self.weights())
        first, second = (hashlib.sha256(data).hexdigest() for data in contents)
        return first, second

    @property
    def version(self) -> str:
        """What stands in its ETags."""
        return hashlib.sha1(f"{self.name} {self.rank}".encode() + self.pattern[:64]).hexdigest()


def library(seed: int) -> tuple[Stored, ...]:
    """All adapters, the most popular one first; their sizes are spread evenly by their logarithms."""
    draw = random.Random(seed)
    pattern = draw.randbytes(_PERIOD)
    ranks = [round(2 * 128 ** (n / (COUNT - 1))) for n in range(COUNT)]
    draw.shuffle(ranks)
    return tuple(Stored(number, rank, pattern) for number, rank in enumerate(ranks))


def _shapes(rank: int) -> dict[str, list[int]]:
    """By the names that PEFT gives them in a file."""
    shapes = {}
    for module in MODULES:
        name = f"base_model.model.{module}"
        shapes[f"{name}.lora_A.weight"] = [rank, HIDDEN]
        shapes[f"{name}.lora_B.weight"] = [HIDDEN, rank]
    return shapes
