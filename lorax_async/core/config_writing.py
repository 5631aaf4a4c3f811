"""A config that is held in memory, as the bytes of an `adapter_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol, TypeAlias, runtime_checkable

from lorax_async.core.peft_fields import WHAT
from lorax_async.errors import AdapterFormatError, UsageError, shorten


@runtime_checkable
class Convertible(Protocol):
    """As `peft.LoraConfig` is."""

    def to_dict(self) -> Mapping[str, object]: ...


GivenConfig: TypeAlias = Mapping[str, object] | Convertible
"""The members of an `adapter_config.json`, or what gives them."""


def write_config(config: GivenConfig) -> bytes:
    """The same members, in the same order: of several patterns that match, the first counts.

    Sets, which `peft.LoraConfig` keeps names in, become sorted lists, as in a file.

    Raises
    ------
    UsageError
        It is no config.
    AdapterFormatError
        It holds what JSON does not have.
    """
    members: object = config
    if isinstance(config, Convertible) and not isinstance(config, type):
        members = config.to_dict()
    if not isinstance(members, Mapping):
        kind = type(config).__name__
        raise UsageError(
            f"a config is a dict as in {WHAT}, or a peft.LoraConfig, not {shorten(kind, 100)}"
        )
    try:
        return json.dumps(dict(members), default=_as_list, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{WHAT} cannot be written: {error}") from None


def _as_list(value: object) -> list[object]:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")
