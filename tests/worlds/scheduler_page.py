"""The functions of docs/scheduler.md."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax_async import AdapterScheduler, Batch, Request, Ticket
from lorax_async.engines.transformers import AttachedModel

PAGE = Path(__file__).parents[2] / "docs" / "scheduler.md"
USED: tuple[Any, ...] = (AdapterScheduler, AttachedModel, Batch, Callable, Request, Ticket, asyncio)


def functions() -> dict[str, Any]:
    """Return the functions by name, from all code blocks of the page."""
    scope: dict[str, Any] = {each.__name__: each for each in USED}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(block, scope)
    return scope
