"""Requests over loopback to a server that answers by script, with a clock that the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benching.stand_in import Asked, Script, standing_in
from common import Run, until
from lorax_async.commands.benching import streaming_client
from lorax_async.commands.benching.open_loop import NOT_SENT, Played, play, session
from lorax_async.commands.benching.streaming_client import Answer, Client, endpoint, events
from lorax_async.commands.measure import run_on_uvloop
from lorax_async.core.request_schedule import Arrival
from lorax_async.errors import ConfigError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def body(arrival: Arrival) -> dict[str, Any]:
    return {"model": arrival.model}


def arrivals(count: int, due: float = 0.0) -> list[Arrival]:
    return [Arrival(due, f"m{n}") for n in range(count)]


async def played(script: Script, count: int = 1, seconds: float = 20, **options: Any) -> Played:
    async with standing_in(script) as there, session(seconds, None) as opened:
        client = Client(opened, there.url, "chat")
        settings = {"most_at_once": 100} | options
        return await play(client, arrivals(count), body, **settings)


def one(run: Run, script: Script, **options: Any) -> Answer:
    (answer,) = run(played(script, **options)).answers
    assert isinstance(answer, Answer)
    return answer


def test_times_are_those_of_the_pieces_with_text(run: Run) -> None:
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

    answer = run(main())
    assert (answer.sent, answer.late, answer.first) == (0.5, 0.25, 1.75)
    assert answer.chunks == [2.0, 2.25, 4.0]
    assert (answer.gaps, answer.ended) == ([0.25, 1.75], 5.0)
    assert (answer.tokens, answer.prompt_tokens, answer.made) == (11, 7, 11)
    assert (answer.status, answer.error) == (200, None)


def test_arrivals_wait_for_no_answer(run: Run) -> None:
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
    found = run(played(script, count, ended=told.append))
    assert found.most_at_once == count
    assert [each.error for each in found.answers] == [None] * count
    assert sorted(each.body["model"] for each in come) == sorted(f"m{n}" for n in range(count))
    assert len(told) == count
    assert found.seconds == max(each.ended for each in told if each.ended)


def test_too_many_at_once_are_not_sent_and_do_not_wait(run: Run) -> None:
    told = asyncio.Event()

    async def script(asked: Asked) -> None:
        await told.wait()
        await asked.begin()
        await asked.done()

    async def main() -> Played:
        def ended(answer: Answer) -> None:
            if answer.arrival.model == "m4":
                told.set()

        return await played(script, 5, most_at_once=3, ended=ended)

    found = run(main())
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


def test_cold_is_who_comes_before_the_model_has_answered(run: Run) -> None:
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

    assert [each.cold for each in run(main())] == [True, True, True, False, True]


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


async def _cut_at_once(asked: Asked) -> None:
    asked.cut()


async def _cut_after_text(asked: Asked) -> None:
    await asked.begin()
    await asked.text("x")
    asked.cut()


async def _ends_without_done(asked: Asked) -> None:
    await asked.begin()
    await asked.text("x")


async def _breaks_its_length(asked: Asked) -> None:
    await asked.send(
        b"HTTP/1.1 200 x\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: "
    )


async def _says_nonsense(asked: Asked) -> None:
    await asked.send(b"nonsense\r\n\r\n")


@pytest.mark.parametrize(
    "script",
    [_cut_at_once, _cut_after_text, _ends_without_done, _breaks_its_length, _says_nonsense],
)
def test_a_connection_that_breaks_is_a_hang_up(run: Run, script: Script) -> None:
    answer = one(run, script)
    assert answer.error == "hang-up"
    assert answer.told


async def _whole(asked: Asked) -> None:
    await asked.begin(kind=b"application/json")
    await asked.event({"choices": []})


async def _no_json(asked: Asked) -> None:
    await asked.begin()
    await asked.send(b"data: {\n\n")


async def _no_object(asked: Asked) -> None:
    await asked.begin()
    await asked.event(["x"])


async def _nested(asked: Asked) -> None:
    await asked.begin()
    await asked.send(b"data: " + b"[" * 200_000 + b"\n\n")


async def _one_long_line(asked: Asked) -> None:
    await asked.begin()
    await asked.send(b"data: " + b"x" * (streaming_client.MAX_LINE + 1))


@pytest.mark.parametrize("script", [_whole, _no_json, _no_object, _nested, _one_long_line])
def test_what_is_no_stream_of_events_is_said(run: Run, script: Script) -> None:
    assert one(run, script).error == "no stream"


@pytest.mark.parametrize(
    "event",
    [
        {"choices": 5},
        {"choices": ["x"]},
        {"choices": [{"delta": "x"}]},
        {"choices": [{"text": 5}]},
        {"choices": [{"delta": {"content": ["x"]}}]},
        {"choices": [], "usage": {"completion_tokens": -1}},
        {"choices": [], "usage": {"completion_tokens": True}},
        {"choices": [], "usage": {"completion_tokens": 10**400}},
        {"choices": [], "usage": {"prompt_tokens": 1.5}},
        {"choices": [], "usage": [1]},
        {"choices": [], "usage": {"completion_tokens": "many"}},
    ],
)
def test_an_event_of_another_form_is_said(run: Run, event: object) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.event(event)
        await asked.done()

    assert one(run, script).error == "no stream"


def test_an_error_within_the_stream_is_one(run: Run) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.text("x")
        await asked.event({"error": {"message": "gone", "code": 502}})

    answer = one(run, script)
    assert (answer.status, answer.error, len(answer.chunks)) == (200, "error in the stream", 1)
    assert answer.told == '{"message": "gone", "code": 502}'


def test_a_slow_end_is_a_timeout(run: Run) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.text("x")
        await asyncio.Event().wait()

    assert one(run, script, seconds=0.2).error == "timeout"


def test_nobody_listens(run: Run) -> None:
    async def main() -> Played:
        async def nothing(asked: Asked) -> None: ...

        async with standing_in(nothing) as gone:
            pass
        async with session(20, None) as opened:
            client = Client(opened, gone.url, "completions")
            return await play(client, arrivals(2), body, most_at_once=9)

    found = run(main())
    assert [each.error for each in found.answers] == ["no connection"] * 2
    assert [each.status for each in found.answers] == [None] * 2


def test_whoever_is_cancelled_leaves_nothing_under_way(run: Run) -> None:
    asked: list[Asked] = []

    async def script(each: Asked) -> None:
        asked.append(each)
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(played(script, 3))
        await until(lambda: len(asked) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("ask ")]

    run(main())


def test_what_fails_here_is_told_at_the_end(run: Run) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.done()

    def ended(answer: Answer) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run(played(script, 2, ended=ended))


# -- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_may_be_cut_anywhere(run: Run, size: int) -> None:
    content = ': hello\r\nevent: x\r\ndata: ä\r\n\r\ndata:{"a": 1}\n\ndata:  b\n\ndata'.encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), size):
            yield content[start : start + size]

    async def main() -> list[str]:
        return [data async for data in events(pieces())]

    assert run(main()) == ["ä", '{"a": 1}', " b"]


def test_the_url_may_be_that_of_the_calls() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert endpoint(url, "chat") == "http://h:1/v1/chat/completions"
    assert endpoint("https://h/below", "completions") == "https://h/below/v1/completions"
    assert endpoint("http://[::1]:8000", "chat") == "http://[::1]:8000/v1/chat/completions"


@pytest.mark.parametrize(
    "url",
    [
        *("h:1", "ftp://h", "http://", "http://:80", "http://h:99999", "http://h:x", "http://[::1"),
        *("http://u:secret@h", "http://h?secret=1", "http://h#secret", "http://a b", "http://h\n"),
    ],
)
def test_what_is_no_url_of_a_server_is_said_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="no URL") as caught:
        endpoint(url, "chat")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a\nb", "a\r", "ä", "\ud800"])
def test_a_key_that_no_header_can_hold_is_refused(run: Run, key: str) -> None:
    async def main() -> None:
        async with session(1, key):
            pass

    with pytest.raises(ConfigError, match="no header"):
        run(main())
