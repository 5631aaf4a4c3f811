"""Whether an adapter was trained on the base that is served, as far as names tell.

Shapes decide, and loading checks them. Nothing here makes a network request.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from lorax_async.adapters.base import AdapterConfig
from lorax_async.adapters.loading.hub_files import cached_file
from lorax_async.adapters.loading.places import LIMITS, read_small
from lorax_async.adapters.loading.threads import in_thread
from lorax_async.core.strict_json import parse_object
from lorax_async.errors import IncompatibleAdapterError, LoraxError, shorten
from lorax_async.ids.hub import HubId

_BASE_CONFIG = "config.json"

Architectures = tuple[str, ...]


def check_architectures(
    model_id: str,
    adapter_id: str,
    adapter_config: AdapterConfig,
    architectures: Sequence[str],
) -> None:
    """Compare the base that is served with the one that the adapter was trained on. Blocks.

    Equal names, or a config without one, say nothing. Else the architectures of the adapter's base
    are looked up in the hub cache; where they are known and differ, that is an error, and else a
    warning.

    Parameters
    ----------
    model_id, architectures
        Of the base that is served: its name, and what its own config says.
    adapter_id, adapter_config
        Of the adapter.

    Raises
    ------
    IncompatibleAdapterError
        The architectures differ.
    """
    if _differs(model_id, adapter_config):
        trained_on = cached_architectures(adapter_config.base_model_name_or_path or "")
        _judge(model_id, adapter_id, adapter_config, tuple(architectures), trained_on)


async def check_architectures_async(
    model_id: str,
    adapter_id: str,
    adapter_config: AdapterConfig,
    architectures: Sequence[str],
) -> None:
    """As `check_architectures`; the hub cache is read in a thread."""
    if _differs(model_id, adapter_config):
        name = adapter_config.base_model_name_or_path or ""
        trained_on = await in_thread(lambda _: cached_architectures(name))
        _judge(model_id, adapter_id, adapter_config, tuple(architectures), trained_on)


def cached_architectures(base: str) -> Architectures | None:
    """What the `config.json` of a base in the hub cache says, if it is there. Blocks.

    The name is a stranger's word: no folder outside of the cache is looked at.
    """
    try:
        path = cached_file(HubId(base, None), _BASE_CONFIG)
        if path is None:
            return None
        text = read_small(os.path.dirname(path), _BASE_CONFIG)
        config = parse_object(
            text, what=_BASE_CONFIG, max_bytes=len(text), max_depth=LIMITS.max_json_depth
        )
    except LoraxError:  # no id of the hub, or a file that is not a config: nothing is known
        return None
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return None
    return tuple(str(name) for name in names)


def _differs(model_id: str, config: AdapterConfig) -> bool:
    return bool(config.base_model_name_or_path) and config.base_model_name_or_path != model_id


def _judge(
    model_id: str,
    adapter_id: str,
    config: AdapterConfig,
    served: Architectures,
    trained_on: Architectures | None,
) -> None:
    adapter, base = shorten(str(adapter_id), 100), shorten(str(config.base_model_name_or_path), 100)
    if trained_on is None or trained_on == served:
        warnings.warn(
            f"adapter {adapter!r} was not trained on base model {model_id!r}; if its answers are"
            f" wrong, serve {base!r} instead",
            stacklevel=3,
        )
        return
    raise IncompatibleAdapterError(
        f"adapter {adapter!r} is for {base!r} ({shorten(', '.join(trained_on), 100)}), and"
        f" {model_id!r} is another architecture ({', '.join(served)}); serve {base!r}, or use an"
        f" adapter of {model_id!r}"
    )
