"""The real HTTP server in front of a scripted engine."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from tiny_loaders import loader as tiny_loader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lorax_async.errors import LoaderClosedError, LoraxError
from lorax_async.ids import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.server.app import DrainingServer, listen
from lorax_async.server.engine import Finish, Generation
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import Service

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('the user speaks first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEY = "a client's key"
TOKEN = "the-admin-token"
MAX_LENGTH = 1 << 16
COMPLETIONS = "/v1/completions"
POST = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
"""Of a request that a test writes itself."""


def request(body: object) -> bytes:
    content = json.dumps(body).encode()
    return f"{POST}Content-Length: {len(content)}\r\n\r\n".encode() + content


@functools.cache
def tokenizer() -> Any:
    """Return a tokenizer with a token per byte, so that most characters take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")  # type: ignore[no-untyped-call]
    fast.chat_template = TEMPLATE
    return fast


def tokens_of(text: str) -> list[int]:
    found = tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert isinstance(found, list)
    return found


def llama_config() -> Any:
    heads: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes: Any = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=64)


class FakeTokens:
    """The tokens of one generation, as the test scripts them."""

    def __init__(self, engine: FakeEngine, generation: Generation) -> None:
        self.generation = generation
        self.finish: Finish | None = None
        self.queue_seconds: float | None = 0.125
        self.cancelled = asyncio.Event()
        self._engine = engine
        self._coming: asyncio.Queue[int | Finish | Exception] = asyncio.Queue()

    def give(self, *items: int | Finish | Exception) -> None:
        self._engine.begun(self)
        for item in items:
            self._coming.put_nowait(item)

    def say(self, text: str) -> None:
        self.give(*tokens_of(text))

    def end(self, finish: Finish = "stop") -> None:
        self.give(finish)

    def fail(self, error: Exception) -> None:
        self.give(error)

    def cancel(self) -> None:
        self._engine.begun(self)
        self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[int]:
        while True:
            item = await self._coming.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, str):
                self.finish = item
                return
            yield item


Rule = Callable[[FakeTokens], object]


class FakeEngine:
    """Calls `rule` with each generation; None leaves results and their time to the test."""

    def __init__(self, rule: Rule | None = None, max_length: int = MAX_LENGTH) -> None:
        self.max_length = max_length
        self.alive = True
        self.submitted: list[FakeTokens] = []
        self.rule = rule
        self._waiting: set[FakeTokens] = set()
        self._change_event = asyncio.Event()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, generation: Generation) -> FakeTokens:
        if not self.alive:
            raise LoaderClosedError("the engine is closed")
        tokens = FakeTokens(self, generation)
        self.submitted.append(tokens)
        self._waiting.add(tokens)
        self._change_event.set()
        if self.rule is not None:
            self.rule(tokens)
        return tokens

    def begun(self, tokens: FakeTokens) -> None:
        self._waiting.discard(tokens)

    async def asked(self, count: int = 1) -> FakeTokens:
        async with asyncio.timeout(20):
            while len(self.submitted) < count:
                self._change_event.clear()
                await self._change_event.wait()
        return self.submitted[count - 1]


def saying(text: str) -> Rule:
    def rule(tokens: FakeTokens) -> None:
        said, most = tokens_of(text), tokens.generation.max_new_tokens
        tokens.give(*said[:most])
        tokens.end("length" if len(said) > most else "stop")

    return rule


def echo(tokens: FakeTokens) -> None:
    asked, how = tokens.generation, tokens.generation.sampling
    text = tokenizer().backend_tokenizer.decode(asked.prompt)
    tokens.say(f"{asked.adapter}|{text}|{how.temperature}|{how.top_p}|{how.seed}")
    tokens.end()


def failing(error: LoraxError) -> Rule:
    return lambda tokens: tokens.fail(error)


def loading(loader: AdapterLoader) -> Rule:
    """Answer once the adapter is loaded, as a real engine does."""

    async def answer(tokens: FakeTokens) -> None:
        adapter = tokens.generation.adapter
        try:
            if adapter is not None:
                (await loader.load(adapter)).release()
        except Exception as error:
            tokens.fail(error)
        else:
            saying("loaded")(tokens)

    tasks = set[asyncio.Task[None]]()
    return lambda tokens: tasks.add(asyncio.ensure_future(answer(tokens)))


@dataclass
class World:
    service: Service
    server: DrainingServer
    engine: Any
    client: AsyncOpenAI
    port: int
    ended: asyncio.Task[None]

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Send one request on its own connection; `body` as JSON, or unchanged if bytes.

        The Content-Type is JSON unless `headers` have another; "" leaves a field out.
        """
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(content)}"]
        headers = {"Content_Type": "application/json"} | headers
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value]
        head = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
        return await self.raw(head + content)

    async def raw(self, content: bytes) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(content)
            return Answer.of(await reader.read())
        finally:
            writer.close()

    async def admin(self, path: str, body: object) -> Answer:
        return await self.ask("POST", path, body, Authorization=f"Bearer {TOKEN}")

    def completing(self, body: object) -> asyncio.Task[Answer]:
        return asyncio.create_task(self.ask("POST", COMPLETIONS, body))

    async def ends(self) -> bool:
        return await self.service.in_flight.wait_until_idle(20)

    async def until_busy(self) -> None:
        for _ in range(5000):
            if not await self.service.in_flight.wait_until_idle(0):
                return
            await asyncio.sleep(0.001)
        raise AssertionError("nothing came")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, content: bytes) -> Answer:
        head, _, body = content.partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        fields = (line.partition(": ") for line in rest)
        headers = {name.lower(): value for name, _, value in fields}
        return cls(int(first.split()[1]), headers, body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


@asynccontextmanager
async def listening(
    service: Service, *, send_buffer: int | None = None
) -> AsyncIterator[tuple[DrainingServer, asyncio.Task[None], int, AsyncOpenAI]]:
    ready = asyncio.Event()
    server, listener = DrainingServer(service, ready.set), listen("127.0.0.1", 0)
    if send_buffer is not None:  # of all connections that it accepts
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listener.getsockname()[1]
    ended = asyncio.create_task(server.serve([listener]))
    await ready.wait()
    http, url = DefaultAsyncHttpxClient(trust_env=False), f"http://127.0.0.1:{port}/v1"
    async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, http_client=http) as client:
        yield server, ended, port, client
    server.stop()
    await asyncio.wait([ended])
    if not ended.cancelled():
        await ended


@asynccontextmanager
async def serving(
    engine: Any = None, loader: Any = None, *, send_buffer: int | None = None, **settings: Any
) -> AsyncIterator[World]:
    engine = FakeEngine(saying("hello")) if engine is None else engine
    plain: dict[str, Any] = {"base": "base", "admin_token": TOKEN, "sources": (Allow("hub"),)}
    async with tiny_loader() if loader is None else loader as there:
        eos = frozenset({tokenizer().eos_token_id})
        service = Service(ServerSettings(**(plain | settings)), engine, there, tokenizer(), eos)
        async with listening(service, send_buffer=send_buffer) as (server, ended, port, client):
            yield World(service, server, engine, client, port, ended)
