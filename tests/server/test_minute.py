"""A server under many clients whose adapters come over a slow link: for a moment, and for long."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop

from lorax_async.commands import serve
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.server.assembly import Base
from server.minute import MISSING, REFUSED, STYLES, Minute, minute, source

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.load(prepare_base(), dtype="float32", device="cpu")


@pytest.fixture(autouse=True, scope="module")
def as_the_command_does() -> Iterator[None]:
    """What `lorax-async serve` decides for its process."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    serve.as_application()
    yield
    gc.unfreeze()
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


def played(
    base: Base, examples: Path, work: Path, *, copies: int, clients: int, seconds: float
) -> tuple[Minute, Minute]:
    """With all adapters, and the control: as many answers of one that is always there."""

    async def both(link: Any, models: list[str]) -> tuple[Minute, Minute]:
        given: dict[str, Any] = {"clients": clients, "seconds": seconds}
        cold = await minute(base, link, models, work / "cache", **given)
        return cold, await minute(base, link, models[:1], work / "cache", **given)

    with (
        source(examples, work, copies) as (link, models),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(both(link, models))


def told(cold: Minute, control: Minute) -> str:
    rows = [
        (f"{part:.1%}", cold.lag(part) * 1e3, control.lag(part) * 1e3)
        for part in (0.5, 0.99, 0.999)
    ]
    lags = "; ".join(
        f"{part} {one:.1f} ms, control {two:.1f}, difference {one - two:.1f}"
        for part, one, two in rows
    )
    return (
        f"{len(cold.answers)} answers ({dict(cold.kinds())}) by {cold.loads} loads,"
        f" control {len(control.answers)}; loop lag {lags}; memory × {cold.growth:.3f}"
    )


def test_many_clients_for_a_moment(base: Base, examples: Path, tmp_path: Path) -> None:
    cold, control = played(base, examples, tmp_path, copies=24, clients=16, seconds=4)
    assert cold.wrong() == control.wrong() == []
    assert cold.kinds().keys() >= STYLES.keys()
    assert told(cold, control)


@pytest.mark.soak
def test_many_clients_for_a_minute(
    base: Base, examples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cold, control = played(base, examples, tmp_path, copies=200, clients=64, seconds=60)
    with capfd.disabled():
        sys.stdout.write(f"{told(cold, control)}\n")
    assert cold.wrong() == control.wrong() == []
    assert cold.kinds().keys() == {*STYLES, MISSING, REFUSED}
    assert cold.loads > 100
    assert cold.growth < 1.05
