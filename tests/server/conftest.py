"""The fixtures of tests/engines, with models and adapters."""

from engines.conftest import adapters, examples, model, one_thread, small, source, theirs

__all__ = ["adapters", "examples", "model", "one_thread", "small", "source", "theirs"]
