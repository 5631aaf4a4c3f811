"""A decoder has room for so many sequences: whoever is done leaves it before another one begins."""

from __future__ import annotations

import asyncio
from pathlib import Path

from server.generating import alone, asked, generating
from tiny_sources import stocked


async def test_a_place_is_free_before_another_one_has_it(tmp_path: Path) -> None:
    """Who has read enough cancels in the very turn of the loop in which the next step is picked."""
    async with generating(stocked(tmp_path, "a"), scheduling={"max_begun": 2}, max_sequences=2) as (
        engine,
        _,
        __,
    ):

        async def client(number: int) -> None:
            answer = engine.submit(asked([number], 9))
            got = [await anext(answer) for _ in range(number % 4 + 1)]
            answer.cancel()
            assert got == alone([number], len(got))

        await asyncio.gather(*map(client, range(10)))
