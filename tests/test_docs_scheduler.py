"""docs/scheduler.md says what is there: its example serves, its names are the batch's."""

from __future__ import annotations

import asyncio
import re
from dataclasses import fields
from pathlib import Path

import pytest

from lorax_async import AdapterNotFoundError, AdapterScheduler, Batch, BatchRow, Ticket
from lorax_async.core.batch_plan import TILE_ROWS
from lorax_async.core.shares import LEAST
from scheduling.page import PAGE, functions
from tiny_sources import over, stocked


@pytest.mark.usefixtures("nothing_left")
async def test_the_example_serves(tmp_path: Path) -> None:
    page = functions()

    def compute(batch: Batch) -> set[Ticket]:
        """ "b" ends with its third token, "a" when it is long enough."""
        ends = [row for row in batch.rows if row.ticket.generated == 2]
        return {row.ticket for row in ends if row.handle is not None and row.handle.id == "b"}

    async with over(stocked(tmp_path, "a", "b")) as loader:
        async with AdapterScheduler(loader) as scheduler:
            serving = asyncio.create_task(page["serve"](scheduler, compute))
            answers = [page["answer"](scheduler, id, 5) for id in ("a", "b", "none")]
            found = await asyncio.gather(*answers, return_exceptions=True)
            assert found[:2] == [32, 3]
            assert isinstance(found[2], AdapterNotFoundError)
        await asyncio.wait_for(serving, 5)


def test_the_table_is_the_batch() -> None:
    section = PAGE.read_text().partition("\n## A batch\n")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `batch\.(\w+)", section, re.MULTILINE)
    assert len(named) > 5
    assert all(hasattr(Batch, name) or name in {f.name for f in fields(Batch)} for name in named)
    line = next(line for line in section.splitlines() if line.startswith("| `batch.rows`"))
    assert set(re.findall(r"`(\w+)`", line)) == set(BatchRow._fields)


def test_its_numbers_are_those_of_the_code() -> None:
    assert f"tiles of {TILE_ROWS} rows" in PAGE.read_text()
    assert f"fewer than {LEAST} tokens" in PAGE.read_text()
