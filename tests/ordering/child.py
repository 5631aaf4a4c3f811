"""Runs tests of a copied tree, in a process that has imported nothing of this one's."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

HANGS_AFTER = 12
"""Seconds; each of the tests takes a few at most."""


def run_tests(
    tree: str, nodes: Sequence[str], output: str, hangs_after: float = HANGS_AFTER
) -> None:
    """Ends the process with pytest's exit code; what it prints goes to the file `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    sys.argv = ["pytest"]
    # Of the paths of the process that started this one, those of its own tree go.
    own = Path(__file__).resolve().parent.parent.parent
    sys.path = [tree, f"{tree}/kernels", f"{tree}/tests"] + [
        path for path in sys.path if path and not Path(path).is_relative_to(own / "tests")
    ]
    for name in [name for name in sys.modules if name.partition(".")[0] == "ordering"]:
        del sys.modules[name]
    _require_copies(tree)
    code = _pytest(nodes, hangs_after)
    sys.stdout.flush()
    os._exit(code)  # a thread that a broken test left behind must not keep the process


def _require_copies(tree: str) -> None:
    import lorax_async
    import lorax_kernels

    for package in (lorax_async, lorax_kernels):
        assert str(package.__file__).startswith(f"{tree}/"), package.__file__


def _pytest(nodes: Sequence[str], hangs_after: float) -> int:
    import pytest

    options = ["-v", "-x", "-rfE", "--tb=short", "--timeout", str(hangs_after)]
    plugins = ["-p", "no:cacheprovider", "-p", "no:randomly"]
    # A test that hangs may hang again when it is taken apart: this ends the process.
    ends = ["--timeout-method", "thread", "-m", "not soak and not gpu"]
    return int(pytest.main([*options, *plugins, *ends, *(f"tests/{node}" for node in nodes)]))
