"""Another base than the one that is served: names warn, architectures refuse, nobody is asked."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from adapters import hub_cache
from adapters import small_base as base
from common import Run
from lorax_async.adapters import (
    cached_architectures,
    check_architectures,
    check_architectures_async,
)
from lorax_async.errors import IncompatibleAdapterError

pytestmark = pytest.mark.usefixtures("no_network", "cache")

LLAMA, QWEN = ["LlamaForCausalLM"], ["Qwen2ForCausalLM"]


def put(cache: Path, architectures: object, repo_id: str = "org/base") -> None:
    text = json.dumps({"architectures": architectures}).encode()
    hub_cache.put(cache, repo_id, {"config.json": text}, commit="a" * 40, refs=("main",))


@pytest.fixture(params=["plain", "async"])
def check(request: pytest.FixtureRequest, run: Run) -> Any:
    if request.param == "plain":
        return check_architectures
    return lambda *args: run(check_architectures_async(*args))


@pytest.mark.parametrize("name", ["", None, "org/served"])
def test_the_same_base_or_no_word_of_it(cache: Path, check: Any, name: str | None) -> None:
    put(cache, QWEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("org/served", "a", base.config(base_model_name_or_path=name), LLAMA)


def test_another_name_with_the_same_architecture_warns(cache: Path, check: Any) -> None:
    put(cache, LLAMA)
    with pytest.warns(
        UserWarning, match="'sql' was not trained on base model 'org/served'"
    ) as seen:
        check("org/served", "sql", base.config(), LLAMA)
    assert "'org/base'" in str(seen[0].message)


def test_a_base_that_nobody_knows_warns_and_shapes_decide(check: Any) -> None:
    with pytest.warns(UserWarning, match="was not trained on base model"):
        check("org/served", "sql", base.config(), LLAMA)


def test_another_architecture_is_refused(cache: Path, check: Any) -> None:
    put(cache, QWEN)
    with pytest.raises(IncompatibleAdapterError) as caught:
        check("org/served", "sql", base.config(), LLAMA)
    text = str(caught.value)
    for word in ("'sql'", "'org/base'", "'org/served'", *LLAMA, *QWEN, "serve 'org/base'"):
        assert word in text


@pytest.mark.parametrize("content", [[], None, "x", 7])
def test_configs_that_say_nothing(cache: Path, content: object) -> None:
    put(cache, content)
    assert cached_architectures("org/base") is None


def test_configs_that_are_none(cache: Path) -> None:
    files = {"config.json": b"{"}
    hub_cache.put(cache, "org/base", files, commit="a" * 40, refs=("main",))
    assert cached_architectures("org/base") is None


@pytest.mark.parametrize(
    "name", ["../../x", "/etc", "./x", "a/b/c", "x" * 500, "\0", "org/base@v1"]
)
def test_a_strangers_name_leads_nowhere_else(cache: Path, tmp_path: Path, name: str) -> None:
    put(cache, LLAMA)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps({"architectures": LLAMA}))
    assert cached_architectures(name) is None


def test_known_ones(cache: Path) -> None:
    put(cache, LLAMA + QWEN)
    assert cached_architectures("org/base") == ("LlamaForCausalLM", "Qwen2ForCausalLM")


async def test_the_cache_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    monkeypatch.setattr(
        "lorax_async.adapters.compatibility.cached_file",
        lambda *_: threads.append(threading.get_ident()),
    )
    with pytest.warns(UserWarning, match="was not trained"):
        await check_architectures_async("org/served", "sql", base.config(), LLAMA)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
