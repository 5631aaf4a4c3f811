"""What threads report while others begin, end and read recordings."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import tiny
from lorax_async.events import SlotId
from lorax_async.tracing.copies import CopyTimes
from lorax_async.tracing.recorder import Recorder, Ring, Span, Tracer
from lorax_async.tracing.trace import Trace
from tiny_loaders import loader
from tracing.chrome_format import of, require_trace


class Seen(Tracer):
    """Remembers what a thread would find at the moment in which there is a recorder."""

    found: list[tuple[int, list[str]]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "on" and value is not None:
            stays = [stay.name for stay in value.stays.values()]
            self.found.append((len(value.rings), stays))
        super().__setattr__(name, value)


def test_whoever_finds_a_recorder_finds_all_of_it() -> None:
    tracer = Seen()
    tracer.found = []
    tracer.begin(Ring(3), {0: "one"})
    assert tracer.found == [(1, ["one"])]


def test_what_has_ended_has_ended_once() -> None:
    recorder, ring = Recorder(), Ring(3)
    recorder.rings = (ring,)
    span = recorder.begin("files", "lane", "one")
    assert len(list(recorder.unfinished())) == 1
    recorder.end(span)
    recorder.end(span)
    assert len(ring.look().since(0)[0]) == 1
    assert list(recorder.unfinished()) == []


def test_others_begin_and_end_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, until = Recorder(), Span.until
    first = recorder.begin("files", "lane", "one")

    def meanwhile(self: Span, stop: int, **more: object) -> Any:
        monkeypatch.setattr(Span, "until", until)
        recorder.begin("files", "lane", "two")
        recorder.begin("files", "lane", "three")
        return self.until(stop, **more)

    monkeypatch.setattr(Span, "until", meanwhile)
    assert [record.name for record in recorder.unfinished()] == ["one"]
    recorder.end(first)
    assert [record.name for record in recorder.unfinished()] == ["two", "three"]


def test_who_looks_waits_for_another_who_looks() -> None:
    """To look is to count: of two at once, one would count the other."""
    ring, entered, go_on = Ring(3), list[int](), Event()

    class Counting:
        def __init__(self) -> None:
            self._real = count()

        def __next__(self) -> int:
            entered.append(1)
            assert go_on.wait(20)
            return next(self._real)

    ring._others._count = Counting()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as threads:
        looks = [threads.submit(ring.look) for _ in range(2)]
        assert not wait(looks, timeout=0.05).done
        assert len(entered) == 1
        go_on.set()
        assert [look.result().since(0) for look in looks] == [([], 0)] * 2


class Handle:
    slot = SlotId(0, 1)


def test_what_is_computed_in_vain_is_in_the_trace() -> None:
    trace = Trace(Tracer(), 9, dict)
    with trace, pytest.raises(ZeroDivisionError), trace.compute(3, Handle()):
        raise ZeroDivisionError
    (computed,) = of(require_trace(trace.as_json()), "compute")
    assert computed["name"] == "layer 3"


@pytest.mark.parametrize("error", [None, OSError("lost")])
def test_a_copy_ends_when_its_ticket_is_done(error: Exception | None) -> None:
    recorder, ring, ticket = Recorder(), Ring(3), Future[None]()
    recorder.rings = (ring,)
    CopyTimes(recorder, 0, 2).asked(ticket, 64, in_stream=True)
    assert ring.look().since(0)[0] == []
    if error is None:
        ticket.set_result(None)
    else:
        ticket.set_exception(error)
    (record,) = ring.look().since(0)[0]
    assert record.args is not None
    assert record.args["outcome"] == ("done" if error is None else "OSError")


async def test_a_recording_that_has_stopped_takes_nothing_more(tmp_path: Path) -> None:
    """Though another one goes on, of the same recorder."""
    folder = tiny.write(tmp_path / "one")
    async with loader() as there:
        with there.trace() as outer:
            inner = there.trace()
            with inner:
                pass
            (await there.load(folder)).release()
            await asyncio.sleep(0)
            assert inner._ring.look().since(0)[0] == []
            assert outer._ring.look().since(0)[0]
