"""What all adapters from elsewhere share is made once, by whichever thread comes first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from lorax_async import LoaderClosedError, LoaderConfig
from lorax_async.io import own_cache
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.own_cache import OwnCache
from lorax_async.io.remote import elsewhere
from lorax_async.io.remote.elsewhere import Elsewhere

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


def test_all_that_it_takes_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, and not after the end."""
    plainly, begun, go_on = elsewhere._made, [], Event()

    def slowly(*given: Any) -> Any:
        begun.append(given)
        go_on.wait(20)
        return plainly(*given)

    monkeypatch.setattr(elsewhere, "_made", slowly)
    config = LoaderConfig(cache_dir=tmp_path / "cache")
    own = OwnCache(config)
    there = Elsewhere(config, own)
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(there._make) for _ in range(2)]
        assert not wait(made, timeout=0.05).done
        go_on.set()
        assert made[0].result() is made[1].result()
    assert len(begun) == 1
    there.close()
    there.close()
    with pytest.raises(LoaderClosedError):
        there._make()
    assert len(begun) == 1
    own.close()


def test_a_loaders_own_cache_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, and not after the end."""
    begun, go_on = list[object](), Event()

    def slowly(*given: Any) -> Any:
        begun.append(given)
        go_on.wait(20)
        return DiskCache(*given)

    monkeypatch.setattr(own_cache, "DiskCache", slowly)
    own = OwnCache(LoaderConfig(cache_dir=tmp_path / "cache"))
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(own.get) for _ in range(2)]
        assert not wait(made, timeout=0.05).done
        go_on.set()
        assert made[0].result() is made[1].result()
    assert len(begun) == 1
    own.close()
    with pytest.raises(LoaderClosedError):
        own.get()
    assert len(begun) == 1
