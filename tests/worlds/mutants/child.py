"""Runs of pytest in processes that are forked from one with everything imported."""

import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
HANGS_AFTER = 12.0  # Seconds after which a test hangs; each takes a few at most

_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_REASON = re.compile(r"^E  +(\S.*)$", re.MULTILINE)
_BROKEN = re.compile(
    r"\b(NameError|UnboundLocalError|ImportError|ModuleNotFoundError|fixture '.*' not)"
)


class Verdict(NamedTuple):
    """Pytest's exit code (None if it had to be killed) and its output."""

    code: int | None
    output: str

    @property
    def passed(self) -> bool:
        return self.code == 0 and " passed" in self.output

    @property
    def not_run(self) -> bool:
        """Whether all tests were skipped or deselected: what they need is not installed."""
        return self.code in (0, 5) and not self.passed

    @property
    def failure(self) -> str | None:
        """The test that failed or hung, with its reason; None if the mutant broke by itself."""
        if self.code is None or "+ Timeout +" in self.output:
            return "a test hangs"
        failed = _FAILED.search(self.output)
        if self.code != 1 or failed is None or _BROKEN.search(self.output):
            return None
        reason = _REASON.search(self.output)
        return f"{failed[1]}: {reason[1] if reason else ''}"


class Children:
    """Forks processes that apply a mutant and run tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pytest", "transformers", "mutants.table"])
        with pytest.MonkeyPatch.context() as patch:  # its modules are looked for as these here
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            forkserver.ensure_running()

    def run(
        self,
        nodes: Sequence[str],
        name: str | None,
        *options: str,
        hangs_after: float = HANGS_AFTER,
    ) -> Verdict:
        """Run tests, with a mutant or without, until one fails or takes `hangs_after` seconds."""
        self._count += 1
        output = self._folder / f"output-{self._count}"
        given = (nodes, name, str(output), options, hangs_after)
        child = self._context.Process(target=_run, args=given)
        child.start()
        child.join(4 * hangs_after)
        if child.is_alive():
            child.kill()
            child.join()
            code = None
        else:
            code = child.exitcode
        child.close()
        return Verdict(code, output.read_text(errors="replace"))


def _run(
    nodes: Sequence[str], name: str | None, output: str, options: Sequence[str], hangs_after: float
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    sys.argv = ["pytest"]
    from mutants.table import MUTANTS

    if name is not None:
        MUTANTS[name].apply()
    options = [*options, "-x", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly"]
    options += ["--timeout", str(hangs_after), "--timeout-method", "thread"]
    options += ["-m", "not soak and not gpu", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *(f"tests/{node}" for node in nodes)])
    sys.stdout.flush()
    os._exit(int(code))  # a thread that a broken test left behind must not keep the process
