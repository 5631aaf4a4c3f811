"""The models and adapters of the tests of engines."""

from __future__ import annotations

from engines.conftest import adapters, examples, model, one_thread, small, theirs

__all__ = ["adapters", "examples", "model", "one_thread", "small", "theirs"]
