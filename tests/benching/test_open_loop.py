"""Requests over loopback to servers that answer by script, right, wrong, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from benching.stand_in import STREAM, Asked, Script, standing_in
from common import until
from lorax_async.commands.benching.open_loop import NOT_SENT, Played, play, session
from lorax_async.commands.benching.streaming_client import (
    MAX_LINE,
    Answer,
    Client,
    endpoint,
    events,
)
from lorax_async.commands.measure import run_on_uvloop
from lorax_async.core.request_schedule import Arrival
from lorax_async.errors import ConfigError


def _body(arrival: Arrival) -> dict[str, Any]:
    return {"model": arrival.model}


async def played(script: Script, *models: str, seconds: float = 20, **options: Any) -> Played:
    """Of requests that are all due at once."""
    due = [Arrival(0.0, model) for model in models or ("m",)]
    async with standing_in(script) as there, session(seconds, None) as opened:
        settings = {"most_at_once": 100} | options
        return await play(Client(opened, there.url, "chat"), due, _body, **settings)


async def one(script: Script, **options: Any) -> Answer:
    (answer,) = (await played(script, **options)).answers
    assert isinstance(answer, Answer)
    return answer


async def _whole_at_once(asked: Asked) -> None:
    await asked.begin()
    await asked.done()


async def _never(asked: Asked) -> None:
    await asyncio.Event().wait()


# -- an open loop ----------------------------------------------------------------------------------


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
    """The server answers none before all have come, which only an open loop lets happen."""
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
    models = [f"m{n}" for n in range(count)]
    found = await played(script, *models, ended=told.append)
    assert found.most_at_once == count
    assert [each.error for each in found.answers] == [None] * count
    assert sorted(each.body["model"] for each in come) == sorted(models)
    assert len(told) == count
    assert found.seconds == max(each.ended for each in told if each.ended)


async def test_too_many_at_once_are_not_sent_and_do_not_wait() -> None:
    told = asyncio.Event()

    async def script(asked: Asked) -> None:
        await told.wait()
        await _whole_at_once(asked)

    def ended(answer: Answer) -> None:
        if answer.arrival.model == "m4":
            told.set()

    models = [f"m{n}" for n in range(5)]
    found = await played(script, *models, most_at_once=3, ended=ended)
    assert [each.error for each in found.answers] == [None, None, None, NOT_SENT, NOT_SENT]
    assert [each.sent is None for each in found.answers] == [False] * 3 + [True] * 2
    assert found.most_at_once == 3


def test_nothing_is_sent_before_it_is_due() -> None:
    """uvloop, on which the command runs, counts in whole milliseconds."""

    async def main() -> Played:
        async with standing_in(_whole_at_once) as there, session(20, None) as opened:
            due = [Arrival(0.0054 * n, "m") for n in range(40)]
            return await play(Client(opened, there.url, "chat"), due, _body, most_at_once=99)

    for each in run_on_uvloop(main()).answers:
        assert each.late is not None
        assert each.late >= 0


async def test_a_request_is_cold_that_comes_before_its_model_has_answered() -> None:
    """Of m: two wait for one load, the third comes after it. Of gone: none ever gets an answer."""
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
        await _whole_at_once(asked)

    due = [Arrival(0.0, "m"), Arrival(0.0, "gone"), Arrival(0.0, "m")]
    due += [Arrival(0.5, "m"), Arrival(0.5, "gone")]  # when those have long been answered
    async with standing_in(script) as there, session(20, None) as opened:
        client = Client(opened, there.url, "chat")
        answers = (await play(client, due, _body, most_at_once=9)).answers
    assert [each.cold for each in answers] == [True, True, True, False, True]


async def test_a_cancelled_play_leaves_nothing_under_way() -> None:
    asked: list[Asked] = []

    async def script(each: Asked) -> None:
        asked.append(each)
        await _never(each)

    task = asyncio.create_task(played(script, "a", "b", "c"))
    await until(lambda: len(asked) == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("ask ")]


async def test_an_error_of_the_caller_is_raised_at_the_end() -> None:
    def ended(answer: Answer) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        await played(_whole_at_once, "a", "b", ended=ended)


# -- strange endpoints -----------------------------------------------------------------------------


@dataclass
class Sends:
    """Begins a stream, unless it is told not to, sends these bytes, and ends the connection."""

    content: bytes = b""
    begins: bool = True
    kind: bytes = STREAM
    status: int = 200
    cuts: bool = False
    waits: bool = False

    async def __call__(self, asked: Asked) -> None:
        if self.begins:
            await asked.begin(self.status, self.kind)
        await asked.send(self.content)
        if self.cuts:
            asked.cut()
        if self.waits:
            await _never(asked)


def _event(data: object) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


_TEXT = _event({"choices": [{"delta": {"content": "x"}}]})
_SHORT = b"HTTP/1.1 200 x\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: "
_FAILED = {"message": "gone", "code": 502}
ENDPOINTS: dict[str, tuple[Script, str]] = {
    "cut at once": (Sends(begins=False, cuts=True), "hang-up"),
    "cut after a piece": (Sends(_TEXT, cuts=True), "hang-up"),
    "ends without [DONE]": (Sends(_TEXT), "hang-up"),
    "breaks its length": (Sends(_SHORT, begins=False), "hang-up"),
    "no HTTP": (Sends(b"nonsense\r\n\r\n", begins=False), "hang-up"),
    "no stream": (Sends(_event({"choices": []}), kind=b"application/json"), "no stream"),
    "no JSON": (Sends(b"data: {\n\n"), "no stream"),
    "no object": (Sends(_event(["x"])), "no stream"),
    "nested": (Sends(b"data: " + b"[" * 200_000 + b"\n\n"), "no stream"),
    "one long line": (Sends(b"data: " + b"x" * (MAX_LINE + 1)), "no stream"),
    "an error in it": (Sends(_TEXT + _event({"error": _FAILED})), "error in the stream"),
    "a redirect": (
        Sends(b"HTTP/1.1 307 x\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", begins=False),
        "307",
    ),
    "a status without its body": (
        Sends(b"HTTP/1.1 503 x\r\nContent-Length: 9\r\n\r\n", begins=False, waits=True),
        "503",
    ),
    "a slow end": (Sends(_TEXT, waits=True), "timeout"),
    **{
        f"status {status}": (
            Sends(b'{"no": 1}', status=int(status), kind=b"application/json"),
            status,
        )
        for status in ("400", "404", "429", "503")
    },
    **{
        f"event {event}": (Sends(_event(event) + b"data: [DONE]\n\n"), "no stream")
        for event in (
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
        )
    },
}


@pytest.mark.parametrize("name", ENDPOINTS, ids=lambda name: name[:40])
async def test_an_endpoint_that_answers_wrongly_is_named(name: str) -> None:
    script, error = ENDPOINTS[name]
    answer = await one(script, seconds=0.3 if "slow" in name or "without its" in name else 20)
    assert answer.error == error
    assert answer.ended is not None
    if error.isdigit():
        assert (answer.status, answer.chunks) == (int(error), [])
    if error == "hang-up":
        assert answer.told
    if name == "status 404":
        assert answer.told == '{"no": 1}'
    if name == "an error in it":
        assert (answer.status, len(answer.chunks)) == (200, 1)
        assert answer.told == json.dumps(_FAILED)


async def test_an_endpoint_that_is_gone() -> None:
    async with standing_in(_never) as gone:
        pass
    async with session(20, None) as opened:
        client = Client(opened, gone.url, "completions")
        found = await play(client, [Arrival(0.0, "m")] * 2, _body, most_at_once=9)
    assert [(each.error, each.status) for each in found.answers] == [("no connection", None)] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_events_may_be_cut_anywhere(size: int) -> None:
    content = ': hello\r\nevent: x\r\ndata: ä\r\n\r\ndata:{"a": 1}\n\ndata:  b\n\ndata'.encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), size):
            yield content[start : start + size]

    assert [data async for data in events(pieces())] == ["ä", '{"a": 1}', " b"]


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
async def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="no header"):
        async with session(1, key):
            pass
