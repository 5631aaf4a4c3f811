"""An asyncio streaming loader for LoRA adapters, embedded in an LLM server.

async with AdapterLoader(layout, LoaderConfig()) as loader:
    async with loader.load(Path("sql-adapter")) as adapter:
        ...
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax_async.api import *  # noqa: F403 (its `__all__`)

# A library must not log unless the application configures it.
logging.getLogger("lorax_async").addHandler(logging.NullHandler())

_MODULES = frozenset({"config", "errors", "events", "handle", "layouts", "loader", "scheduler"})


def __getattr__(name: str) -> Any:
    """Import the public names when one is used: torch takes a second, a command may not need it."""
    if name in _MODULES:
        return importlib.import_module(f"lorax_async.{name}")
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'lorax_async' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("lorax_async.api"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
