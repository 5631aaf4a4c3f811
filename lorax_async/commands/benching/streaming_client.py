"""One streaming request to an OpenAI-compatible endpoint, with the times of its pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lorax_async.core.request_schedule import Arrival
from lorax_async.errors import ConfigError, shorten

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

MAX_LINE = 1 << 20
MAX_TOKENS = 1 << 40
"""Of one answer; beyond that the server's word is not believed."""

Call = Literal["chat", "completions"]
PATHS: dict[Call, str] = {"chat": "/chat/completions", "completions": "/completions"}


@dataclass(slots=True)
class Answer:
    """What came of one arrival. Times are seconds since the beginning of all.

    `cold` ones were due before their model had begun to answer anybody. `chunks` are the times of
    pieces with text; `status` is None where no answer began; `error` is None for a stream that came
    to its end. `tokens` and `prompt_tokens` are what the server says.
    """

    arrival: Arrival
    cold: bool = False
    sent: float | None = None
    chunks: list[float] = field(default_factory=list)
    ended: float | None = None
    status: int | None = None
    error: str | None = None
    told: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None

    @property
    def late(self) -> float | None:
        return None if self.sent is None else self.sent - self.arrival.due

    @property
    def first(self) -> float | None:
        """Seconds to its first text from when it was due: what sent it late is no excuse."""
        return self.chunks[0] - self.arrival.due if self.chunks else None

    @property
    def has_come(self) -> bool:
        """The model has begun to answer, if only with an empty text."""
        return bool(self.chunks) or (self.ended is not None and self.error is None)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Seconds from one token to the next, in the mean; a chunk may hold several."""
        if len(self.chunks) < 2 or self.made < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.made - 1)

    @property
    def made(self) -> int:
        """Tokens, or pieces where the server does not say."""
        return len(self.chunks) if self.tokens is None else self.tokens

    def as_json(self) -> dict[str, Any]:
        """One line of `--lines`."""
        return {
            "model": self.arrival.model,
            "cold": self.cold,
            "due_s": self.arrival.due,
            "sent_s": self.sent,
            "ttft_s": self.first,
            "chunks_s": self.chunks,
            "ended_s": self.ended,
            "status": self.status,
            "error": self.error,
            "told": self.told,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
        }


class StreamError(Exception):
    """The stream is not what it should be; `kind` is short, for a count."""

    def __init__(self, kind: str, told: str = "") -> None:
        super().__init__(kind)
        self.kind, self.told = kind, told


class Client:
    """Asks, and takes note of what comes and when. Never raises for what a server does."""

    def __init__(
        self,
        session: ClientSession,
        url: str,
        call: Call,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._session = session
        self._url = endpoint(url, call)
        self._clock = clock

    async def ask(self, answer: Answer, body: dict[str, Any], start: float) -> None:
        """Send `body` now; `answer` has everything that came of it then."""
        import aiohttp  # noqa: PLC0415 - heavy, and only here

        def now() -> float:
            return self._clock() - start

        answer.sent = now()
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                answer.status = response.status
                await _read(response, answer, now)
        except StreamError as error:
            answer.error, answer.told = error.kind, shorten(error.told, 300) or None
        except RecursionError:
            answer.error, answer.told = "no stream", "JSON nested too deeply"
        except TimeoutError:
            answer.error = "timeout"
        except aiohttp.ClientConnectorError as error:
            answer.error, answer.told = "no connection", shorten(str(error), 300)
        except (aiohttp.ClientError, OSError) as error:
            answer.error, answer.told = "hang-up", shorten(str(error) or type(error).__name__, 300)
        answer.ended = now()


async def _read(response: ClientResponse, answer: Answer, now: Callable[[], float]) -> None:
    if response.status != 200:
        raise StreamError(str(response.status), await _beginning(response))
    if response.content_type != "text/event-stream":
        raise StreamError("no stream", response.content_type)
    async for data in events(response.content.iter_any()):
        if data == "[DONE]":
            return
        _take(_parsed(data), answer, now)
    raise StreamError("hang-up", "the stream ended without [DONE]")


async def _beginning(response: ClientResponse) -> str:
    """Of a body that says why; it may be missing."""
    import aiohttp  # noqa: PLC0415

    try:
        return (await response.content.read(4096)).decode(errors="replace")
    except (TimeoutError, aiohttp.ClientError):
        return ""


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of server-sent events, of one line each."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_LINE:
            raise StreamError("no stream", f"a line of over {MAX_LINE:,} bytes")
        for data in _data(lines):
            yield data


def _data(lines: list[bytes]) -> Iterator[str]:
    for line in lines:
        name, _, value = line.rstrip(b"\r").partition(b":")
        if name == b"data":
            yield value.removeprefix(b" ").decode(errors="replace")


def _parsed(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise StreamError("no stream", data) from None
    if not isinstance(event, dict):
        raise StreamError("no stream", data)
    if event.get("error"):
        raise StreamError("error in the stream", json.dumps(event["error"]))
    return event


def _take(event: dict[str, Any], answer: Answer, now: Callable[[], float]) -> None:
    try:
        if any(_text_of(choice) for choice in event.get("choices") or ()):
            answer.chunks.append(now())
        usage = event.get("usage")
        if usage:
            answer.tokens = _count(usage.get("completion_tokens"))
            answer.prompt_tokens = _count(usage.get("prompt_tokens"))
    except (AttributeError, TypeError):
        raise StreamError("no stream", json.dumps(event)) from None


def _text_of(choice: dict[str, Any]) -> str | None:
    delta = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
    if text and not isinstance(text, str):
        raise TypeError
    return text


def _count(number: object) -> int | None:
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_TOKENS:
        raise TypeError
    return number


def endpoint(url: str, call: Call) -> str:
    """Where to post: `url` is the server's, with or without /v1. Raises `ConfigError`."""
    if not _is_root(url):
        raise ConfigError(
            "no URL of a server, as http://127.0.0.1:8000, without user, password, query and"
            " fragment; a key goes into the environment"
        )
    root = url.rstrip("/").removesuffix("/v1")
    return f"{root}/v1{PATHS[call]}"


def _is_root(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and port != 0
        and not set(url) & set("?#@ ")
        and url.isprintable()
    )


async def cancelled(tasks: set[asyncio.Task[None]]) -> None:
    """Wait until they are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
