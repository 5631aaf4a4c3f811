"""`Service`: the state that all requests of one server share; and its assembly."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.engines.transformers import attach
from lorax_async.errors import CapacityError, ConfigError, LoaderClosedError, shorten
from lorax_async.ids import parse_requested
from lorax_async.loader import AdapterLoader
from lorax_async.scheduler.scheduler import AdapterScheduler
from lorax_async.server.adapter_tokenizers import PromptEncoders
from lorax_async.server.engine import Engine, Generation, Sampler, Sampling
from lorax_async.server.monitoring import ColdRequests, Dashboard
from lorax_async.server.request_bodies import PromptEncoder
from lorax_async.server.responses import wait_for_disconnect
from lorax_async.server.server_log import log_adapters
from lorax_async.server.server_metrics import ObservedTokens, ServerMetrics
from lorax_async.server.server_settings import ModelNames, ServerSettings
from lorax_async.server.transformers_decoder import TransformersDecoder
from lorax_async.server.warm_list import keep_warm_list, read_warm_list
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, Ref, as_ref


class Service:
    """The state that all requests of one server share.

    The engine computes with adapters of `loader`, which is open, on this event loop; the service
    closes neither. `tokenizer` is the base's, a fast one of transformers; `stop_tokens` end an
    answer. `on_use` is called with the adapter of each generation that the engine takes. `sampling`
    is how tokens are chosen where a request does not say.
    """

    def __init__(
        self,
        settings: ServerSettings,
        engine: Engine,
        loader: AdapterLoader,
        tokenizer: Any,
        stop_tokens: frozenset[int],
        on_use: Callable[[AdapterId], None] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.loader = loader
        self.prompts = PromptEncoder(tokenizer, stop_tokens)
        self.encoders = PromptEncoders(loader, tokenizer, self.prompts)
        self.sampling = sampling or Sampling()
        self.created = int(time.time())
        self.names = ModelNames(settings.base, settings.adapters, settings.sources)
        self.pins = NamePins(loader, self.names)
        self.in_flight = InFlightRequests()
        self.client_limits = ClientLimits(settings.max_adapters_per_client)
        self.metrics = ServerMetrics(loader, self.names)
        self.cold = ColdRequests(loader, self.names)
        self.dashboard = Dashboard(loader, self.names, self.cold, self.metrics)
        self.metrics.on_change = self.dashboard.note_change
        self._on_use = on_use

    @property
    def max_prompt_tokens(self) -> int:
        """The maximum length of a prompt, with room for one new token."""
        room = self.engine.max_length - 1
        limit = self.settings.max_prompt_tokens
        return room if limit is None else min(limit, room)

    @property
    def healthy(self) -> bool:
        """Whether new requests are taken and computed."""
        return self.engine.alive and not self.in_flight.closing

    def require_room(self, sequences: int) -> None:
        """Raise `CapacityError` if the queue has no room for this many more sequences."""
        if self.engine.waiting + sequences > self.settings.max_waiting:
            raise CapacityError(
                f"{self.engine.waiting} sequences are waiting, and the limit is"
                f" {self.settings.max_waiting}; try again later"
            )

    def submit(self, generation: Generation, model: str) -> ObservedTokens:
        """Submit to the engine; measure the tokens as `model`'s. Raise as `Engine.submit`."""
        adapter = generation.adapter
        on_outcome = self.cold.record(adapter)
        try:
            tokens = self.engine.submit(generation)
        except BaseException:
            on_outcome("refused")
            raise
        if adapter is not None and self._on_use is not None:
            self._on_use(adapter)
        return ObservedTokens(tokens, model, self.metrics, on_outcome)


# -- pins -----------------------------------------------------------------------------------------


class NamePins:
    """The pins of names, each of the version that its name meant when it was pinned.

    How a name spells its adapter does not matter: a version stays pinned as long as a name pins it.
    On one event loop.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._loader = loader
        self._names = names
        self._pinned = names.pinned

    def names_of(self, key: AdapterKey) -> list[str]:
        """Return the names that mean a version, as far as is known without I/O, or pin it."""
        placement = self._loader.placement()
        return [
            name
            for name, adapter in self._names.adapters.items()
            if key in {placement.key(adapter), self._pinned.get(name)}
        ]

    async def pin(self, name: str) -> bool:
        """Load the adapter of a name and pin it; return False if the name changed meanwhile."""
        adapter = self._names.adapters[name]
        with await self._loader.load(adapter) as handle:
            key = handle.key
        await self._loader.pin(key)
        if self._names.adapters.get(name) != adapter:
            self._release(key)
            return False
        self._set(name, key)
        return True

    def unpin(self, name: str) -> bool:
        """End the pin of a name; return whether it had one."""
        key = self._pinned.pop(name, None)
        if key is not None:
            self._release(key)
        return key is not None

    def leave(self, name: str) -> bool:
        """End the pin of a name that is gone or means another adapter.

        If no other name pins the version, one that means it does from now on; return True then.
        """
        key = self._pinned.pop(name, None)
        if key is None:
            return False
        heirs = [] if self._is_pinned(key) else self.names_of(key)
        if heirs:
            self._set(heirs[0], key)
        else:
            self._release(key)
        return bool(heirs)

    async def follow(self, name: str, key: AdapterKey) -> None:
        """Let the pin of a name that means `key` now move to it, unless `leave` passes it on."""
        if self._pinned.get(name) not in {None, key} and not self.leave(name):
            await self.pin(name)

    def _set(self, name: str, key: AdapterKey) -> None:
        before, self._pinned[name] = self._pinned.get(name), key
        if before is not None:
            self._release(before)

    def _release(self, key: AdapterKey) -> None:
        if not self._is_pinned(key):
            self._loader.unpin(key)

    def _is_pinned(self, key: AdapterKey) -> bool:
        return key in self._pinned.values()


# -- requests in flight ---------------------------------------------------------------------------

CLOSING = "the server is closing"


class RequestScope:
    """End the enclosed block with an error from outside, wherever it waits.

    As `asyncio.timeout` does: cancel the block, then turn the cancellation into the error. A
    client that disconnects interrupts with `ClientDisconnect`.
    """

    def __init__(self, scopes: set[RequestScope], receive: Receive) -> None:
        self._scopes = scopes
        self._receive = receive
        self._reason: Exception | None = None

    def interrupt(self, reason: Exception) -> None:
        """End the block with `reason`. Only the first call counts."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._listening = asyncio.create_task(self._listen(), name="lorax client's presence")
        self._scopes.add(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._listening.cancel()
        self._scopes.discard(self)
        if self._reason is not None:
            cancelled = self._task.uncancel() > self._cancelling  # by another task as well
            if kind is asyncio.CancelledError and not cancelled:
                raise self._reason from None

    async def _listen(self) -> None:
        await wait_for_disconnect(self._receive)
        self.interrupt(ClientDisconnect())


class InFlightRequests:
    """Count in-flight requests, and refuse new ones once closed. On one event loop."""

    def __init__(self) -> None:
        self.closing = False
        self.count = 0
        self._failed = False
        self._scopes: set[RequestScope] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def count_request(self) -> Iterator[None]:
        """Count one request while entered. Raise `LoaderClosedError` when closing."""
        if self.closing:
            raise LoaderClosedError(CLOSING)
        self.count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._idle.set()

    def open_scope(self, receive: Receive) -> RequestScope:
        """Return the scope in which to answer a request whose body was read.

        Raise `LoaderClosedError` after `fail`.
        """
        if self._failed:
            raise LoaderClosedError(CLOSING)
        return RequestScope(self._scopes, receive)

    def close(self) -> None:
        """Refuse new requests."""
        self.closing = True

    def fail(self) -> None:
        """End in-flight requests with `LoaderClosedError`, those still reading a body after it."""
        self._failed = True
        for scope in tuple(self._scopes):
            scope.interrupt(LoaderClosedError(CLOSING))

    async def wait_until_idle(self, seconds: float) -> bool:
        """Wait for the last request; return whether it ended in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()


class ClientLimits:
    """Limit the different adapters that each client has in flight to `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._adapters: dict[tuple[str, str], Counter[Ref]] = {}

    @contextmanager
    def count_request(self, client: tuple[str, str], adapter: AdapterId | None) -> Iterator[None]:
        """Count one request while entered; the base (None) is free. Raise `CapacityError`."""
        if adapter is None:
            yield
            return
        ref, adapters = as_ref(adapter), self._adapters.setdefault(client, Counter())
        if ref not in adapters and len(adapters) >= self._limit:
            raise CapacityError(
                f"this client has requests for {self._limit} adapters in flight, the limit; try"
                " again when one has ended"
            )
        adapters[ref] += 1
        try:
            yield
        finally:
            adapters[ref] -= 1
            if not adapters[ref]:
                del adapters[ref]
            if not adapters:
                self._adapters.pop(client, None)


# -- assembly -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A base model with its tokenizer, and the token ids that end an answer.

    `sampling` is the default of requests; a folder's is its generation_config.json's.
    """

    model: Any
    tokenizer: Any
    stop_tokens: frozenset[int]
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def load(cls, folder: Path, *, dtype: str, device: str) -> ServedModel:
        """Load a folder; blocks for seconds. Raise `ConfigError` for a bad folder or device."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("torch finds no cuda device")
        try:
            if not folder.is_dir():
                raise ValueError("the folder does not exist")
            if not (folder / "config.json").is_file():
                raise ValueError("it has no config.json")
            model, tokenizer = _load_model(folder, dtype)
            sampling = _default_sampling(model.generation_config)
            stops = _stop_tokens(model.generation_config.eos_token_id, tokenizer.eos_token_id)
        except Exception as error:
            reason = shorten(" ".join(str(error).split()), 400)
            raise ConfigError(
                f"{folder} is not a base model that can be served: {reason}"
            ) from error
        return cls(model.to(device).eval(), tokenizer, stops, sampling)

    @property
    def max_length(self) -> int:
        """The number of positions that the model has."""
        return int(self.model.config.max_position_embeddings)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCapacity:
    """Limits of what is computed at a time."""

    sequences: int = 16
    """Sequences in progress; the KV cache has room for this many."""
    length: int | None = None
    """Tokens of one sequence; None is what the model was made for."""
    step_tokens: int = 1024
    """Tokens of all sequences in one step; longer prompts are computed in parts."""
    share: float = 0.5
    """Of `sequences`, the share of one adapter, and of one client, while others wait."""


@asynccontextmanager
async def open_service(
    base: ServedModel,
    config: LoaderConfig,
    settings: ServerSettings,
    capacity: ServerCapacity,
    warm: Path | None = None,
) -> AsyncIterator[Service]:
    """Open a service, on the loop that serves; on leaving, close all of its parts.

    `base` is for the service alone; the dtype of `config` is the model's. `warm` is the file
    of the warm list; None keeps none. Raise `ConfigError` for settings that do not fit together.
    """
    layout = replace(layouts.from_module(base.model), base=settings.base)  # for errors
    sequences = capacity.sequences
    length = base.max_length if capacity.length is None else min(base.max_length, capacity.length)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        loader = await enter(AdapterLoader(layout, config))
        stack.enter_context(log_adapters(loader))
        attached = stack.enter_context(attach(base.model, loader))
        scheduler = await enter(
            AdapterScheduler(loader, max_begun=sequences, max_share=capacity.share)
        )
        decoder = TransformersDecoder(base.model, attached, sequences, length)
        engine = await enter(
            Engine(scheduler, decoder, max_tokens=capacity.step_tokens, max_sequences=sequences)
        )
        on_use = None
        if warm is not None:
            refs = await asyncio.to_thread(read_warm_list, warm)
            admitted = dict.fromkeys(filter(None, map(partial(_admit, settings), refs)))
            on_use = await enter(keep_warm_list(warm, loader, list(admitted)))
        yield Service(
            settings, engine, loader, base.tokenizer, base.stop_tokens, on_use, base.sampling
        )


def _admit(settings: ServerSettings, ref: AdapterRef) -> AdapterRef | None:
    """Return an adapter of the warm list as it can be named now; None if it cannot be.

    Only a name in the settings gives the operator's authority. Any other adapter comes back as a
    request would name it: by its text, so that `sources`, `allow` and `local_roots` decide.
    """
    if ref in map(as_ref, settings.adapters.values()):
        return ref
    text = str(ref.id.absolute()) if isinstance(ref.id, Path) else ref.id
    requested = replace(ref, id=text, use_token=False)
    return None if parse_requested(requested, settings.sources) is None else requested


def _default_sampling(config: Any) -> Sampling:
    """Return what a generation config says of sampling, as vLLM reads it. Raise `UsageError`."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = config.to_diff_dict()
    sampling = Sampling(**{name: given[name] for name in names if given.get(name) is not None})
    if sampling.top_k == -1:  # all, as in requests
        sampling = replace(sampling, top_k=0)
    Sampler(sampling)
    return sampling


def _stop_tokens(eos: Any, own: int | None) -> frozenset[int]:
    """Return the ids of a generation config's end tokens and the tokenizer's."""
    tokens = [
        token for token in (*(eos if isinstance(eos, list) else [eos]), own) if token is not None
    ]
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(
            f"eos_token_id of generation_config.json is {eos!r}, which is not a token id"
        )
    return frozenset(tokens)


def _load_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Read the model and its tokenizer without transformers' output on the terminal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    logging: Any = importlib.import_module("transformers.utils.logging")  # untyped
    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # The tokenizer first: it fails quickly, and the weights may take minutes.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        auto: Any = AutoModelForCausalLM  # its types lack the last option's result
        model, info = auto.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:  # transformers initializes them at random
        raise ValueError(f"it lacks {len(missing)} weights, of which the first is {missing[0]}")
    return model, tokenizer
