"""Settings: what is accepted, what is refused at construction, and by which words."""

import math
import os
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any

import pytest
import tiny
import torch

from lorax_async import (
    AdapterLoader,
    AdapterRef,
    Allow,
    Limits,
    LoaderConfig,
    LocalRoot,
    Shard,
    StoreConfig,
    errors,
)
from lorax_async.types import MAX_SECONDS

Patch = pytest.MonkeyPatch
made: Any = LoaderConfig  # of settings that are wrong, too
NAN, INF = math.nan, math.inf
NOT_COUNTS = [0, -1, -(1 << 70), 1.0, 1.5, NAN, INF, True, False, "16", "", b"1", None, [1], ...]
NOT_SIZES = ["GiB", "-1GiB", "1.5GiB", "1GB", "1gib", "0GiB", "0x1GiB", "1KiBMiB"]
NOT_SECONDS = [0, -1, 0.0, -0.5, -INF, INF, NAN, 1e10, 10**400, True, "5", "", None, [5.0], 5j]
NOT_WORDS: list[Any] = ["READ", "", "whenever", "fifo", None, 1, True, [], {}]
NOT_DTYPES = [torch.int8, torch.float64, torch.float8_e4m3fn, "float64", "F32", "fp16", "", 1, []]
NOT_DEVICES = ["cuda:", "cuda:01", "cuda:-1", "cuda:0 ", "mps", "meta", "CPU", "cpu:0", "", None, 0]
NOT_ENDPOINTS = [
    *("", "huggingface.co", "ftp://host", "https://", "https://user:swordfish@host", "s3://abc"),
    *("https://host?key=swordfish", "https://host/#swordfish", "https://host/../x"),
    *(b"https://host", 5, Path("/x"), ["https://host"]),
]

SETTINGS: dict[str, tuple[list[Any], list[Any], str]] = {
    **dict.fromkeys(
        ("device_bytes", "staging_bytes", "cache_bytes"),
        ([1, 1 << 40], [*NOT_COUNTS, *NOT_SIZES], "must be a positive integer"),
    ),
    **dict.fromkeys(
        ("max_slots", "io_threads", "connections"),
        ([1, 256], [*NOT_COUNTS, 1 << 40], "must be a positive integer|must be .* at most"),
    ),
    **dict.fromkeys(
        ("timeout", "starvation_age"),
        ([1, 0.001, 1e-9, 86_400 * 365, 1e9], NOT_SECONDS, "must be a positive number of seconds"),
    ),
    **dict.fromkeys(
        ("min_residency", "revalidate", "revalidate_files"),
        ([0, 0.5, 86_400], [-1, False, NAN, INF, None, "1", [0]], "must be"),
    ),
    **dict.fromkeys(
        ("host_bytes", "pinned_bytes"),
        ([0, 1], [-1, True, 1.0, None, "1"], "must be an integer of at least 0"),
    ),
    "eviction": (["lru", "lfu", "gdsf"], [*NOT_WORDS, "LRU"], "must be one of lru, lfu, gdsf"),
    "hub_cache": (["read", "off"], NOT_WORDS, "must be one of read, off, not"),
    "verify": (["none", "stream", "before_use", "always"], NOT_WORDS, "must be one of none, str"),
    "check_finite": (BOOLS := ([True, False], ["no", 0, 1, None, NAN], "must be True or")),
    "offline": BOOLS,
    "convert_bin": BOOLS,
    "device": (
        ["cpu", "cuda", "cuda:0", "cuda:11", "simulated"],
        [*NOT_DEVICES, torch.device("cpu")],
        "is not 'cpu', 'cuda', 'cuda:N' or 'simulated'",
    ),
    "dtype": (
        [None, "float32", "float16", "bfloat16"],
        [*NOT_DTYPES, True, {}],
        "must be one of float32, float16, bfloat16 or",
    ),
    "limits": ([Limits(), Limits(max_rank=8)], [None, {"max_rank": 8}, 8, Limits], "must be Lim"),
    "allow": (
        [(), (Allow("hub", prefix="org/"), Allow("s3", "bucket"))],
        [None, "hub", Allow("hub"), ("hub",), [Allow], {Allow("hub")}],
        r"must be a tuple of Allow\(",
    ),
    "shard": ([None, Shard(1, 2)], [1, (0, 2), "0/2"], r"must be Shard\(rank, world_size\) or"),
    "hub_endpoint": ([None, "http://127.0.0.1:8090"], NOT_ENDPOINTS, ""),
    "local_roots": ([()], ["/", Path("/"), None, 5, {"/"}, [5], [None], [b"/"]], "must be a tup"),
}
"""By name: values that are kept as they are, values that are refused, and how."""


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_keeps_what_is_right_and_says_what_is_wrong(name: str) -> None:
    right, wrong, words = SETTINGS[name]
    for value in right:
        assert getattr(made(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(errors.ConfigError, match=f"^{name} .*(?:{words})") as caught:
            made(**{name: value})
        assert isinstance(caught.value, errors.UsageError | errors.LoraxError)
        assert not caught.value.retryable
        assert "swordfish" not in str(caught.value)
        assert len(str(caught.value)) <= 1000


def test_sizes_may_have_units() -> None:
    config = LoaderConfig(device_bytes="2GiB", cache_bytes="1 TiB", host_bytes="0KiB")
    assert (config.device_bytes, config.cache_bytes, config.host_bytes) == (2 << 30, 1 << 40, 0)
    assert Limits(max_adapter_bytes="16MiB").max_adapter_bytes == 16 << 20
    assert config == replace(config) == pickle.loads(pickle.dumps(config))
    assert "device_bytes=2147483648" in repr(config)
    with pytest.raises(
        errors.ConfigError, match=r'not \'2\'; as text, a size is "64MiB" or "2GiB"'
    ):
        LoaderConfig(device_bytes="2")


@pytest.mark.parametrize("name", [entry.name for entry in fields(Limits)])
def test_limits_are_positive_integers(name: str) -> None:
    for value in NOT_COUNTS:
        with pytest.raises(errors.ConfigError, match=f"^{name} must be a positive integer, not "):
            Limits(**{name: value})  # type: ignore[arg-type]


def test_dtypes_may_be_torchs() -> None:
    for given in (torch.float32, torch.float16, torch.bfloat16):
        name = str(given).removeprefix("torch.")
        config = made(dtype=given)
        assert config == made(dtype=name)
        assert (config.dtype, config.resolved("F32").dtype) == (name, name)
    assert made().resolved("F16").dtype == "float16"
    assert [made(dtype=word).storage_dtype for word in (None, "bfloat16")] == [None, "BF16"]


@pytest.mark.parametrize("config", [LoaderConfig(), Limits()], ids=["config", "limits"])
def test_settings_are_frozen_and_go_by_name(config: LoaderConfig | Limits) -> None:
    for entry in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, entry.name, getattr(config, entry.name))
    assert hash(config) == hash(type(config)())
    assert config == type(config)()
    with pytest.raises(TypeError):
        LoaderConfig("cpu")  # type: ignore[arg-type,call-arg]
    with pytest.raises(errors.ConfigError):
        replace(LoaderConfig(), max_slots=0)


def test_a_calls_own_timeout_comes_first_and_is_checked_too() -> None:
    config = made(timeout=7)
    assert [config.seconds(value) for value in (None, 0, 2.5, 10**9)] == [7.0, 0.0, 2.5, 1e9]
    assert MAX_SECONDS < TIMEOUT_MAX
    for value in (-1, -0.1, NAN, INF, 1e10, 10**400, True, "5", [5]):
        with pytest.raises(errors.UsageError, match="a timeout is from 0 to"):
            config.seconds(value)


def test_other_platforms_are_refused(monkeypatch: Patch) -> None:
    for platform in ("darwin", "win32"):
        monkeypatch.setattr("sys.platform", platform)
        with pytest.raises(errors.ConfigError, match="runs on Linux only"):
            AdapterLoader(tiny.layout())


def test_an_endpoint_has_one_spelling(monkeypatch: Patch) -> None:
    """The environment names none: huggingface_hub reads it, once; two who read it might differ."""
    monkeypatch.setenv("HF_ENDPOINT", "https://elsewhere.example")
    for given, kept in (
        ("HTTPS://Mirror.Example:443/hf/", "https://mirror.example/hf"),
        ("http://[::1]:80/", "http://[::1]"),
    ):
        assert made(hub_endpoint=given).hub_endpoint == kept
    assert made().hub_endpoint is None


def test_a_removed_value_says_what_to_use_instead() -> None:
    with pytest.raises(errors.ConfigError, match=r"removed.*cache_dir.*hf download"):
        LoaderConfig(hub_cache="write")  # type: ignore[arg-type]
    for kind in (StoreConfig, LoaderConfig):
        assert replace(kind(peers=None), timeout=1) == kind(timeout=1)
        with pytest.raises(errors.ConfigError, match=r"peers.* removed.*caching proxy"):
            kind(peers=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cache_dir", "hub_cache_dir"])
def test_a_caches_folder_may_be_there_or_not(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = [getattr(made(**{name: value}), name) for value in (tmp_path, "new/one", None)]
    assert kept == [tmp_path, tmp_path / "new" / "one", None]
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for wrong in ("", b"", 5, ["x"], tmp_path / "file", tmp_path / "dangling", "a\0b"):
        with pytest.raises(errors.ConfigError, match=f"^{name} .*folder"):
            made(**{name: wrong})


def test_the_cache_folder_is_that_of_xdg(tmp_path: Path, monkeypatch: Patch) -> None:
    config, usual = made(), tmp_path / "home" / ".cache" / "lorax-async"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_folder == tmp_path / "xdg" / "lorax-async"
    for relative in ("", "relative/xdg"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert config.cache_folder == usual
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.cache_folder == usual

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(errors.ConfigError, match="name a cache_dir"):
        made().cache_folder  # noqa: B018


class Place:
    """What `os.PathLike` asks for, and no more."""

    def __init__(self, place: str | bytes) -> None:
        self._place = place

    def __fspath__(self) -> str | bytes:
        return self._place


def test_roots_are_absolute_folders(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    fixed = LocalRoot(str(tmp_path / "." / "inner") + "/", immutable=True)
    names: Any = [str(tmp_path), Path("inner"), ".", Place(str(tmp_path)), Place(bytes(tmp_path))]
    config, root = made(local_roots=[*names, fixed]), LocalRoot(".")
    monkeypatch.chdir("/")
    here, inner = LocalRoot(tmp_path), LocalRoot(tmp_path / "inner")
    assert config.local_roots == (here, inner, here, here, here, fixed)
    assert config.local_roots[-1] is fixed
    assert replace(config, max_slots=3).local_roots == config.local_roots
    assert root.path == tmp_path
    assert not here.immutable
    assert fixed != inner
    assert hash(here) == hash(LocalRoot(str(tmp_path)))
    with pytest.raises(FrozenInstanceError):
        here.immutable = True  # type: ignore[misc]


@pytest.mark.parametrize("root", ["", "file", "missing", "a\0b", "x" * 5000, "file/below"])
def test_a_root_that_is_no_folder_is_refused(tmp_path: Path, root: str) -> None:
    """An empty one (an unset variable, say) must not open the present folder."""
    (tmp_path / "file").touch()
    place = root and str(tmp_path / root)
    for make in (lambda: made(local_roots=("/", Place(place))), lambda: LocalRoot(place)):
        with pytest.raises(errors.ConfigError, match="is not a folder") as caught:
            make()
        assert len(str(caught.value)) <= 1000


def test_a_root_is_a_path_and_immutable_a_bool() -> None:
    paths: list[Any] = [None, 5, b"/", ["/"], LocalRoot]
    for path in paths:
        with pytest.raises(errors.ConfigError, match="a local root must be the path of a folder,"):
            LocalRoot(path)
    values: list[Any] = [0, 1, None, "yes"]
    for value in values:
        with pytest.raises(errors.ConfigError, match="immutable must be True or False, not"):
            LocalRoot("/", immutable=value)


LONG = "n" * 100_000
MADE: list[tuple[Any, dict[str, Any], str]] = [
    (AdapterRef, {"id": "org/name", "digest": LONG}, "64 lower-case hex digits"),
    (LoaderConfig, {"dtype": LONG}, "dtype must be one of"),
    (LoaderConfig, {"max_slots": LONG}, "max_slots must be a positive integer"),
    (LoaderConfig, {"timeout": LONG}, "timeout must be a positive number"),
    (LoaderConfig, {"offline": LONG}, "offline must be True or False"),
    (Allow, {"scheme": "https", "host": "host", "port": LONG}, "port of Allow must be an integer"),
]


@pytest.mark.parametrize(("make", "settings", "remedy"), MADE)
def test_a_long_value_is_cut(make: Any, settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(errors.UsageError, match=remedy) as caught:
        make(**settings)
    assert len(str(caught.value)) < 300
