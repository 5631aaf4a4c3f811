"""Names that sources give: none of them becomes a name on this disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fault_world import FOLDERS, FaultyWorld, assert_at_rest, in_turn, loads_right, over

from common import Run
from lorax_async import AdapterHandle, FetchError
from lorax_async.adapter import AdapterRef
from lorax_async.io.cache.upkeep import ls
from lorax_async.io.remote.ports import Located

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

NAMES = {
    "upwards": "../../../../outside",
    "absolute": "/etc/passwd",
    "dots": "..",
    "NUL": "a\0b",
    "10 KB": "x" * 10_240,
    "surrogates": "\ud800\udfff",
    "lines": "a\r\nb\x1b[2J",
    "empty": "",
    "like an entry": "0" * 64,
    "like a record": "record.json",
    "a scheme": "file:///etc/passwd",
}


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def assert_own_names(cache: Path) -> None:
    """All names are digests and words of ours."""
    words = FOLDERS | {"adapter_config.json", "adapter_model.safetensors", "record.json"}
    for name in names_below(cache) - words:
        digest = name.removeprefix("scope.")
        assert len(digest) == 64, name
        assert not set(digest) - set("0123456789abcdef"), name


@pytest.mark.parametrize(("run", "name"), in_turn(NAMES), indirect=["run"])
@pytest.mark.parametrize("what", ["version", "source"])
def test_what_a_source_says_is_no_name(
    run: Run, tmp_path: Path, what: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = NAMES[name]
    with FaultyWorld(tmp_path / "cache", tmp_path / "adapters") as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        real = world.locator.locate

        async def located(ref: AdapterRef) -> Located:
            said = await real(ref)
            if ref.text != "bad":
                return said
            if what == "version":
                return Located(said.source, hostile, said.scope, said.files)
            return Located(hostile, said.version, said.scope, said.files)

        monkeypatch.setattr(world.locator, "locate", located)

        async def body() -> AdapterHandle:
            async with over(world) as loader:
                await loads_right(loader, world, good)
                return await loads_right(loader, world, bad)

        key = run(body()).key
        assert [listed.is_partial for listed in ls(world.cache)] == [False, False]
        assert hostile in {key.location, getattr(key, "version", None)}
        assert {each.name for each in tmp_path.iterdir()} == {"cache", "adapters"}
        assert_own_names(tmp_path / "cache")
        for record in (tmp_path / "cache" / "entries").glob("*/record.json"):
            assert json.loads(record.read_text())["entry"] == record.parent.name
            assert len(record.read_bytes()) < 4_000

        async def stale() -> None:
            world.locator.error = FetchError("it is down")
            ref = AdapterRef("bad", source="hub", allow_stale=True)
            async with over(world) as loader:
                if name == "surrogates":  # no text, so that it is not noted either
                    with pytest.raises(FetchError, match="down"):
                        await loader.load(ref)
                    return
                async with await loader.load(ref) as handle:
                    assert handle.key == key
                    assert handle.stale

        run(stale())


@pytest.mark.parametrize(("run", "name"), in_turn(NAMES), indirect=["run"])
def test_what_goes_wrong_is_told_with_such_names(
    run: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path / "adapters") as world:
        world.stock("bad")
        good = world.stock("good", 1)
        world.locator.there["bad"].named = NAMES[name] or None
        world.faults["bad"] = lambda world, asked, client: client.head(
            "404 No", "Content-Length: 0"
        )

        async def body() -> None:
            async with over(world) as loader:
                with pytest.raises(Exception, match="404") as caught:
                    await loader.load(world.ref("bad"))
                text = str(caught.value)
                assert len(text) <= 1_000
                assert text.isprintable()
                await loads_right(loader, world, good)
                await assert_at_rest(loader, world)

        run(body())
        assert_own_names(tmp_path / "cache")
