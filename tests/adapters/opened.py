"""Which files are opened to be read, and in which threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Names and threads, added to as files are opened."""
    seen: list[tuple[str, int]] = []
    real = os.open

    def watched(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = real(path, flags, *args, **kwargs)
        if not flags & os.O_PATH:
            name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            seen.append((name, threading.get_ident()))
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watched)
        yield seen
