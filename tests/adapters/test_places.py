"""Where ids lead without a network: to local folders, and into the hub cache."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from adapters import hub_cache
from adapters import small_base as base
from lorax_async.adapters import LoraConfig, WeightsFile
from lorax_async.errors import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    InvalidAdapterIdError,
    LoraxError,
)

pytestmark = pytest.mark.usefixtures("nothing_left", "no_network")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST, SECOND = "1" * 40, "2" * 40


def folder(tmp_path: Path, **changes: Any) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj"]), **changes)


# -- local folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("spell", [Path, str, lambda path: f"./{path.name}"])
def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spell: Any) -> None:
    path = folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert LoraConfig.load(spell(path)).r == 8
    with WeightsFile.open(spell(path)) as file:
        assert len(file) == 6


def test_a_folder_beside_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert LoraConfig.load("../adapter").r == 8


def test_a_config_needs_no_weights_beside_it(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / WEIGHTS).unlink()
    assert LoraConfig.load(path).r == 8
    with pytest.raises(AdapterNotFoundError, match=WEIGHTS):
        WeightsFile.open(path)


@pytest.mark.parametrize("name", ["nothing", "adapter/adapter_config.json"])
def test_no_such_folder(tmp_path: Path, name: str) -> None:
    folder(tmp_path)
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        LoraConfig.load(tmp_path / name)


def _spoil(path: Path, how: str) -> None:
    config = path / CONFIG
    config.unlink()
    if how == "folder":
        config.mkdir()
    elif how == "long":
        config.write_bytes(b" " * (256 * 1024 + 1))
    elif how != "missing":
        config.write_bytes({"empty": b"", "json": b"{", "twice": b'{"r":1,"r":2}'}[how])


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("missing", AdapterNotFoundError),
        ("folder", AdapterFormatError),
        ("empty", AdapterFormatError),
        ("long", AdapterFormatError),
        ("json", AdapterFormatError),
        ("twice", AdapterFormatError),
    ],
)
def test_files_that_are_no_configs(tmp_path: Path, how: str, kind: type[LoraxError]) -> None:
    path = folder(tmp_path)
    _spoil(path, how)
    with pytest.raises(kind) as caught:
        LoraConfig.load(path)
    assert caught.value.id == str(path)


# -- the hub cache --------------------------------------------------------------------------------


def files(tmp_path: Path, rank: int) -> dict[str, bytes]:
    path = base.write(tmp_path / f"rank {rank}", base.tensors(rank, types=["q_proj"]), rank)
    return {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def versions(tmp_path: Path, cache: Path) -> None:
    """Two commits of one adapter: the first is v1, the second main and a pull request."""
    hub_cache.put(cache, "org/sql", files(tmp_path, 4), commit=FIRST, refs=("v1",))
    refs = ("main", "refs/pr/1")
    hub_cache.put(cache, "org/sql", files(tmp_path, 8), commit=SECOND, refs=refs)


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    ("id", "rank"),
    [
        ("org/sql", 8),
        ("org/sql@main", 8),
        ("org/sql@v1", 4),
        ("org/sql@refs/pr/1", 8),
        (f"org/sql@{FIRST}", 4),
    ],
)
async def test_hub_ids_are_found_in_the_cache(id: str, rank: int) -> None:
    assert LoraConfig.load(id, "hf_token").r == rank
    assert (await LoraConfig.load_async(id, None)).r == rank
    with WeightsFile.open(id, None) as file:
        assert file.shape(base.key(0, "q_proj", "A")) == (rank, 840)


@pytest.mark.usefixtures("versions")
def test_a_damaged_cache_is_said_to_be(cache: Path) -> None:
    """What was being written when the machine went down, say."""
    (cache / "models--org--sql" / "refs" / "main").write_bytes(b"\xff\xfe")
    for call in (LoraConfig.load, WeightsFile.open):
        with pytest.raises(FetchError, match="cache is damaged") as caught:
            call("org/sql")
        assert caught.value.id == "org/sql"


@pytest.mark.usefixtures("versions")
def test_a_cache_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", refused)
    with pytest.raises(AccessDeniedError, match="hub cache may not be read"):
        LoraConfig.load("org/sql")


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    "id",
    [
        *("", ".", "adapter", "a/b/c", "org/", "/../x\0", "org/sql@", "org/sql@../../x"),
        *("org/sql@/etc", "org/sql@a//b", "org/sql@a b", "org/..", "../\0", "org/a--b", "ö/x"),
        *(7, None, b"org/sql"),
    ],
)
def test_no_ids(id: Any) -> None:
    with pytest.raises(InvalidAdapterIdError):
        LoraConfig.load(id)


@pytest.mark.parametrize("id", ["s3://loras/foo/bar", "file:///x", "https://x/y", "gs://x/y"])
def test_sources_that_only_a_loader_asks(id: str) -> None:
    with pytest.raises(ConfigError, match="an AdapterLoader loads adapters from elsewhere"):
        LoraConfig.load(id)
