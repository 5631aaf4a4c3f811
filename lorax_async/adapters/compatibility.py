"""Check by names whether an adapter was trained on the served base; shapes are checked later.

No function makes a network request.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from lorax_async.adapters.base import AdapterConfig
from lorax_async.adapters.threads import in_thread
from lorax_async.adapters.weights_file import LIMITS, HubFiles, read_small
from lorax_async.errors import IncompatibleAdapterError, LoraxError, shorten
from lorax_async.formats.strict_json import parse_object

_CONFIG = "config.json"


def check_architectures(
    model_id: str, adapter_id: str, adapter_config: AdapterConfig, architectures: Sequence[str]
) -> None:
    """Compare the served base (`model_id`, `architectures`) with the adapter's. Blocks.

    Accept equal names, and a config without a name. Otherwise look up the architectures of the
    adapter's base in the hub cache: warn if they are equal or unknown, and raise
    `IncompatibleAdapterError` if they differ.
    """
    base = adapter_config.base_model_name_or_path
    if base and base != model_id:
        _compare(model_id, adapter_id, base, cached_architectures(base), tuple(architectures))


async def check_architectures_async(
    model_id: str, adapter_id: str, adapter_config: AdapterConfig, architectures: Sequence[str]
) -> None:
    """As `check_architectures`, with the look-up in a thread."""
    base = adapter_config.base_model_name_or_path
    if base and base != model_id:
        trained_on = await in_thread(lambda _: cached_architectures(base))
        _compare(model_id, adapter_id, base, trained_on, tuple(architectures))


def _compare(
    model_id: str,
    adapter_id: str,
    base: str,
    trained_on: tuple[str, ...] | None,
    served: tuple[str, ...],
) -> None:
    adapter, base = shorten(str(adapter_id), 100), shorten(base, 100)
    if trained_on not in {None, served}:
        raise IncompatibleAdapterError(
            f"adapter {adapter!r} is for {base!r} ({shorten(', '.join(trained_on or ()), 100)}),"
            f" and {model_id!r} is another architecture ({', '.join(served)}); serve {base!r}, or"
            f" use an adapter of {model_id!r}"
        )
    warnings.warn(
        f"adapter {adapter!r} was not trained on base model {model_id!r}; if its answers are"
        f" wrong, serve {base!r} instead",
        stacklevel=3,  # the caller of the check
    )


def cached_architectures(base: str) -> tuple[str, ...] | None:
    """Return the architectures in the `config.json` of a base in the hub cache, if any. Blocks.

    The name is untrusted: no folder outside the cache is read.
    """
    try:
        path = HubFiles(base, None, None).cached(_CONFIG)
        if path is None:
            return None
        text = read_small(os.path.dirname(path), _CONFIG, LIMITS.max_config_bytes)
        depth = LIMITS.max_json_depth
        config = parse_object(text, what=_CONFIG, max_bytes=len(text), max_depth=depth)
    except LoraxError:  # not an id of the hub, or not a config
        return None
    names = config.get("architectures")
    return tuple(map(str, names)) if isinstance(names, list) and names else None
