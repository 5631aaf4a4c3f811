"""Requests over loopback to a server that answers by script, with a clock that the test sets."""

from __future__ import annotations

import asyncio

import pytest

from benching.played import body, one, played
from benching.stand_in import Asked, standing_in
from common import Run, until
from lorax_async.commands.benching.open_loop import NOT_SENT, Played, play, session
from lorax_async.commands.benching.streaming_client import Answer, Client
from lorax_async.commands.measure import run_on_uvloop
from lorax_async.core.request_schedule import Arrival


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_times_are_those_of_the_pieces_with_text() -> None:
    clock, step = Clock(), asyncio.Semaphore(0)

    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for text in ("a", "b", "c"):
            await step.acquire()
            await asked.text(text)
        await step.acquire()
        await asked.event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None})
        await asked.usage(7, 11)
        await asked.done()

    async def main() -> Answer:
        async with standing_in(script) as there, session(20, "the key") as opened:
            client = Client(opened, there.url, "chat", clock)
            answer = Answer(Arrival(0.25, "m"))
            clock.now = 100.5
            task = asyncio.create_task(client.ask(answer, {"model": "m"}, 100.0))
            for number, now in enumerate((102.0, 102.25, 104.0), 1):
                await until(lambda: there.asked)
                clock.now = now
                step.release()
                await until(lambda n=number: len(answer.chunks) == n)  # type: ignore[misc]
            clock.now = 105.0
            step.release()
            await task
            assert there.asked[0].path == "/v1/chat/completions"
            assert there.asked[0].body == {"model": "m"}
            assert "Authorization: Bearer the key" in there.asked[0].headers
            return answer

    answer = await main()
    assert (answer.sent, answer.late, answer.first) == (0.5, 0.25, 1.75)
    assert answer.chunks == [2.0, 2.25, 4.0]
    assert (answer.gaps, answer.ended) == ([0.25, 1.75], 5.0)
    assert (answer.tokens, answer.prompt_tokens, answer.made) == (11, 7, 11)
    assert (answer.status, answer.error) == (200, None)


async def test_arrivals_wait_for_no_answer() -> None:
    """The server answers nobody before all have come, which only an open loop lets happen."""
    count, all_there = 30, asyncio.Event()
    come: list[Asked] = []

    async def script(asked: Asked) -> None:
        come.append(asked)
        if len(come) == count:
            all_there.set()
        await all_there.wait()
        await asked.begin()
        await asked.text("x")
        await asked.done()

    told: list[Answer] = []
    found = await played(script, count, ended=told.append)
    assert found.most_at_once == count
    assert [each.error for each in found.answers] == [None] * count
    assert sorted(each.body["model"] for each in come) == sorted(f"m{n}" for n in range(count))
    assert len(told) == count
    assert found.seconds == max(each.ended for each in told if each.ended)


async def test_too_many_at_once_are_not_sent_and_do_not_wait() -> None:
    told = asyncio.Event()

    async def script(asked: Asked) -> None:
        await told.wait()
        await asked.begin()
        await asked.done()

    def ended(answer: Answer) -> None:
        if answer.arrival.model == "m4":
            told.set()

    found = await played(script, 5, most_at_once=3, ended=ended)
    assert [each.error for each in found.answers] == [None, None, None, NOT_SENT, NOT_SENT]
    assert [each.sent is None for each in found.answers] == [False] * 3 + [True] * 2
    assert found.most_at_once == 3


def test_nothing_is_sent_before_it_is_due() -> None:
    """uvloop, on which the command runs, counts in whole milliseconds."""

    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.done()

    async def main() -> Played:
        async with standing_in(script) as there, session(20, None) as opened:
            due = [Arrival(0.0054 * n, "m") for n in range(40)]
            return await play(Client(opened, there.url, "chat"), due, body, most_at_once=99)

    for each in run_on_uvloop(main()).answers:
        assert each.late is not None
        assert each.late >= 0


async def test_cold_is_who_comes_before_the_model_has_answered() -> None:
    """Of m: two wait for one load, the third comes after it. Of gone: nobody ever gets an answer."""
    both = asyncio.Event()
    of_m: list[Asked] = []

    async def script(asked: Asked) -> None:
        if asked.body["model"] == "gone":
            await asked.begin(404)
            return
        of_m.append(asked)
        if len(of_m) == 2:
            both.set()
        await both.wait()
        await asked.begin()
        await asked.done()

    async def main() -> list[Answer]:
        due = [Arrival(0.0, "m"), Arrival(0.0, "gone"), Arrival(0.0, "m")]
        due += [Arrival(1.0, "m"), Arrival(1.0, "gone")]  # when those have long been answered
        async with standing_in(script) as there, session(20, None) as opened:
            client = Client(opened, there.url, "chat")
            return (await play(client, due, body, most_at_once=9)).answers

    assert [each.cold for each in await main()] == [True, True, True, False, True]


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 429, 503])
def test_a_status_is_an_error(run: Run, status: int) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin(status, b"application/json")
        await asked.send(b'{"error": {"message": "no such adapter"}}')

    answer = one(run, script)
    assert (answer.status, answer.error, answer.chunks) == (status, str(status), [])
    assert answer.told == '{"error": {"message": "no such adapter"}}'
    assert answer.ended is not None


def test_a_status_counts_also_where_its_body_does_not_come(run: Run) -> None:
    async def script(asked: Asked) -> None:
        await asked.send(b"HTTP/1.1 503 x\r\nContent-Length: 9\r\n\r\n")
        await asyncio.Event().wait()

    answer = one(run, script, seconds=2)
    assert (answer.status, answer.error, answer.told) == (503, "503", None)


def test_a_redirect_is_not_followed(run: Run) -> None:
    async def script(asked: Asked) -> None:
        await asked.send(b"HTTP/1.1 307 x\r\nLocation: /\r\nContent-Length: 0\r\n\r\n")

    assert one(run, script).error == "307"


async def test_whoever_is_cancelled_leaves_nothing_under_way() -> None:
    asked: list[Asked] = []

    async def script(each: Asked) -> None:
        asked.append(each)
        await asyncio.Event().wait()

    task = asyncio.create_task(played(script, 3))
    await until(lambda: len(asked) == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("ask ")]


async def test_what_fails_here_is_told_at_the_end() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.done()

    def ended(answer: Answer) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        await played(script, 2, ended=ended)


# -- the parts ------------------------------------------------------------------------------------
