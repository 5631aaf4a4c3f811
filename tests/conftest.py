"""Fixtures for all tests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from common import LOOPS, Run, mapped_files, open_files, open_sockets, our_threads


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine to its end, on asyncio's loop and on uvloop's."""
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield runner.run


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test if it leaves a file open or a thread of ours running."""
    # What is older than the test is not looked at again: with torch and transformers loaded, a
    # collection would take some tenths of a second.
    gc.freeze()
    files = open_files()
    yield
    gc.collect()
    gc.unfreeze()
    assert open_files() <= files
    assert not our_threads()
    assert not mapped_files()


@pytest.fixture
def no_socket_left() -> Iterator[None]:
    """Fails the test if it leaves a socket open."""
    before = open_sockets()
    yield
    assert open_sockets() <= before
