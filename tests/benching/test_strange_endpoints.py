"""Servers that answer as none should: what bench-serve says of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from benching.played import arrivals, body, one
from benching.stand_in import Asked, Script, standing_in
from common import Run
from lorax_async.commands.benching import streaming_client
from lorax_async.commands.benching.open_loop import Played, play, session
from lorax_async.commands.benching.streaming_client import Client, endpoint, events
from lorax_async.errors import ConfigError


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


async def test_nobody_listens() -> None:
    async def main() -> Played:
        async def nothing(asked: Asked) -> None: ...

        async with standing_in(nothing) as gone:
            pass
        async with session(20, None) as opened:
            client = Client(opened, gone.url, "completions")
            return await play(client, arrivals(2), body, most_at_once=9)

    found = await main()
    assert [each.error for each in found.answers] == ["no connection"] * 2
    assert [each.status for each in found.answers] == [None] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_events_may_be_cut_anywhere(size: int) -> None:
    content = ': hello\r\nevent: x\r\ndata: ä\r\n\r\ndata:{"a": 1}\n\ndata:  b\n\ndata'.encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), size):
            yield content[start : start + size]

    async def main() -> list[str]:
        return [data async for data in events(pieces())]

    assert await main() == ["ä", '{"a": 1}', " b"]


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
