"""The warm list: written as adapters come and go, read by the server that comes after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from common import until
from lorax_async import AdapterLoader, AdapterRef, ConfigError
from lorax_async.server.warm_list import WarmList
from tiny_loaders import loader
from tiny_sources import is_resident, over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


def named(path: Path) -> list[str]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"adapters": []}
    return [row.get("id") or row["path"] for row in found["adapters"]]


async def test_who_is_on_the_device_is_named_the_last_one_used_first(tmp_path: Path) -> None:
    source, path = stocked(tmp_path, "one", "two", "three"), tmp_path / "warm"
    async with over(source, max_slots=2) as there, WarmList(path, there, pause=0) as warm:
        for name in ("one", "two"):
            warm.used(name)
            (await there.load(name)).release()
        await until(lambda: named(path) == ["two", "one"])
        warm.used("one")
        await until(lambda: named(path) == ["one", "two"])
        warm.used("three")
        (await there.load("three")).release()  # one of the others has left for it
        await until(lambda: named(path)[0] == "three" and len(named(path)) == 2)


async def test_of_many_names_only_the_last_ones_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done on the loop, again and again."""
    source, path = stocked(tmp_path, "one"), tmp_path / "warm"
    asked, story = list[object](), AdapterLoader.story

    def counted(self: AdapterLoader, ref: Any) -> Any:
        asked.append(ref)
        return story(self, ref)

    async with over(source) as there, WarmList(path, there, pause=0) as warm:
        (await there.load("one")).release()
        for number in range(500):
            warm.used(f"another/{number}")
        warm.used("one")
        monkeypatch.setattr(AdapterLoader, "story", counted)
        await until(lambda: named(path) == ["one"])
    assert set(asked) == {AdapterRef("one")}


async def test_the_next_one_brings_them_back(tmp_path: Path) -> None:
    source, path = stocked(tmp_path, "one", "two"), tmp_path / "warm"
    async with over(source) as there, WarmList(path, there) as warm:
        warm.used(AdapterRef("one"))
        (await there.load("one")).release()
    assert named(path) == ["one"], "leaving it writes what has not been written"
    async with over(source) as there, WarmList(path, there) as warm:
        assert warm.restored is not None
        await warm.restored
        assert is_resident(there, "one")
        assert not is_resident(there, "two")
        assert there.try_acquire("two") is None
    assert named(path) == ["one"]


async def test_a_path_comes_back_as_a_path(tmp_path: Path) -> None:
    folder, path = tiny.write(tmp_path / "one"), tmp_path / "warm"
    async with loader() as there, WarmList(path, there) as warm:
        warm.used(folder)
        (await there.load(folder)).release()
    async with loader() as there, WarmList(path, there) as warm:
        assert warm.restored is not None
        await warm.restored
        assert is_resident(there, folder)


async def test_who_is_coming_back_stays_named(tmp_path: Path) -> None:
    """Killed while they come, the list is what it was."""
    source, path = stocked(tmp_path, "one"), tmp_path / "warm"
    path.write_text(json.dumps({"adapters": [{"id": "one", "source": None, "revision": None}]}))
    source.hold("one")
    async with over(source) as there, WarmList(path, there, pause=0) as warm:
        warm.used("elsewhere/other")
        await until(lambda: path.read_text().startswith("{\n"))  # it was written anew
        assert named(path) == ["one"]
        source.allow("one")
        assert warm.restored is not None
        await warm.restored


async def test_tokens_are_not_written(tmp_path: Path) -> None:
    source, path = stocked(tmp_path, "one"), tmp_path / "warm"
    async with over(source) as there, WarmList(path, there) as warm:
        ref = AdapterRef("one", token="SECRET")
        warm.used(ref)
        (await there.load(ref)).release()
    assert named(path) == []


async def test_that_the_operator_named_it_is_written(tmp_path: Path) -> None:
    """So that the next server asks on his authority again."""
    source, path = stocked(tmp_path, "one"), tmp_path / "warm"
    ref = AdapterRef("one", use_token=True)
    async with over(source) as there, WarmList(path, there) as warm:
        warm.used(ref)
        (await there.load(ref)).release()
    assert json.loads(path.read_text())["adapters"][0]["use_token"] is True
    async with over(source) as there, WarmList(path, there) as warm:
        assert warm.restored is not None
        await warm.restored
        assert is_resident(there, ref)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"adapters": {}}',
        '{"adapters": [1]}',
        '{"adapters": [{"id": "a/b", "source": null, "revision": null, "use_token": 1}]}',
        '{"adapters": [{"id": 1, "source": null}]}',
        '{"adapters": [{"id": "a/b", "source": 5, "revision": null}]}',
        "[" * 100_000,
        "\x00",
    ],
    ids=lambda content: content[:70],
)
async def test_what_is_no_such_list_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "warm"
    path.write_text(content)
    async with loader() as there:
        with pytest.raises(ConfigError, match="delete it"):
            async with WarmList(path, there):
                pass
    assert path.read_text() == content


async def test_a_folder_that_cannot_be_written_is_told_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it could be when the list was entered."""
    path = tmp_path / "folder" / "warm"
    path.parent.mkdir()
    async with over(stocked(tmp_path, "one")) as there, WarmList(path, there) as warm:
        path.parent.rmdir()
        warm.used("one")
        (await there.load("one")).release()
    assert "could not be written" in caplog.text
