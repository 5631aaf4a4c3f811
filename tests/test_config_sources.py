"""Settings about adapters from elsewhere: what is accepted, what is refused at construction."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from lorax_async import ConfigError, LoaderConfig


def made(**settings: Any) -> LoaderConfig:
    return LoaderConfig(**settings)


def test_as_the_issue_has_them() -> None:
    config = made()
    assert (config.allow, config.hub_endpoint, config.hub_cache) == ((), None, "read")
    assert (config.hub_cache_dir, config.cache_dir, config.offline) == (None, None, False)
    assert (config.verify, config.connections, config.revalidate) == ("stream", 16, 60.0)
    assert config.cache_bytes == 16 * 1024**3


@pytest.mark.parametrize(
    ("name", "words"),
    [("hub_cache", ("read", "write", "off")), ("verify", ("none", "stream", "before_use"))],
)
def test_words(name: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert getattr(made(**{name: word}), name) == word
    others: list[object] = ["READ", "", "always", None, True, [], {}]
    for wrong in others:
        with pytest.raises(ConfigError, match=f"^{name} must be one of {', '.join(words)}$"):
            made(**{name: wrong})


def test_offline_is_a_bool() -> None:
    assert made(offline=True).offline
    for wrong in (0, 1, None, "no"):
        with pytest.raises(ConfigError, match="^offline must be True or False"):
            made(offline=wrong)


@pytest.mark.parametrize("name", ["cache_bytes", "connections"])
def test_counts(name: str) -> None:
    assert getattr(made(**{name: 1}), name) == 1
    for wrong in (0, -1, True, 1.0, "16", None, math.inf):
        with pytest.raises(ConfigError, match=f"^{name} must be a positive integer"):
            made(**{name: wrong})


def test_there_are_not_too_many_connections() -> None:
    assert made(connections=256).connections == 256
    with pytest.raises(ConfigError, match="connections must be 256 at most, not 257"):
        made(connections=257)


def test_an_answer_may_be_good_for_no_time() -> None:
    assert [made(revalidate=value).revalidate for value in (0, 0.5, 86_400)] == [0, 0.5, 86_400]
    for wrong in (-1, False, math.nan, math.inf, None, "60", [0]):
        with pytest.raises(ConfigError, match="revalidate must be"):
            made(revalidate=wrong)


# -- the hub's endpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://huggingface.co", "https://huggingface.co"),
        ("HTTPS://Mirror.Example:443/hf/", "https://mirror.example/hf"),
        ("http://127.0.0.1:8090", "http://127.0.0.1:8090"),
        ("http://[::1]:80/", "http://[::1]"),
    ],
)
def test_an_endpoint_has_one_spelling(given: str, kept: str) -> None:
    assert made(hub_endpoint=given).hub_endpoint == kept


@pytest.mark.parametrize(
    "endpoint",
    [
        *("", "huggingface.co", "ftp://host", "https://", "https://user:swordfish@host"),
        *("https://host?key=swordfish", "https://host/#swordfish", "https://host/../x", "s3://abc"),
        *(b"https://host", 5, Path("/x"), ["https://host"]),
    ],
)
def test_what_is_no_endpoint(endpoint: Any) -> None:
    with pytest.raises(ConfigError, match="^hub_endpoint ") as caught:
        made(hub_endpoint=endpoint)
    assert "swordfish" not in str(caught.value)


def test_the_environment_names_no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads it, once; two who read it might differ."""
    monkeypatch.setenv("HF_ENDPOINT", "https://elsewhere.example")
    assert made().hub_endpoint is None


# -- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache_dir", "hub_cache_dir"])
def test_folders_may_be_there_or_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = [getattr(made(**{name: value}), name) for value in (tmp_path, "new/one", None)]
    assert kept == [tmp_path, tmp_path / "new" / "one", None]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["cache_dir", "hub_cache_dir"])
def test_what_is_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for wrong in ("", b"", 5, ["x"], tmp_path / "file", tmp_path / "dangling", "a\0b"):
        with pytest.raises(ConfigError, match=f"^{name} .*folder"):
            made(**{name: wrong})


def test_the_cache_is_where_the_xdg_specification_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up when it is asked for; what is not absolute is to be ignored there."""
    config = made()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_folder == tmp_path / "xdg" / "lorax-async"
    for relative in ("", "relative/xdg"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert config.cache_folder == tmp_path / "home" / ".cache" / "lorax-async"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.cache_folder == tmp_path / "home" / ".cache" / "lorax-async"
    assert made(cache_dir=tmp_path / "own").cache_folder == tmp_path / "own"
    assert os.listdir(tmp_path) == []


def test_without_a_home_a_cache_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(ConfigError, match="name a cache_dir"):
        made().cache_folder  # noqa: B018
