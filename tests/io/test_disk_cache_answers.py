"""What sources answered last is kept beside the entries, for when they cannot be asked."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_inputs import KEY, keep, weights
from counted_calls import failing
from disk_cache_world import DiskWorld, nothing_odd, opened

from lorax_async.errors import FetchError
from lorax_async.io.cache.upkeep import gc

ELSEWHERE = ("org/elsewhere", "2" * 40)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")


def test_the_last_answer_is_remembered(world: DiskWorld, tmp_path: Path) -> None:
    assert world.cache.last_version("main?") is None
    world.cache.note_version("main?", "org/name", "1" * 40)
    world.cache.note_version("main?", *ELSEWHERE)
    world.cache.note_version("a secret \ud800 question", "org/name", "3" * 40)
    with opened(tmp_path / "cache") as another:
        assert another.cache.last_version("main?") == ELSEWHERE
        assert another.cache.last_version("a secret \ud800 question") == ("org/name", "3" * 40)
    names = [path.name for path in (tmp_path / "cache" / "answers").iterdir()]
    assert all(set(name) <= set("0123456789abcdef") for name in names), "none says who asked"


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff", b'{"source": 1, "version": ""}'])
def test_what_is_no_answer_is_none(world: DiskWorld, tmp_path: Path, content: bytes) -> None:
    world.cache.note_version("main?", *ELSEWHERE)
    (path,) = (tmp_path / "cache" / "answers").iterdir()
    path.write_bytes(content)
    assert world.cache.last_version("main?") is None


def test_answers_that_help_nobody_are_cleaned_up(world: DiskWorld) -> None:
    keep(world.cache, KEY, weights())
    world.cache.note_version("here?", KEY.source, KEY.version)
    world.cache.note_version("gone?", *ELSEWHERE)
    gc(world.cache)
    assert world.cache.last_version("here?") == (KEY.source, KEY.version)
    assert world.cache.last_version("gone?") is None


def test_an_answer_that_is_not_on_the_disk_leaves_the_one_before(world: DiskWorld) -> None:
    world.cache.note_version("what is it?", "hub:org/name", "1")
    with failing(("fsync",), 1, errno.EIO).counted(), pytest.raises(FetchError, match="EIO"):
        world.cache.note_version("what is it?", "hub:org/name", "2")
    assert world.cache.last_version("what is it?") == ("hub:org/name", "1")
