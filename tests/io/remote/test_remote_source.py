"""A remote source keeps to the port: fresh, and from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from populate_conformance import PopulateConformance
from remote_world import RemoteWorld
from source_conformance import SourceConformance
from source_inputs import CONFIG, weights

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[RemoteWorld]:
    with RemoteWorld(tmp_path / "cache") as world:
        yield world


class TestConformance(SourceConformance):
    pass


class TestCached(PopulateConformance):
    @pytest.fixture
    def world(self, tmp_path: Path) -> Iterator[RemoteWorld]:
        with RemoteWorld(tmp_path / "cache", cached=True) as world:
            yield world

    @pytest.mark.parametrize("part", ["config", "weights"])
    async def test_another_version_is_not_held(self, world: Any, part: str) -> None:
        """What is held is what was resolved, for the cache has its own copy."""
        key = await world.source.resolve(world.put("one", CONFIG, weights(1)))
        config = CONFIG.replace(b"8", b"9") if part == "config" else CONFIG
        world.put("one", config, weights(2 if part == "weights" else 1, {"note": "longer"}))
        hold = await world.source.populate(key)
        assert hold.nbytes == len(weights(1))
        hold.close()
