"""Tokenizers of adapters that bring a vocabulary of their own, in place of the base's."""

from __future__ import annotations

import asyncio
import json
import os
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerFast

from lorax_async.concurrency import SharedTasks, result_of
from lorax_async.config import Limits
from lorax_async.errors import AdapterError, AdapterFormatError, UnsupportedAdapterError, shorten
from lorax_async.files import locate, require_file, to_adapter_error
from lorax_async.formats.peft_names import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from lorax_async.formats.strict_json import parse_object
from lorax_async.loader import AdapterLoader
from lorax_async.lru import remember
from lorax_async.server.request_bodies import GenerationBody, PromptEncoder
from lorax_async.server.responses import Refusal
from lorax_async.types import AdapterId, AdapterKey, Ref, as_ref

MAX_ENCODERS = 8
"""Adapters whose tokenizers are kept: those used last. One of 128,000 tokens takes some 100 MB."""


class PromptEncoders:
    """The encoder of each adapter: the base's, unless the adapter has a vocabulary of its own.

    That is known once it was loaded. A prompt is first encoded as the base's, so that others wait
    for nothing; the engine refuses it (`OtherVocabularyError`), and then `learn` reads the
    tokenizer from the adapter's folder. On one event loop.
    """

    def __init__(self, loader: AdapterLoader, tokenizer: Any, base: PromptEncoder) -> None:
        self._loader = loader
        self._tokenizer = tokenizer
        self._base = base
        self._own: OrderedDict[Ref, PromptEncoder] = OrderedDict()
        self._tasks = SharedTasks(self._learn, lambda ref: f"lorax tokenizer of {ref}")

    async def read(
        self, body: GenerationBody, adapter: AdapterId | None
    ) -> tuple[PromptEncoder, list[tuple[int, ...]]]:
        """Return the encoder, and the token ids of each prompt. Raise `Refusal`."""
        encoder = self._base
        if adapter is not None and (own := self._own.get(as_ref(adapter))) is not None:
            self._own.move_to_end(as_ref(adapter))
            encoder = own
        try:
            return encoder, await asyncio.to_thread(encoder.read, body)
        except Refusal:
            if adapter is None:
                raise
            # Another tokenizer need not know its tokens, or the roles of its conversations.
            learned = await self.learn(adapter)
            if learned is encoder:
                raise
        return learned, await asyncio.to_thread(learned.read, body)

    async def learn(self, adapter: AdapterId) -> PromptEncoder:
        """Load an adapter, and return the encoder of its present version.

        Raise as `AdapterLoader.load` and `fetch`, `UnsupportedAdapterError` if it has a vocabulary
        of its own and no tokenizer, or `AdapterFormatError`.
        """
        with self._tasks.join(as_ref(adapter)) as task:
            return await result_of(task, "ready", lambda: None)

    async def _learn(self, ref: Ref) -> PromptEncoder:
        async with await self._loader.load(ref) as handle:
            key, is_own = handle.key, handle.vocabulary is not None
        known = self._own.get(ref)
        if known is not None and known.vocabulary_of == key:
            return known
        self._own.pop(ref, None)
        if not is_own:
            return self._base
        async with await self._loader.fetch(key) as folder:
            try:
                encoder = await asyncio.to_thread(self._read, folder.path, key)
            except AdapterError as error:
                raise error.located(id=folder.id, key=key) from error.__cause__
        remember(self._own, ref, encoder, MAX_ENCODERS)
        return encoder

    def _read(self, folder: Path, key: AdapterKey) -> PromptEncoder:
        tokenizer = read_tokenizer(folder, type(self._tokenizer), self._loader.config.limits)
        return PromptEncoder(tokenizer, self._stop_tokens(tokenizer), key)

    def _stop_tokens(self, tokenizer: Any) -> frozenset[int]:
        """Return its end token, and those of the base's that are the same tokens here."""
        texts = {
            id: self._tokenizer.convert_ids_to_tokens(id)
            for id in self._base.stop_tokens
            if id < self._base.vocabulary
        }
        same = {id for id, text in texts.items() if tokenizer.convert_ids_to_tokens(id) == text}
        end = tokenizer.eos_token_id
        return frozenset(same if end is None else {*same, end})


_KEPT = frozenset(
    {
        *("added_tokens_decoder", "chat_template", "extra_special_tokens"),
        *("additional_special_tokens", "model_specific_special_tokens", "add_prefix_space"),
        *("clean_up_tokenization_spaces", "legacy", "split_special_tokens"),
        *("add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "sep_token"),
        *("pad_token", "cls_token", "mask_token"),
    }
)
"""Members of a tokenizer's config that are read: none names a file or code."""

_ADDED = "added_tokens.json"
_OBJECTS = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json", _ADDED)
_GENERIC = frozenset({"", "PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that compute what tokenizer.json says, and nothing else."""


def read_tokenizer(folder: Path, base_class: Any, limits: Limits) -> Any:
    """Return the fast tokenizer of an adapter's folder. Blocks.

    It is of transformers' generic class if its config says so, else of `base_class`, the class of
    the base's. What the adapter's author wrote chooses no other class, names no other file, and
    runs no code; a chat template runs in transformers' sandbox.

    Raise `UnsupportedAdapterError` without `TOKENIZER_FILE`, `AdapterFormatError` for what cannot
    be read or is over the limit.
    """
    contents = _read_files(folder, limits.max_tokenizer_bytes)
    if TOKENIZER_FILE not in contents:
        raise UnsupportedAdapterError(
            f"it has a vocabulary of its own, and no {TOKENIZER_FILE} beside it, or its source"
            " could not be asked for that; save the tokenizer with the adapter",
            stage="ready",
        )
    fields = {name: _members(name, contents[name]) for name in _OBJECTS if name in contents}
    named = str(fields.get(TOKENIZER_CONFIG_FILE, {}).get("tokenizer_class") or "")
    made_by = PreTrainedTokenizerFast if named in _GENERIC else base_class
    for name, members in fields.items():
        kept = {key: members[key] for key in members if name == _ADDED or key in _KEPT}
        contents[name] = json.dumps(kept).encode()
    with TemporaryDirectory(prefix="lorax-tokenizer-") as made:
        for name, content in contents.items():
            (Path(made) / name).write_bytes(content)
        try:
            return made_by.from_pretrained(made, local_files_only=True)
        except Exception as error:
            problem = f"{type(error).__name__}: {shorten(str(error), 200)}"
            raise AdapterFormatError(
                f"its tokenizer cannot be read ({problem}); save it again", stage="ready"
            ) from error


def _read_files(folder: Path, max_bytes: int) -> dict[str, bytes]:
    """Return the files of a tokenizer that are read, by name, with `max_bytes` at most together.

    Raise `AdapterFormatError` for a link out of the folder, or what is not a file.
    """
    contents: dict[str, bytes] = {}
    for name in (TOKENIZER_FILE, TEMPLATE_FILE, *_OBJECTS):
        try:
            with locate(str(folder)) as place, locate(name, within=place.fd) as file:
                require_file(name, file, max_bytes)
                if os.path.dirname(file.real_path) not in _places(place.real_path):
                    raise AdapterFormatError(
                        f"{name} is a link out of the adapter's folder; put the file there"
                    )
                with open(file.open(), "rb") as opened:
                    contents[name] = opened.read(file.status.st_size)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise to_adapter_error(error, name) from error
        max_bytes -= len(contents[name])
    return contents


def _places(folder: str) -> set[str]:
    """Return where the files of a folder may lie: a snapshot of the hub cache links to blobs."""
    repo, kind = os.path.split(os.path.dirname(folder))
    return {folder, f"{repo}/blobs"} if kind == "snapshots" else {folder}


def _members(name: str, content: bytes) -> dict[str, Any]:
    return parse_object(content, what=name, max_bytes=len(content))
