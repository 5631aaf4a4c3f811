"""A whole server from its parts: the base, the loader, the scheduler, the engine, the service."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorax_async import layouts
from lorax_async.adapter import AdapterId, AdapterRef, as_ref
from lorax_async.config import LoaderConfig
from lorax_async.engines.transformers import attach
from lorax_async.errors import ConfigError, shorten
from lorax_async.loader import AdapterLoader
from lorax_async.scheduler import AdapterScheduler
from lorax_async.server.calls.names import is_open
from lorax_async.server.calls.service import Service
from lorax_async.server.decoding.transformers_decoder import TransformersDecoder
from lorax_async.server.engine import Engine
from lorax_async.server.generation import Generation, InFront, Tokens
from lorax_async.server.settings import ServerSettings
from lorax_async.server.warm_list import WarmList


@dataclass(frozen=True, slots=True)
class Base:
    """A base model that answers, with its tokenizer and the token ids that end an answer."""

    model: Any
    tokenizer: Any
    stop_tokens: frozenset[int]

    @classmethod
    def load(cls, folder: Path, *, dtype: str, device: str) -> Base:
        """Blocks, for seconds. Raises `ConfigError` for no such folder, and for no such device."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("torch finds no device of the kind cuda")
        try:
            if not folder.is_dir():
                raise ValueError("there is no such folder")
            if not (folder / "config.json").is_file():
                raise ValueError("it has no config.json")
            model, tokenizer = _read(folder, dtype)
        except Exception as error:
            said = shorten(" ".join(str(error).split()), 400)
            raise ConfigError(f"{folder} is no base model that can be served: {said}") from error
        return cls(model.to(device).eval(), tokenizer, _stop_tokens(model, tokenizer))

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for."""
        return int(self.model.config.max_position_embeddings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How much is computed at a time.

    Attributes
    ----------
    sequences
        That have begun and not ended: the engine keeps keys and values of so many.
    length
        Tokens of one sequence, at most; None is what the model was made for.
    step_tokens
        Of all sequences together, in one step; longer prompts come in parts.
    share
        Of `sequences`, that one adapter, and one client, has at most while others wait.
    """

    sequences: int = 16
    length: int | None = None
    step_tokens: int = 1024
    share: float = 0.5


@asynccontextmanager
async def assembled(
    base: Base,
    config: LoaderConfig,
    settings: ServerSettings,
    capacity: Capacity,
    warm: Path | None = None,
) -> AsyncIterator[Service]:
    """What answers requests, open; on leaving, all of it is closed. On the loop that serves.

    Parameters
    ----------
    base
        Nobody else uses its model meanwhile.
    config
        Of the loader; its dtype is that in which the model computes.
    warm
        The file of a `WarmList`; None keeps none.

    Raises `ConfigError` for what does not fit together.
    """
    length = base.max_length if capacity.length is None else min(base.max_length, capacity.length)
    async with AsyncExitStack() as stack:
        loader = await stack.enter_async_context(
            AdapterLoader(layouts.from_module(base.model), config)
        )
        attached = stack.enter_context(attach(base.model, loader))
        scheduler = await stack.enter_async_context(
            AdapterScheduler(loader, max_begun=capacity.sequences, max_share=capacity.share)
        )
        decoder = TransformersDecoder(
            base.model, attached, max_sequences=capacity.sequences, max_length=length
        )
        engine = await stack.enter_async_context(
            Engine(
                scheduler,
                decoder,
                max_tokens=capacity.step_tokens,
                max_sequences=capacity.sequences,
            )
        )
        noted = Noted(engine, _nobody)
        if warm is not None:
            warm_list = WarmList(warm, loader, admits=partial(_admitted, settings))
            noted.used = (await stack.enter_async_context(warm_list)).used
        yield Service(settings, noted, loader, base.tokenizer, base.stop_tokens)


class Noted(InFront):
    """An engine that tells `used` of every adapter that is asked for."""

    def __init__(self, engine: Engine, used: Callable[[AdapterId], None]) -> None:
        super().__init__(engine)
        self.used = used

    def submit(self, generation: Generation) -> Tokens:
        tokens = self._engine.submit(generation)
        if generation.adapter is not None:
            self.used(generation.adapter)
        return tokens


def _admitted(settings: ServerSettings, ref: AdapterRef) -> AdapterRef | None:
    """Return an adapter of the warm list as it can be named now; None if it cannot be.

    Only a name in the settings gives the operator's authority. Without one, the adapter comes back
    as a request would name it: by its text, so that `sources`, `allow` and `local_roots` decide.
    """
    if ref in map(as_ref, settings.adapters.values()):
        return ref
    text = str(ref.id.absolute()) if isinstance(ref.id, Path) else ref.id
    requested = replace(ref, id=text, use_token=False)
    return requested if is_open(requested, settings.sources) else None


def _nobody(adapter: AdapterId) -> None:
    del adapter


def _read(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer, without a word to the terminal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    logging: Any = importlib.import_module("transformers.utils.logging")  # untyped
    shown, said = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # First what is quick, for it may be wrong, and the weights may take minutes.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        auto: Any = AutoModelForCausalLM  # its types leave out what the last option gives
        model, found = auto.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(said)
        if shown:
            logging.enable_progress_bar()
    missing = sorted(found["missing_keys"])
    if missing:  # transformers makes up what is not there
        raise ValueError(f"it lacks {len(missing)} weights, the first of them {missing[0]}")
    return model, tokenizer


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Of the model's generation config, and the tokenizer's own."""
    found = model.generation_config.eos_token_id
    said = found if isinstance(found, list) else [found]
    return frozenset(token for token in (*said, tokenizer.eos_token_id) if token is not None)
