"""Files are opened once, and stay open for as long as copies read them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import AdapterLoader, LoaderConfig
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.io.sources.checked_open import FileReader, identity_of
from tiny_sources import state, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_a_copy_that_is_wanted_no_longer_reads_its_file_to_the_end(tmp_path: Path) -> None:
    """Its slot is waited for; the file is all here meanwhile, and must not seem lost."""
    source = stocked(tmp_path, "a")
    source.hold("a")
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=1)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=1, io_threads=2, timeout=20)
    async with AdapterLoader(tiny.layout(), config, source=source, device=device) as there:
        device.gate.clear()
        hint = there.prefetch("a", tier="disk")
        async with there.stream("a"):
            source.allow("a", 0, 1)
            await until(lambda: device.copies == 2)
        source.allow("a")
        await hint
        device.gate.set()
        await until(lambda: state(there, "a") == "present")
        async with await there.load("a") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "a")
        assert there.statistics().failures == 0
        assert source.counts.opens == 1


def test_a_file_is_opened_once_by_the_first_of_many_reads(tmp_path: Path) -> None:
    path, opened = tmp_path / "file", list[int]()
    path.write_bytes(b"content")

    def open_slowly() -> int:
        time.sleep(0.03)
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    reader = FileReader(open_slowly, identity_of(path.stat()), "the file")
    with ThreadPoolExecutor(2) as threads:
        buffers = [bytearray(7) for _ in range(2)]
        for done in [threads.submit(reader.read_into, [memoryview(each)], 0) for each in buffers]:
            done.result(10)
    reader.close()
    assert len(opened) == 1
    assert buffers == [b"content"] * 2
