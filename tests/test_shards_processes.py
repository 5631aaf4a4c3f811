"""Two and four processes, each with its shard of base and adapter, compute what one would."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sharded

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
SECONDS = 60
PATHS = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels")]


def ranks_of(folder: Path, world: int) -> list[dict[str, float]]:
    """What each rank wrote. None is left, whatever happens."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(PATHS),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, TESTS / "shard_rank.py", folder, str(rank), str(world)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    until = time.monotonic() + SECONDS
    try:
        told = [rank.communicate(timeout=until - time.monotonic()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            for stream in (rank.stdout, rank.stderr):
                assert stream is not None
                stream.close()
    for rank, (_, errors) in zip(ranks, told, strict=True):
        assert rank.returncode == 0, errors
    return [json.loads(answer) for answer, _ in told]


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_compute_what_the_whole_model_does(world: int, tmp_path: Path) -> None:
    """In float32 against float64. On four ranks two share each of the two heads of k and v."""
    names = {module.name for module in sharded.layout().modules}
    for off in ranks_of(sharded.write(tmp_path / "a", rank=3), world):
        assert off.keys() == names | {"model"}
        assert all(math.isfinite(each) and each < 1e-5 for each in off.values()), off
