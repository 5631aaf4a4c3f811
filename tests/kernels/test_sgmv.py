"""The GPU's kernels without a GPU: interpreted against float64, and compiled for two of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.needs("triton")


def prove(module: str, *parts: str, timeout: float = 280) -> None:
    """In a process: Triton reads once what it is to do, and a stray access ends the process."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", module, *parts],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    tried = [line.partition(":")[0] for line in done.stdout.splitlines() if line.endswith(" tried")]
    assert tried == list(parts)


def test_cases_by_hand_and_the_fault_that_each_of_them_notices() -> None:
    prove("sgmv.interpreted", "by_hand", "unfit_ranks", "mutants")


def test_every_pair_of_levels_of_the_grid() -> None:
    prove("sgmv.interpreted", "pairs")


def test_any_segments() -> None:
    prove("sgmv.interpreted", "segments")


def test_compiled_for_sm_80_and_sm_90() -> None:
    prove("sgmv.compiled", "gates", "variants", "large_tiles", "mutants")


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_whole_grid(dtype: str) -> None:
    prove("sgmv.interpreted", f"{dtype}_grid", timeout=3500)


@pytest.mark.soak
def test_compiled_for_the_other_dtypes() -> None:
    prove("sgmv.compiled", "other_gates")
