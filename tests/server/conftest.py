"""The models and adapters of the tests of engines."""

from engines.conftest import adapters, examples, model, one_thread, small, source, theirs

__all__ = ["adapters", "examples", "model", "one_thread", "small", "source", "theirs"]
