"""The host tier of weights in several files: all of them are held, or none is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_world import LocalWorld, descriptors, maps_below, nothing_left_open
from split_world import FILES, cut, put, replace, touch

from lorax_async import errors
from lorax_async.adapter import AdapterRef
from lorax_async.io.mapped import MappedFile
from lorax_async.io.ports import Demand
from lorax_async.io.sources import local_hold
from page_looks import cached_pages, drop_pages, map_sizes, pages
from split_files import write

WEIGHTS = FILES[2:]
SIZES = {"a": 10_000, "b": 5, "c": 3_000}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path, immutable=True) as world:
        put(world.roots[0] / "one")
        yield world


async def test_every_file_comes_back_and_stays(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many pieces, for files of several pages."""
    monkeypatch.setattr(local_hold, "PIECE_BYTES", 4096)
    write(host.roots[0] / "one", [{name: torch.ones(n)} for name, n in SIZES.items()])
    paths = [host.roots[0] / "one" / name for name in WEIGHTS]
    key = await host.source.resolve(AdapterRef("./one"))
    file = await host.source.open(key, Demand())
    assert file.holdable
    counted = file.reader.nbytes  # what the host tier's budget is asked for
    file.reader.close()
    for path in paths:
        drop_pages(path)
    before = descriptors()
    hold = await host.source.populate(key)
    assert descriptors() == before
    assert hold.nbytes == sum(path.stat().st_size for path in paths)
    assert hold.nbytes <= counted
    for path in paths:
        (sizes,) = map_sizes(path)
        assert sizes["Rss"] == sizes["Size"]
        assert sizes["Locked"] == (sizes["Size"] if hold.locked else 0)
        drop_pages(path)
        assert cached_pages(path) == pages(path.stat().st_size)
    hold.close()


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_file_outside_of_the_root_leaves_all_unheld(host: LocalWorld, number: int) -> None:
    folder, other = host.roots[0] / "one", put(host.outside / "two")
    (folder / WEIGHTS[number]).unlink()
    (folder / WEIGHTS[number]).symlink_to(other / WEIGHTS[number])
    key = await host.source.resolve(AdapterRef(folder))
    file = await host.source.open(key, Demand())
    file.reader.close()
    hold = await host.source.populate(key)
    assert (file.holdable, hold.nbytes, hold.locked) == (False, 0, False)
    hold.close()
    assert maps_below(host.outside.parent) == []


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("change", [touch, cut, replace])
@pytest.mark.parametrize("when", ["during", "after"])
async def test_a_file_that_changes_leaves_all_unheld(
    host: LocalWorld,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Path], None],
    when: str,
) -> None:
    path = host.roots[0] / "one" / name
    populate = local_hold.LocalHold.populate

    def changing(hold: local_hold.LocalHold, start: int) -> None:
        last = start == hold.starts[-1]
        if when == "during" and not start:
            change(path)
        populate(hold, start)
        if when == "after" and last:
            change(path)

    monkeypatch.setattr(local_hold.LocalHold, "populate", changing)
    key = await host.source.resolve(AdapterRef("./one"))
    with pytest.raises(errors.IntegrityError, match=f"{name}.*again"):
        await host.source.populate(key)
    assert maps_below(path.parent) == []


@pytest.mark.parametrize("nth", [0, 1, 2])
async def test_a_file_that_cannot_be_mapped(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    made: list[MappedFile] = []

    def refused(fd: int, nbytes: int, name: str) -> Any:
        if len(made) == nth:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        made.append(MappedFile(fd, nbytes, name))
        return made[-1]

    monkeypatch.setattr(local_hold, "MappedFile", refused)
    key = await host.source.resolve(AdapterRef("./one"))
    before = descriptors()
    with pytest.raises(errors.FetchError, match=rf"{WEIGHTS[nth]} cannot be read \(ENOMEM\)"):
        await host.source.populate(key)
    made.clear()
    assert (descriptors(), maps_below(host.roots[0])) == (before, [])
