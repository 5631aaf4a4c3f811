"""Local roots: what is accepted, what is refused at construction, and by which words."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from lorax_async.config import LoaderConfig, LocalRoot
from lorax_async.errors import ConfigError


def made(**settings: Any) -> LoaderConfig:
    return LoaderConfig(**settings)


def paths_of(config: LoaderConfig) -> list[object]:
    return [root.path for root in config.local_roots if isinstance(root, LocalRoot)]


class Place:
    """What `os.PathLike` asks for, and no more."""

    def __init__(self, place: str | bytes) -> None:
        self._place = place

    def __fspath__(self) -> str | bytes:
        return self._place


def test_whatever_names_a_path_may_be_a_root(tmp_path: Path) -> None:
    places: Any = (Place(str(tmp_path)), Place(bytes(tmp_path)))
    assert made(local_roots=places).local_roots == (LocalRoot(tmp_path), LocalRoot(tmp_path))
    with pytest.raises(ConfigError, match="is not a folder"):
        made(local_roots=(Place(""),))


def test_roots_are_absolute_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    config = made(local_roots=[str(tmp_path), Path("inner"), "."])
    monkeypatch.chdir("/")
    places = (tmp_path, tmp_path / "inner", tmp_path)
    assert config.local_roots == tuple(LocalRoot(place) for place in places)
    assert [paths_of(config), made().local_roots] == [list(places), ()]


@pytest.mark.parametrize("roots", ["/", Path("/"), None, 5, {"/"}, [5], [None], [b"/"]], ids=repr)
def test_roots_are_a_tuple(roots: object) -> None:
    """A single string would otherwise be taken letter by letter."""
    with pytest.raises(ConfigError, match="local_roots must be a tuple of folders"):
        made(local_roots=roots)


@pytest.mark.parametrize("root", ["", "file", "missing", "a\0b", "x" * 5000, "file/below"])
def test_a_root_that_is_no_folder(tmp_path: Path, root: str) -> None:
    """An empty one (an unset variable, say) must not open the present folder."""
    (tmp_path / "file").touch()
    place = root and str(tmp_path / root)
    with pytest.raises(ConfigError, match="is not a folder") as caught:
        made(local_roots=("/", place))
    assert len(str(caught.value)) <= 1000


def test_a_root_behind_a_closed_door(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refused)
        with pytest.raises(ConfigError, match="'/elsewhere' is not a folder"):
            made(local_roots=("/elsewhere",))


def test_a_root_says_whether_its_files_change(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    root = LocalRoot(str(tmp_path / "." / "inner") + "/", immutable=True)
    config = LoaderConfig(local_roots=(root, tmp_path))
    assert config.local_roots == (root, LocalRoot(tmp_path, immutable=False))
    assert config.local_roots[0] is root
    assert paths_of(config) == [tmp_path / "inner", tmp_path]
    assert replace(config, max_slots=3).local_roots == config.local_roots


def test_a_root_is_where_it_was_when_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = LocalRoot(".")
    monkeypatch.chdir("/")
    assert root.path == tmp_path


@pytest.mark.parametrize("path", [None, 5, b"/", ["/"], LocalRoot], ids=repr)
def test_a_root_that_is_no_path(path: Any) -> None:
    with pytest.raises(ConfigError, match="a local root must be the path of a folder, not"):
        LocalRoot(path)


@pytest.mark.parametrize("value", [0, 1, None, "yes"], ids=repr)
def test_immutable_is_a_bool(value: Any) -> None:
    with pytest.raises(ConfigError, match="immutable must be True or False, not"):
        LocalRoot("/", immutable=value)


@pytest.mark.parametrize("path", ["", "nothing/there", "/dev/null"])
def test_a_root_alone_is_checked_too(path: str) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        LocalRoot(path, immutable=True)


def test_roots_are_frozen_values() -> None:
    root = LocalRoot("/", immutable=True)
    with pytest.raises(FrozenInstanceError):
        root.immutable = False  # type: ignore[misc]
    assert hash(root) == hash(LocalRoot(Path("/"), immutable=True))
    assert root != LocalRoot("/")
