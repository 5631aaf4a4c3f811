"""A pin whose adapter breaks in the very moment in which it became resident."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import tiny
from lorax_async import Event, IntegrityError, Resident
from lorax_async.core.runs import Span
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.testing import FakeSource
from lorax_async.verification import Verification
from tiny_sources import over

pytestmark = pytest.mark.usefixtures("nothing_left")


class FalseSource(FakeSource):
    """All bytes arrive, and when `doubted` is set they are found to be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.doubted = asyncio.Event()

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        await super().bring(file, groups, arrived, demand)
        await self.doubted.wait()
        raise IntegrityError("these are other bytes than were promised")


async def test_its_error_names_the_adapter(tmp_path: Path) -> None:
    source = FalseSource()
    source.put("a", *tiny.files(tiny.write(tmp_path / "a")))

    def heard(event: Event) -> None:
        if isinstance(event, Resident):
            source.doubted.set()

    async with over(source) as loader:
        loader.subscribe(heard)
        with pytest.raises(IntegrityError, match="promised") as caught:
            await loader.pin("a")
        assert caught.value.id == "a"
        assert caught.value.stage == "fetch"
        assert not loader.unpin("a")
