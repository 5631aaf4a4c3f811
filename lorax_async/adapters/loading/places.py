"""Where an adapter id of LoRAX's calls leads: to a local folder, or into the standard hub cache.

These calls are the embedding program's own word, so that a path is followed wherever it leads.
Nothing here makes a network request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.errors import (
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    InvalidAdapterIdError,
    LoraxError,
    shorten,
)
from lorax_async.ids.hub import HubId, parse_hub_id
from lorax_async.ids.texts import checked, readable
from lorax_async.io.sources.checked_open import changed, located, require_file, translated
from lorax_async.io.sources.local_folder import CONFIG
from lorax_async.io.sources.local_ids import parse_place

LIMITS = Limits()

_LOCAL = ("/", "./", "../")
_OTHER_SOURCE = re.compile(r"[A-Za-z][0-9A-Za-z+.-]*:")


def folder_of(adapter_id: object, *wanted: str) -> str:
    """The folder that should have one of the files `wanted`. Blocks.

    A `pathlib.Path`, or a str that begins with "/", "./" or "../", is a local folder;
    `org/name[@revision]` the snapshot of that revision (or of "main") in the standard hub cache.

    Raises
    ------
    AdapterNotFoundError
        The hub cache has none of them.
    InvalidAdapterIdError, ConfigError
        The id is none, or names a source that is not available here.
    """
    if isinstance(adapter_id, str) and not adapter_id.startswith(_LOCAL):
        return _cached_snapshot(*_hub_id(adapter_id), wanted)
    if not isinstance(adapter_id, str | Path):
        kind = type(adapter_id).__name__
        raise InvalidAdapterIdError(f"an adapter id is a str or a pathlib.Path, not {kind}")
    (path,) = parse_place(AdapterRef(Path(adapter_id)), ()).paths
    return path


def _hub_id(text: str) -> HubId:
    if _OTHER_SOURCE.match(text):
        raise ConfigError(
            "these calls read local folders and what is in the hub cache; an AdapterLoader loads"
            " adapters from elsewhere"
        )
    return parse_hub_id(readable(checked(text, str.encode)))


def _cached_snapshot(repo_id: str, revision: str | None, wanted: Sequence[str]) -> str:
    for name in wanted:
        path = cached_file(repo_id, revision, name)
        if path is not None:
            return os.path.dirname(path)
    at = "" if revision is None else f" --revision {revision}"
    raise AdapterNotFoundError(
        f"the hub cache of this machine has no {wanted[0]} of {repo_id!r}, and these calls"
        f" fetch nothing by themselves; run 'hf download {repo_id}{at}' first (a folder is a"
        f" pathlib.Path, or './{repo_id}')"
    )


def cached_file(repo_id: str, revision: str | None, name: str) -> str | None:
    """Where the standard hub cache has a file, if it has it. Blocks.

    Raises
    ------
    InvalidAdapterIdError
        The hub has no such ids.
    AccessDeniedError, FetchError
        The cache cannot be read, or what it says of the revision is no text.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (slow)
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        path = try_to_load_from_cache(repo_id, name, revision=revision)
    except HFValidationError as error:
        raise InvalidAdapterIdError(f"the hub has no such ids ({error})") from error
    except OSError as error:
        raise translated(error, "the hub cache") from error
    except UnicodeDecodeError as error:
        raise FetchError(
            "the hub cache is damaged: what it says of this revision is no text; remove the"
            " repository from it, and download it again"
        ) from error
    return path if isinstance(path, str) else None


def read_small(folder: str, name: str = CONFIG, limits: Limits = LIMITS) -> bytes:
    """All bytes of a small file. Blocks.

    Raises
    ------
    AdapterNotFoundError
        The folder has no such file.
    AdapterFormatError
        It is no regular file, is empty, or is over the limit of a config.
    AccessDeniedError, FetchError
        It cannot be read.
    """
    try:
        with located(os.path.join(folder, name)) as file:
            require_file(name, file, limits.max_config_bytes)
            size = file.status.st_size
            with open(file.open(), "rb") as content:
                text = content.read(size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterNotFoundError(f"there is no {name} in this folder") from error
    except OSError as error:
        raise translated(error, name) from error
    if len(text) != size:
        raise changed(name)
    return text


@contextmanager
def named(adapter_id: object) -> Iterator[None]:
    """Errors of the block say which adapter they are about."""
    try:
        yield
    except LoraxError as error:
        raise error.located(id=shorten(str(adapter_id), 200)) from error.__cause__
