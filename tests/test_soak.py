"""Many callers, a bad source, little room, for as long as told: `make soak`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from soak.play import play

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]

DEVICES = pytest.mark.parametrize(("device", "loop"), [("cpu", "uvloop"), ("simulated", "asyncio")])


@pytest.mark.soak
@DEVICES
def test_a_bad_source_for_long(
    tmp_path: Path,
    pytestconfig: pytest.Config,
    capfd: pytest.CaptureFixture[str],
    device: str,
    loop: str,
) -> None:
    def tell(line: str) -> None:
        with capfd.disabled():
            sys.stdout.write(f"{line}\n")

    seconds, seed = pytestconfig.getoption("soak_seconds"), pytestconfig.getoption("soak_seed")
    play(tmp_path, tell, device=device, loop=loop, seconds=seconds, seed=seed)


@DEVICES
def test_a_bad_source_for_a_moment(tmp_path: Path, device: str, loop: str) -> None:
    told: list[str] = []
    play(tmp_path, told.append, device=device, loop=loop, seconds=5, seed=5)
    assert told
