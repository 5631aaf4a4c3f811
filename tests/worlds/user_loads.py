"""Loads by the public API: an `AdapterLoader`, its `LoaderConfig`, and ids."""

from functools import partial
from pathlib import Path
from typing import Any

import event_loops
import tiny
import torch
from safetensors.torch import load_file, save_file

from lorax_async import AdapterHandle, AdapterLoader, Allow, LoaderConfig
from lorax_async.planning.layout import ModelLayout
from lorax_async.types import AdapterRef, RemoteKey

HIDDEN = 96
LAYERS = 24
RANK = 256
"""Together some 14 MB. Layer 0 has 4 % of it, more than comes with the first answer."""


until = partial(event_loops.until, seconds=60)


def layout(layers: int) -> ModelLayout:
    return tiny.layout(layers=layers, hidden=HIDDEN)


def written(folder: Path, seed: int = 0, *, layers: int = LAYERS, rank: int = RANK) -> Path:
    """Write an adapter for this model, with random weights."""
    return tiny.write(folder, seed, rank, layers=layers, hidden=HIDDEN)


def written_with_tokens(folder: Path, *, layers: int = LAYERS) -> Path:
    """Write an adapter with a whole embedding and a tokenizer, and files that are neither."""
    written(folder, layers=layers, rank=16)
    weights = folder / "adapter_model.safetensors"
    rows = {"base_model.model.model.embed_tokens.weight": torch.ones(10, HIDDEN)}
    save_file(load_file(weights) | rows, weights)
    for name in (*TOKENIZER, "README.md", "training_args.bin"):
        (folder / name).write_bytes(f"{name}'s content".encode())
    return folder


TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def loader(folder: Path, *, layers: int = LAYERS, **settings: object) -> AdapterLoader:
    """Return a loader whose caches are below the folder."""
    given: Any = {"device_bytes": 32 << 20, "max_slots": 4, "io_threads": 2, "timeout": 40}
    given |= {"cache_dir": folder / "cache", "hub_cache_dir": folder / "hub", **settings}
    config = LoaderConfig(**given)
    return AdapterLoader(layout(layers), config)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def size_of(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def at(netloc: str, prefix: str = "") -> Allow:
    """Return an `Allow` for plain http at `netloc`."""
    host, _, port = netloc.partition(":")
    return Allow("http", host, int(port), prefix)


def version_of(handle: AdapterHandle) -> str:
    assert isinstance(handle.key, RemoteKey)
    return handle.key.version


def secretless(error: BaseException | None, *secrets: str) -> str:
    """Assert that an error and its causes have no secret; return their text."""
    text = ""
    while error is not None:
        text += f"{error}\n{error!r}\n{error.args}\n"
        error = error.__cause__ or error.__context__
    for secret in secrets:
        assert secret not in text, text
    return text


async def has(there: AdapterLoader, id: str | AdapterRef, folder: Path) -> str:
    """Assert that it loads, equals the folder's files and passes its checks; return its version."""
    async with await there.load(id) as handle:
        tiny.assert_equal_to_file(handle, folder)
        await handle.verified()
        return version_of(handle)


def stored_in(folder: Path) -> tuple[int, int]:
    """Return the numbers of adapters and of partial downloads in the disk cache.

    An entry that is published during the call is counted at least once.
    """
    partials = len(list((folder / "cache").glob("partials/*")))
    return len(list((folder / "cache").glob("entries/*"))), partials
