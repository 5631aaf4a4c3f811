"""A cold request of which more happens than is kept."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import tiny
from lorax_async.server import cold_requests
from server.page.reading import asked, loading
from server.world import FakeEngine, World, serving


async def test_a_picture_says_what_it_had_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_requests, "LIMIT", 5)
    folder = tiny.write(tmp_path / "pirate")
    made: list[World] = []
    async with serving(FakeEngine(loading(made)), adapters={"pirate": folder}) as world:
        made.append(world)
        await asked(world.client, "pirate")
        gone = (await world.ask("GET", "/page/trace.json")).json["otherData"]["dropped"]
        assert gone > 0
        picture = ET.fromstring((await world.ask("GET", "/page/timeline.svg")).body)
        assert f"{gone} spans gone" in {
            each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")
        }
