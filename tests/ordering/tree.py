"""A copy of the code and its tests, in which one thing at a time is removed."""

from __future__ import annotations

import compileall
import multiprocessing
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

from ordering.child import HANGS_AFTER, run_tests
from ordering.mutant import Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("lorax_async", "kernels", "tests")
GIVEN_UP_AFTER = 40.0
"""Seconds, for a process that not even its own timeout could end."""

_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?::.+?)(?: - .*)?$", re.MULTILINE)
_STARTED = re.compile(
    r"^(tests/.+?::.+?)\s*(?:\+{4}.*|(?:PASSED|FAILED|ERROR|SKIPPED).*)?$", re.MULTILINE
)
_OUR_MISTAKE = re.compile(r"\b(NameError|UnboundLocalError|ImportError|SyntaxError|ModuleNotFound)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of some tests: pytest's exit code, None if it hung, and what was printed."""

    code: int | None
    output: str

    @property
    def passed(self) -> bool:
        return self.code == 0 and " passed" in self.output

    @property
    def not_run(self) -> bool:
        """All were skipped: there is no late device here."""
        return self.code == 0 and not self.passed

    @property
    def hung(self) -> bool:
        return self.code is None or "+ Timeout +" in self.output

    @property
    def failed(self) -> str | None:
        """The test that failed, or hung; None where none did, and where none could be run."""
        if _OUR_MISTAKE.search(self.output):
            return None
        found = _FAILED.search(self.output)
        if self.code == 1 and found is not None:
            return found[1]
        started = _STARTED.findall(self.output) if self.hung else []
        return f"{started[-1]} (hangs)" if started else None


class Tree:
    """The copy, below `base`."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._runs = 0
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["torch", "pytest"])
        for part in PARTS:
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / part, base / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", base)
        # Compiled files would go by seconds and size, and one change may look like the next.
        compileall.compile_dir(
            base / "lorax_async", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH
        )

    @contextmanager
    def without(self, mutant: Mutant) -> Iterator[None]:
        path = self._base / "lorax_async" / mutant.file
        whole = path.read_text()
        assert whole.count(mutant.snippet) == 1
        path.write_text(whole.replace(mutant.snippet, mutant.instead))
        try:
            yield
        finally:
            path.write_text(whole)

    def run(
        self,
        nodes: Sequence[str],
        *,
        hangs_after: float = HANGS_AFTER,
        given_up_after: float = GIVEN_UP_AFTER,
    ) -> Verdict:
        """Run tests, until the first fails, or takes so many seconds."""
        self._runs += 1
        output = self._base / f"output-{self._runs}"
        process = self._processes.Process(
            target=run_tests, args=(str(self._base), tuple(nodes), str(output), hangs_after)
        )
        process.start()
        process.join(given_up_after)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        code = None if hangs else process.exitcode
        process.close()
        return Verdict(code, output.read_text(errors="replace"))
