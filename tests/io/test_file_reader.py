"""Readers of files: reads that fall short, files that change, closes that come too soon."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from local_world import descriptors
from source_inputs import read

from lorax_async import errors
from lorax_async.io.sources.checked_open import FileReader, identity_of, open_same


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[FileReader]:
    before = descriptors()
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    identity = identity_of(path.stat())
    reader = FileReader(lambda: open_same(str(path), identity), identity, "file")
    read(reader, 0, 0)  # the first read opens
    yield reader
    reader.close()
    assert descriptors() == before


def test_short_reads_are_continued(reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def stingy(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Eleven bytes a call, over as many buffers as that fills."""
        left, some = 11, []
        for buffer in buffers:
            some.append(buffer.cast("B")[:left])
            left -= some[-1].nbytes
        return real(fd, some, offset)

    monkeypatch.setattr(os, "preadv", stingy)
    whole = memoryview(bytearray(200))
    pieces = [whole[:3], whole[3:3], whole[3:50], whole[50:200].cast("B", (15, 10))]
    reader.read_into(pieces, 7)
    assert bytes(whole) == (bytes(range(256)) * 2)[7:207]


def test_short_reads_of_rows_are_continued(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 30 bytes come in pieces of eleven; no byte between them is asked for."""
    real, asked = os.preadv, set[int]()

    def stingy(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        asked.update(range(offset, offset + sum(buffer.nbytes for buffer in buffers)))
        return real(fd, [buffers[0].cast("B")[:11]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    content, starts = bytearray(5 * 30), range(7, 7 + 5 * 100, 100)
    reader.read_rows(memoryview(content), 7, 5, 100)
    wanted = [n for start in starts for n in range(start, start + 30)]
    assert list(content) == [n % 256 for n in wanted]
    assert asked == set(wanted)


@pytest.mark.parametrize(("rows", "start", "stop"), [(2, 4000, 4110), (2, 4010, 4110)])
def test_rows_that_the_file_has_not(reader: FileReader, rows: int, start: int, stop: int) -> None:
    """4096 bytes are there: the last row ends in between, and begins behind them."""
    size = stop - start - 90 * (rows - 1)
    with pytest.raises(errors.IntegrityError, match=f"file ends before byte {stop:,}"):
        reader.read_rows(memoryview(bytearray(rows * size)), start, rows, 90)


def test_rows_are_checked_together(reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a call of the kernel; that the file is still the same is looked at once."""
    calls: list[str] = []
    for name in ("preadv", "fstat"):
        real = getattr(os, name)

        def counted(*given: object, name: str = name, real: Callable[..., object] = real) -> object:
            calls.append(name)
            return real(*given)

        monkeypatch.setattr(os, name, counted)
    reader.read_rows(memoryview(bytearray(400)), 0, 100, 40)
    assert calls == ["preadv"] * 100 + ["fstat"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, errors.FetchError), (errno.EACCES, errors.AccessDeniedError)],
)
def test_the_systems_errors_are_ours(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch, number: int, kind: type
) -> None:
    def broken(*_: object) -> int:
        raise OSError(number, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    rows = memoryview(bytearray(2))
    for reading in (lambda: read(reader, 0, 1), lambda: reader.read_rows(rows, 0, 2, 9)):
        with pytest.raises(errors.FetchError, match=errno.errorcode[number]) as caught:
            reading()
        assert type(caught.value) is kind
        assert isinstance(caught.value.__cause__, OSError)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def touch(path: Path) -> None:
    os.utime(path)


def rewrite(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [truncate, touch, rewrite, grow, Path.unlink])
def test_a_change_is_noticed(
    reader: FileReader, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    read(reader, 0, 10)
    threading.Event().wait(0.02)  # the clock of files may tick that slowly
    change(tmp_path / "file")
    with pytest.raises(errors.IntegrityError, match="again"):
        read(reader, 50, 150)


def test_a_descriptor_outlives_the_read_it_serves(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go, real = threading.Event(), threading.Event(), os.preadv

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        entered.set()
        assert go.wait(10)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    before = descriptors()
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read, reader, 3, 9)
        assert entered.wait(10)
        reader.close()
        assert descriptors() == before
        go.set()
        assert reading.result() == bytes(range(3, 9))
    assert len(descriptors()) == len(before) - 1
    with pytest.raises(errors.FetchError):
        read(reader, 3, 9)


def test_a_forgotten_reader_is_closed_and_warns(tmp_path: Path) -> None:
    before = descriptors()
    (tmp_path / "file").write_bytes(b"x")
    identity = identity_of((tmp_path / "file").stat())
    reader = FileReader(lambda: open_same(str(tmp_path / "file"), identity), identity, "file")
    read(reader, 0, 0)
    with pytest.warns(ResourceWarning, match="unclosed reader of file"):
        del reader
    assert descriptors() == before
