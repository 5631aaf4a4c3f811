"""How others load an adapter: each with the calls that its documentation shows, into one arena.

A peer that is missing is an error, for a table without it would look better than it is.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from work_files import PEFT_PREFIX, AdapterFolder, module_paths

Places = Mapping[str, torch.Tensor]
"""Tensor name → where its values go, in the dtype wanted there."""

DISTRIBUTIONS = {
    "safetensors": "safetensors",
    "peft": "peft",
    "runai_model_streamer": "runai-model-streamer",
    "fastsafetensors": "fastsafetensors",
}


class MissingPeerError(ModuleNotFoundError):
    """A peer is not installed."""


def require(name: str) -> ModuleType:
    """Import a peer, or say how to get it."""
    os.environ.setdefault("RUNAI_STREAMER_LOG_LEVEL", "ERROR")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeerError(
            f"the peer {name!r} cannot be imported ({error}); `make bench` installs it, or:"
            " pip install 'lorax-async[bench]'"
        ) from error


def require_all() -> dict[str, str]:
    """Import every peer; their versions by name of distribution."""
    for module in DISTRIBUTIONS:
        require(module)
    return {name: version(name) for name in DISTRIBUTIONS.values()}


def safetensors_load_file(weights: Path, places: Places) -> None:
    """safetensors' load_file (a map of the file, then views), then one copy per tensor."""
    for name, tensor in load_file(weights).items():
        places[name].copy_(tensor)


def safetensors_safe_open(weights: Path, places: Places) -> None:
    """The loop that engines use: safe_open, get_tensor, copy."""
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no Mapping)
            places[name].copy_(file.get_tensor(name))


def runai_streamer(weights: Path, places: Places) -> None:
    """Run:ai model streamer, with its default concurrency; its buffers are reused (owned=False)."""
    streamer = require("runai_model_streamer")
    with streamer.SafetensorsStreamer() as stream:
        stream.stream_file(str(weights), owned=False)
        for name, tensor in stream.get_tensors():
            places[name].copy_(tensor)


def fastsafetensors(weights: Path, places: Places) -> None:
    """fastsafetensors on the CPU: without GPUDirect (`nogds`), default threads."""
    package = require("fastsafetensors")
    loader = package.SafeTensorsFileLoader(package.SingleGroup(), device="cpu", nogds=True)
    try:
        loader.add_filenames({0: [str(weights)]})
        buffers = loader.copy_files_to_device()
        try:
            for name in loader.get_keys():
                places[name].copy_(buffers.get_tensor(name))
        finally:
            buffers.close()
    finally:
        loader.close()


class PeftBase:
    """A base of the work's shapes with an adapter attached, whose weights take no memory.

    Each linear's weight is one number, expanded. What is loaded is the adapter, which PEFT keeps
    in parameters of its own (not in the arena).
    """

    def __init__(self, first: AdapterFolder) -> None:
        peft = require("peft")
        with warnings.catch_warnings():
            # peft 0.21.2 asks the base for an attribute of that name, which warns in torch.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            self.model: Any = peft.PeftModel.from_pretrained(
                _base(), str(first.path), autocast_adapter_dtype=False
            )

    def load(self, folder: AdapterFolder) -> None:
        """PeftModel.load_adapter from a local folder. Ends with an adapter named "bench"."""
        self.model.load_adapter(
            str(folder.path), "bench", autocast_adapter_dtype=False, torch_device="cpu"
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the last load brought, by the file's names."""
        return {
            f"{PEFT_PREFIX}{path}.lora_{part}.weight": getattr(
                self.model.base_model.model.get_submodule(path), f"lora_{part}"
            )["bench"].weight.detach()
            for path, _, _ in module_paths()
            for part in "AB"
        }

    def unload(self) -> None:
        self.model.delete_adapter("bench")


def _base() -> nn.Module:
    root = nn.Module()
    for path, in_features, out_features in module_paths():
        *parents, name = path.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, _weightless(in_features, out_features))
    return root


def _weightless(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    one = torch.zeros(1, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(one.expand(out_features, in_features), requires_grad=False)
    return linear
