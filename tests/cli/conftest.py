"""The example adapters, for the tests of commands."""

from engines.conftest import examples

__all__ = ["examples"]
