"""Adapters and bases in folders, and a terminal, for tests of the command line."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"

# SmolLM2-135M's; 30 layers of hidden size 576, 9 heads of 64, 3 of them for keys and values.
CONFIG: dict[str, object] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CONFIG |= {
    "dtype": "bfloat16",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
}
CONFIG |= {"num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152}


def base(folder: Path, **changes: object) -> str:
    """Write a base's folder; the command line needs only the config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)


def tiny_base(folder: Path) -> str:
    """Write a base with the tiny adapters' shapes: q_proj and up_proj from 32 to 64."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "dtype": "float32"}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64}
    return base(folder, **heads, **sizes)


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> str:
    """Write an adapter of rank 8 for q_proj, with these tensors and config changes."""
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return str(folder)


def query(layer: int, rank: int = 8) -> dict[str, torch.Tensor]:
    """Return A and B of one layer's q_proj."""
    path = f"model.layers.{layer}.self_attn.q_proj.lora_"
    return {f"{path}A.weight": torch.ones(rank, 576), f"{path}B.weight": torch.ones(576, rank)}


def output(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the JSON value on stdout."""
    return json.loads(capsys.readouterr().out)


def on_a_terminal(arguments: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start `lorax-async` on a pseudo-terminal; return the process and the terminal's end."""
    mine, theirs = os.openpty()
    command = [sys.executable, "-m", "lorax_async", *arguments]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    return process, mine


def read_until(fd: int, text: bytes | None = None) -> bytes:
    """Read the terminal until it shows `text`; with None, until the program ends."""
    seen = b""
    while text is None or text not in seen:
        try:
            part = os.read(fd, 65_536)
        except OSError as error:  # so Linux reports that the other side is closed
            assert error.errno == errno.EIO, error
            part = b""
        if not part:
            assert text is None, seen
            break
        seen += part
    return seen
