"""The throttled link of the benchmarks is one, and the engine on it brings layer 0 early."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from fetching import Anywhere

from link import Link
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.file_sink import FileSink
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.http.target import Target
from lorax_async.io.http.urls import parse_url

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


LAYERS = 16


LAYER = 125_000


HEADER = 20_000


DATA = random.Random(3).randbytes(HEADER + LAYERS * LAYER)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    return path


class CountingSink(FileSink):
    landed = 0

    def write(self, offset: int, data: memoryview) -> None:
        super().write(offset, data)
        self.landed += len(data)


def test_layer_0_comes_long_before_the_rest_of_a_throttled_load(file: Path, tmp_path: Path) -> None:
    """2 MB on 4 connections of 600 KB/s. Bytes are counted: no clock is looked at."""
    spans = [(HEADER + n * LAYER, HEADER + (n + 1) * LAYER) for n in range(LAYERS)]
    names = sorted(range(LAYERS), key=str)
    groups = [[], *([spans[names.index(layer)]] for layer in range(LAYERS)), []]
    fd = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    sink, told = CountingSink(fd), list[tuple[int, int]]()
    with Link({"w": file}, rate=6e5, delay=0.005) as link:
        with RangeEngine(HttpSettings(connections=4, proxies={})) as engine:
            place = Target(parse_url(link.url("w")), "w", rules=Anywhere())
            answer = engine.ask(place, HEADER).done.result(10)
            os.pwrite(fd, answer.start, 0)
            job = engine.download(
                answer,
                groups,
                sink,
                lambda group: told.append((group, sink.landed)),
                first=2,
            )
            job.done.result(20)
        counts = link.counts()
    assert os.pread(fd, len(DATA), 0) == DATA
    os.close(fd)
    assert [group for group, _ in told] == list(range(LAYERS + 2))
    assert told[1][1] < 0.3 * sink.landed
    assert counts["bytes"] == len(DATA), "and every byte was sent once"
    assert counts["requests"] <= 1 + 4 * 6
