"""A digest that turns out to be another: no event tells, and the scheduler asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import until
from lorax_async import AdapterHandle, AdapterRef, IntegrityError, LoraxError, Request
from scheduling.serving import MANY, held, opened, rows, step, warm
from tiny_sources import stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


def _is_sound(handle: AdapterHandle) -> bool:
    try:
        handle.require_sound()
    except LoraxError:
        return False
    return True


async def test_the_last_token_of_false_weights_is_none(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        await warm(loader, "a")
        ticket = scheduler.submit(Request(AdapterRef("a", digest="0" * 64), 1, 1))
        batch = await scheduler.next_batch(MANY, MANY)
        (handle,) = batch.handles
        assert handle is not None
        await until(lambda: not _is_sound(handle))
        scheduler.complete(batch)
        with pytest.raises(IntegrityError):
            await ticket


async def test_false_weights_are_in_no_further_batch(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with opened(source) as (loader, scheduler):
        await warm(loader, "a")
        false = scheduler.submit(Request(AdapterRef("a", digest="0" * 64), 1, MANY))
        handle = await held(scheduler, false)
        await until(lambda: not _is_sound(handle))
        scheduler.submit(Request(None, 1, 1))
        assert [row[0] for row in rows(await step(scheduler))] == [None]
        assert isinstance(false.error, IntegrityError)
