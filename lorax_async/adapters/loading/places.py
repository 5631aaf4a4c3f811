"""Where an adapter id of LoRAX's calls leads: to a local folder, or into the standard hub cache.

These calls are the embedding program's own word, so that a path is followed wherever it leads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_async.adapter import AdapterRef
from lorax_async.adapters.loading.hub_files import HubFiles
from lorax_async.config import Limits
from lorax_async.errors import (
    AdapterNotFoundError,
    ConfigError,
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


def folder_with_config(adapter_id: object, token: str | None = None) -> str:
    """The folder that should have an adapter's config. Blocks.

    A `pathlib.Path`, or a str that begins with "/", "./" or "../", is a local folder;
    `org/name[@revision]` a folder of the standard hub cache, into which it is fetched if need be.

    Raises
    ------
    InvalidAdapterIdError, ConfigError
        The id is none, or names a source that is not available here.

    For what is on the hub also what `HubFiles` raises.
    """
    place = _place_of(adapter_id, token)
    return place.with_config() if isinstance(place, HubFiles) else place


def folder_with_weights(adapter_id: object, token: str | None = None) -> str:
    """The folder that should have an adapter's config and weights; as `folder_with_config`."""
    place = _place_of(adapter_id, token)
    return place.with_weights() if isinstance(place, HubFiles) else place


def _place_of(adapter_id: object, token: str | None) -> HubFiles | str:
    if isinstance(adapter_id, str) and not adapter_id.startswith(_LOCAL):
        return HubFiles(_hub_id(adapter_id), token, LIMITS)
    if not isinstance(adapter_id, str | Path):
        kind = type(adapter_id).__name__
        raise InvalidAdapterIdError(f"an adapter id is a str or a pathlib.Path, not {kind}")
    (path,) = parse_place(AdapterRef(Path(adapter_id)), ()).paths
    return path


def _hub_id(text: str) -> HubId:
    if _OTHER_SOURCE.match(text):
        raise ConfigError(
            "these calls read local folders and what is on the hub; an AdapterLoader loads"
            " adapters from elsewhere"
        )
    return parse_hub_id(readable(checked(text, str.encode)))


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
