"""GET /page/events: adapters with their tiers, live, and who is told of which."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import AdapterFormatError
from lorax_async.server.calls.page import board as board_module
from lorax_async.server.calls.page import watching as watching_module
from server.page.reading import OPERATOR, loading, watching
from server.world import FakeEngine, World, serving
from tiny_loaders import ONE, gated
from tiny_sources import over, stocked

EVENTS = "/page/events"


async def test_a_tier_changes(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "pirate")
    async with serving(adapters={"pirate": folder}) as world, watching(world) as told:
        assert told.first["base"] == "base"
        assert told.first["cold"] is None, "whoever saw one before forgets it"
        assert told.rows["pirate"]["tier"] == "source"
        async with await world.service.loader.load(folder):
            row = await told.until_tier("pirate", "device")
            assert (row["state"], row["bytes"]) == ("resident", ONE)
            assert (row["leases"], row["error"]) == (1, None)
        while told.rows["pirate"]["leases"]:
            await told.next()
        await world.service.loader.unload(folder)
        await told.until_tier("pirate", "disk")


async def test_what_has_not_changed_is_not_told_again(tmp_path: Path) -> None:
    one, two = tiny.write(tmp_path / "one", 1), tiny.write(tmp_path / "two", 2)
    async with serving(adapters={"one": one, "two": two}) as world, watching(world) as told:
        assert told.first["rows"].keys() == {"one", "two"}
        (await world.service.loader.load(two)).release()
        news = await told.next()
        assert news is not None
        assert news.keys() == {"rows"}
        assert news["rows"].keys() == {"two"}


async def test_names_come_and_go(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "late")
    async with serving() as world, watching(world) as told:
        assert told.rows == {}
        await world.admin("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": str(folder)})
        await told.until_tier("late", "device")
        await world.admin("/v1/unload_lora_adapter", {"lora_name": "late"})
        while told.rows:
            await told.next()


async def test_layers_are_counted_as_they_come(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "slow")
    loader, device = gated()
    device.gate.clear()
    adapters = {"slow": folder}
    async with serving(loader=loader, adapters=adapters) as world, watching(world) as told:
        load = asyncio.create_task(world.service.loader.load(folder))
        await until(lambda: device.copies)
        row = await told.until_tier("slow", "device")
        assert (row["state"], row["layers"]) == ("filling", [0, 4])
        device.gate.set()
        (await load).release()
        while told.rows["slow"]["state"] != "resident":
            await told.next()
        assert told.rows["slow"]["layers"] == [4, 4]


async def test_ids_of_requests_are_the_operators_to_see(tmp_path: Path) -> None:
    source = stocked(tmp_path, "org/secret", "org/named")
    async with serving(loader=over(source), adapters={"mine": "org/named"}) as world:
        for id in ("org/secret", "org/named"):
            (await world.service.loader.load(id)).release()
        async with watching(world) as anybody, watching(world, OPERATOR) as operator:
            assert anybody.first["operator"] is False
            assert anybody.rows.keys() == {"mine"}
            assert operator.first["operator"] is True
            assert {row["name"] for row in operator.rows.values()} == {
                "mine",
                "memory:org/secret",
            }
            (other,) = operator.rows.keys() - {"mine"}
            assert not operator.rows[other]["named"]
            assert operator.rows["mine"]["named"]


async def test_a_failure_is_told_by_the_name(tmp_path: Path) -> None:
    """Of an operator's path, nobody hears."""
    folder = tiny.write(tmp_path / "hidden" / "broken")
    (folder / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(7) + b'{"a":1}  ')
    async with serving(adapters={"broken": folder}) as world, watching(world) as told:
        with pytest.raises(AdapterFormatError):
            await world.service.loader.load(folder)
        while not told.rows["broken"]["error"]:
            await told.next()
        assert "'broken'" in told.rows["broken"]["error"]
        assert "hidden" not in json.dumps(told.rows)


@pytest.mark.parametrize("path", [EVENTS, "/page/timeline.svg", "/page/trace.json"])
async def test_a_wrong_token_is_refused(path: str) -> None:
    async with serving() as world:
        answer = await world.ask("GET", path, Authorization="Bearer wrong")
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    async with serving(admin_token=None) as world:
        answer = await world.ask("GET", path, Authorization="Bearer wrong")
        assert (answer.status, answer.error["code"]) == (403, "admin_disabled")


async def test_a_stop_ends_the_stream_at_once() -> None:
    """A page that is open does not keep a server from ending, nor its answers from being drained."""
    async with serving(drain=30) as world, watching(world) as told:
        world.server.stop()
        async with asyncio.timeout(5):
            while await told.next() is not None:
                pass
            await world.ended


@pytest.mark.parametrize("stops", [1, 2])
async def test_a_page_that_reads_nothing_keeps_no_server(
    stops: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is it told of in the log."""
    monkeypatch.setattr(watching_module, "TICK", 0.01)
    monkeypatch.setattr(watching_module, "LAST_SECONDS", 0.2)
    monkeypatch.setattr(board_module, "FRESH", 0.0)
    adapters = {f"{n} {'x' * 20_000}": f"org/a{n}" for n in range(50)}
    async with serving(adapters=adapters, send_buffer=4096, drain=30) as world:
        _reader, writer = await asyncio.open_connection("127.0.0.1", world.port, limit=1)
        writer.write(b"GET /page/events HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: world.service.watching._open)
        await asyncio.sleep(0.3)
        for _ in range(stops):
            world.server.stop()
            await asyncio.sleep(0.05)
        async with asyncio.timeout(3):
            await world.ended
        writer.close()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_page_that_goes_is_counted_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching_module, "MOST", 1)
    async with serving() as world:
        async with watching(world):
            answer = await world.ask("GET", EVENTS)
            assert answer.status == 429
            assert "retry-after" in answer.headers
            async with watching(world, OPERATOR) as operators:
                assert operators.first["operator"], "nobody keeps the operator out"
        await until(lambda: not world.service.watching._open)
        async with watching(world) as told:
            assert told.first


async def test_a_silent_stream_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching_module, "SILENCE", 0.5)
    async with serving() as world, watching(world) as told:
        assert await told.next() == {}


async def test_many_adapters_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those without names the nearest are shown."""
    monkeypatch.setattr("lorax_async.server.calls.page.board.MOST", 2)
    source = stocked(tmp_path, *(f"org/a{n}" for n in range(6)))
    async with serving(loader=over(source, max_slots=2)) as world:
        for n in range(6):
            (await world.service.loader.load(f"org/a{n}")).release()
        async with watching(world, OPERATOR) as told:
            assert {row["name"] for row in told.rows.values()} == {
                "memory:org/a4",
                "memory:org/a5",
            }


async def test_many_names_are_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_async.server.calls.page.board.MOST", 2)
    adapters = {f"a{n}": f"org/a{n}" for n in range(5)}
    async with serving(adapters=adapters) as world, watching(world) as told:
        assert told.rows.keys() == {"a0", "a1"}
        assert told.first["more"] == 3
        for n in range(4):
            await world.admin("/v1/unload_lora_adapter", {"lora_name": f"a{n}"})
        while told.rows.keys() != {"a4"} or told.more:
            await told.next()


def test_looking_takes_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look of 50 ms, at many adapters, is the only one in a second."""
    clock, looks = [100.0], []

    def look() -> int:
        clock[0] += 0.05
        looks.append(clock[0])
        return len(looks)

    monkeypatch.setattr(board_module, "monotonic", lambda: clock[0])
    shared = board_module._Look(look)
    found = []
    for _ in range(8):
        found.append(shared.found())
        clock[0] += 0.25
    assert found == [1, 1, 1, 1, 2, 2, 2, 2]


async def test_all_who_look_share_a_look(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    world: list[World] = []
    engine = FakeEngine(loading(world))
    async with serving(engine, adapters={"one": folder}) as found:
        world.append(found)
        board = found.service.watching._board
        assert board.rows(operator=False) is board.rows(operator=False)
        assert board.rows(operator=False) is not board.rows(operator=True)
