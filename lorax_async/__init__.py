"""An asyncio streaming loader for LoRA adapters, embedded in an LLM server.

async with AdapterLoader(layout, LoaderConfig()) as loader:
    async with loader.load(Path("sql-adapter")) as adapter:
        ...
"""

import importlib
import logging
from typing import TYPE_CHECKING

# A library must not log unless the application configures it.
logging.getLogger("lorax_async").addHandler(logging.NullHandler())

if TYPE_CHECKING:  # `__getattr__` would have any name
    from lorax_async import config as config
    from lorax_async import errors as errors
    from lorax_async import events as events
    from lorax_async import handle as handle
    from lorax_async import loader as loader
    from lorax_async import scheduler as scheduler
    from lorax_async.api import *  # noqa: F403
    from lorax_async.api import __all__ as __all__
else:
    _MODULES = frozenset({"config", "errors", "events", "handle", "layouts", "loader", "scheduler"})

    def __getattr__(name: str) -> object:
        """Import the public names when one is used: torch takes a second, and may not be needed."""
        if name in _MODULES:
            return importlib.import_module(f"lorax_async.{name}")
        if name == "Merge":
            raise importlib.import_module("lorax_async.errors").UsageError(
                "Merge was removed in 0.3: compute a merge with lorax_async.adapters.merge_folders,"
                " and pass it to load_tensors (docs/merging.md)"
            )
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module 'lorax_async' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module("lorax_async.api"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
