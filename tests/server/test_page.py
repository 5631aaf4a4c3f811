"""The page's own calls: its files; adapters and numbers, live; and the last cold requests."""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock
from urllib.parse import quote

import pytest
import tiny
from chrome_format import require_trace
from event_loops import until
from server_world import COMPLETIONS, TOKEN, FakeEngine, FakeTokens, World, loading, saying, serving
from tiny_loaders import ONE, fails, gated
from tiny_loaders import loader as tiny_loader
from tiny_sources import make_source, over

from engines.conftest import watched
from lorax_async.errors import AdapterFormatError, CapacityError
from lorax_async.loader import AdapterLoader
from lorax_async.server import app, monitoring
from lorax_async.server.server_settings import ModelNames
from lorax_async.tracing import Trace

Patch = pytest.MonkeyPatch
EVENTS, TRACE = "/page/events", "/page/trace.json"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}


class Told:
    """A stream of events, put together as a page does it."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.rows: dict[str, Any] = {}
        self.first: dict[str, Any] = {}
        self.cold: list[Any] = []
        self.numbers: Any = None
        self.more = 0
        self._reader = reader

    async def next(self) -> dict[str, Any] | None:
        line = b""
        async with asyncio.timeout(20):
            while not line.startswith(b"data: {"):
                line = await self._reader.readline()
                if not line or line == b"data: [DONE]\n":
                    return None
        news: dict[str, Any] = json.loads(line[len(b"data: ") :])
        self.first = self.first or news
        self.rows |= news.get("rows", {})
        for id in news.get("gone", ()):
            del self.rows[id]
        self.cold = news.get("cold", self.cold)
        self.numbers = news.get("numbers", self.numbers)
        self.more = news.get("more", self.more)
        return news

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert await self.next() is not None


@asynccontextmanager
async def watching(world: World, headers: dict[str, str] | None = None) -> AsyncIterator[Told]:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    try:
        fields = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        writer.write(f"GET {EVENTS} HTTP/1.1\r\nHost: test\r\n{fields}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert b"content-type: text/event-stream" in head
        told = Told(reader)
        await told.next()
        yield told
    finally:
        writer.close()


async def test_the_page_needs_nothing_from_elsewhere() -> None:
    """Nor could it: the browser is told so. Behind a proxy, no path begins at the root."""
    kinds = {"css": "text/css", "js": "text/javascript", "html": "text/html"}
    async with serving() as world:
        page = (await world.ask("GET", "/")).body.decode()
        named = {f"/{name}" for name in re.findall(r'(?:src|href)="(page/[^"]+)"', page)}
        for path in (scripts := ["/page/page.js"]):
            script = (await world.ask("GET", path)).body.decode()
            imports = {
                f"/page/{name}" for name in re.findall(r'(?:from|import) "\./(.+?)"', script)
            }
            scripts += imports - {*scripts}
        named |= {*scripts}
        assert named == app.FILES.keys() - {"/"}
        for path in ("/", *named):
            answer = await world.ask("GET", path)
            kind = kinds[path.rpartition(".")[2]] if path in named else "text/html"
            assert (answer.status, bool(answer.body)) == (200, True)
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert not re.search(rb"""["'(](?:https?:)?//|(?:src|href)=["']/""", answer.body)
            head = await world.ask("HEAD", path)
            assert (head.status, head.body) == (200, b"")


async def test_only_reading_is_allowed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(monitoring, "MAX_PAGES", 1)
    async with serving() as world:
        for path in ("/", EVENTS, TRACE):
            assert (await world.ask("POST", path)).status == 405
        for path in ("/page/other.js", "/page/../settings.py", "/page/timeline.svg"):
            assert (await world.ask("GET", path)).status == 404
        assert (await world.ask("HEAD", EVENTS)).status == 200
        async with watching(world):
            pass


async def test_names_and_tiers_are_told_as_they_change(tmp_path: Path) -> None:
    one, late = tiny.write(tmp_path / "one", 1), tiny.write(tmp_path / "late", 2)
    async with serving(adapters={"one": one}) as world, watching(world) as told:
        assert (told.first["base"], told.first["cold"]) == ("base", [])
        assert told.rows["one"]["tier"] == "source"
        async with await world.service.loader.load(one):
            row = {"tier": "device", "state": "resident", "bytes": ONE, "leases": 1, "error": None}
            await told.until(lambda: row.items() <= told.rows["one"].items())
        await told.until(lambda: not told.rows["one"]["leases"])
        await world.service.loader.unload(one)
        await told.until(lambda: told.rows["one"]["tier"] == "disk")
        await world.admin("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": str(late)})
        news: Any = await told.next()
        while "rows" not in news:
            assert news.keys() == {"numbers"}
            news = await told.next()
        assert news.keys() <= {"rows", "numbers"}
        assert news["rows"].keys() == {"late"}, "what has not changed is not told again"
        await told.until(lambda: told.rows["late"]["tier"] == "device")
        await world.admin("/v1/unload_lora_adapter", {"lora_name": "late"})
        await told.until(lambda: told.rows.keys() == {"one"})


async def test_layers_are_counted_as_they_come(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "slow")
    loader, device = gated()
    device.gate.clear()
    async with serving(loader=loader, adapters={"slow": folder}) as world, watching(world) as told:
        load = asyncio.create_task(loader.load(folder))
        await told.until(lambda: told.rows["slow"]["layers"] == [0, 4])
        assert (told.rows["slow"]["tier"], told.rows["slow"]["state"]) == ("device", "filling")
        device.gate.set()
        (await load).release()
        await told.until(lambda: told.rows["slow"]["state"] == "resident")
        assert told.rows["slow"]["layers"] == [4, 4]


async def test_numbers_of_the_server_are_anybodys(tmp_path: Path) -> None:
    """As those of /metrics, which need no key either."""
    engine, folder = FakeEngine(), tiny.write(tmp_path / "one")
    async with serving(engine, adapters={"one": folder}) as world, watching(world) as told:
        others = {"host": [0, 256 << 20], "pinned": [0, 0]}
        assert told.numbers == {
            "slots": [0, 4], "memory": {"device": [0, 1 << 20]} | others, "hits": [0, 0],
            "running": 0, "waiting": 0, "tokens_per_second": 0,
        }  # fmt: skip
        for _ in range(4):
            (await world.service.loader.load(folder)).release()
        await told.until(lambda: told.numbers["hits"] == [3, 4])
        assert told.numbers["slots"] == [1, 4]
        assert told.numbers["memory"] == {"device": [ONE, 1 << 20]} | others
        tasks = [asyncio.create_task(complete(world, "one")) for _ in range(2)]
        await engine.asked(2)
        engine.submitted[0].say("a")
        await told.until(lambda: (told.numbers["running"], told.numbers["waiting"]) == (1, 1))
        for tokens in engine.submitted:
            tokens.end()
        await asyncio.gather(*tasks)
        await told.until(lambda: (told.numbers["running"], told.numbers["waiting"]) == (0, 0))


def test_tokens_per_second_are_those_of_the_last_seconds(monkeypatch: Patch) -> None:
    clock, metrics = [100.0], Mock(token_count=7, running=Counter(), waiting=Counter())
    loader = Mock(**{"statistics.return_value.hits": Counter(device=0)})
    loader.placement.return_value.usage = MagicMock()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    cold = Mock(**{"visible.return_value": []})
    dashboard = monitoring.Dashboard(loader, ModelNames("base", {}), cold, metrics)

    def rate() -> object:
        return dashboard.page(operator=False)["numbers"]["tokens_per_second"]

    def rate_after(seconds: int, tokens: int) -> object:
        for _ in range(4 * seconds):
            clock[0] += 0.25
            metrics.token_count += tokens / 4
            found = rate()
        return found

    assert rate() == 0
    assert [rate_after(2, 12), rate_after(20, 6), rate_after(5, 0), rate_after(10, 0)] == [
        12,
        6,
        3,
        0,
    ]
    clock[0] += 3600  # without a page
    metrics.token_count += 10_000
    assert rate() == 0


async def test_ids_and_paths_are_the_operators_to_see(tmp_path: Path) -> None:
    source, broken = (
        make_source(tmp_path, "org/secret", "org/named"),
        tiny.write(tmp_path / "hidden"),
    )
    (broken / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(7) + b'{"a":1}  ')
    async with serving(loader=over(source), adapters={"mine": "org/named"}) as world:
        for id in ("org/secret", "org/named"):
            (await world.service.loader.load(id)).release()
        async with watching(world) as anybody, watching(world, OPERATOR) as operator:
            assert (anybody.first["operator"], operator.first["operator"]) == (False, True)
            assert anybody.rows.keys() == {"mine"}
            found = {row["name"]: not id.startswith("\0") for id, row in operator.rows.items()}
            assert found == {"mine": True, "memory:org/secret": False}
            await world.admin("/v1/pin_lora_adapter", {"lora_name": "mine"})
            await operator.until(lambda: operator.rows["mine"]["pinned"])
            async with await world.service.loader.load("org/named"):
                await anybody.until(lambda: anybody.rows["mine"]["leases"])
            assert not anybody.rows["mine"]["pinned"]
            await world.admin("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "org/named"})
            await operator.until(lambda: "x" in operator.rows)
            assert not operator.rows["x"]["pinned"], "its button pins"
            await world.admin("/v1/unload_lora_adapter", {"lora_name": "mine"})
            await operator.until(lambda: operator.rows["x"]["pinned"])
    async with serving(adapters={"broken": broken}) as world, watching(world) as told:
        await fails(world.service.loader.load(broken), AdapterFormatError)
        await told.until(lambda: told.rows["broken"]["error"])
        assert "'broken'" in told.rows["broken"]["error"]
        assert "hidden" not in json.dumps(told.rows)


async def test_many_adapters_are_cut_and_names_counted(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(monitoring, "MAX_ROWS", 2)
    source = make_source(tmp_path, *(f"org/a{n}" for n in range(6)))
    async with serving(loader=over(source, max_slots=2)) as world:
        for n in range(6):
            (await world.service.loader.load(f"org/a{n}")).release()
        async with watching(world, OPERATOR) as told:
            assert {row["name"] for row in told.rows.values()} == {"memory:org/a4", "memory:org/a5"}
    adapters = {f"a{n}": f"org/a{n}" for n in range(5)}
    async with serving(adapters=adapters) as world, watching(world) as told:
        assert (set(told.rows), told.first["more"]) == ({"a0", "a1"}, 3)
        for n in range(4):
            await world.admin("/v1/unload_lora_adapter", {"lora_name": f"a{n}"})
        await told.until(lambda: told.rows.keys() == {"a4"} and not told.more)


def test_all_pages_share_a_look_which_takes_a_share_of_the_time(monkeypatch: Patch) -> None:
    """A look of 50 ms, at many adapters, is the only one in a second."""
    clock, loader = [100.0], Mock()

    def look(_: object) -> None:
        clock[0] += 0.05

    loader.placement.return_value = loader
    loader.find.side_effect, loader.story.return_value = look, ()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    loader.statistics.return_value.hits = Counter(device=0)
    cold = Mock(**{"visible.return_value": []})
    names, metrics = ModelNames("base", {"one": "org/one"}), Mock(token_count=0)
    dashboard = monitoring.Dashboard(loader, names, cold, metrics)
    counts = list[int]()
    for _ in range(8):
        assert dashboard.page(operator=False) is dashboard.page(operator=False)
        counts.append(loader.find.call_count)
        clock[0] += 0.25
    assert (counts, cold.visible.call_count) == ([1, 1, 1, 1, 2, 2, 2, 2], 2)


async def test_an_idle_page_waits_for_events(tmp_path: Path, monkeypatch: Patch) -> None:
    """Of the loader, of sequences and of the operator's calls."""
    for name, seconds in (("TICK", 0.01), ("ACTIVE_SECONDS", 0.3)):
        monkeypatch.setattr(monitoring, name, seconds)
    engine, folder = FakeEngine(), tiny.write(tmp_path / "one")
    reads = watched(monkeypatch, AdapterLoader, "placement")
    async with serving(engine, adapters={"one": folder}) as world, watching(world) as told:

        async def idle() -> None:
            before = -1
            async with asyncio.timeout(10):
                while before != len(reads):
                    before = len(reads)
                    await asyncio.sleep(0.5)

        await idle()
        (await world.service.loader.load(folder)).release()
        await told.until(lambda: told.rows["one"]["tier"] == "device")
        await idle()
        task = asyncio.create_task(complete(world, "base"))
        tokens = await engine.asked()
        await told.until(lambda: told.numbers["waiting"])
        await idle()
        saying("aye")(tokens)
        await task
        await told.until(lambda: not told.numbers["waiting"])
        await idle()
        await world.admin("/v1/unload_lora_adapter", {"lora_name": "one"})
        await told.until(lambda: not told.rows)


async def test_a_stop_ends_the_stream_at_once() -> None:
    """A page that is open does not keep a server from ending, nor its answers from being drained."""
    async with serving(drain=30) as world, watching(world) as told:
        world.server.stop()
        async with asyncio.timeout(5):
            while await told.next() is not None:
                pass
            await world.ended


@pytest.mark.parametrize("stops", [1, 2])
async def test_a_stuck_page_keeps_no_server(stops: int, monkeypatch: Patch, caplog: Any) -> None:
    for name, seconds in (("TICK", 0.01), ("LAST_SECONDS", 0.2)):
        monkeypatch.setattr(monitoring, name, seconds)
    adapters = {f"{n} {'x' * 20_000}": f"org/a{n}" for n in range(50)}
    async with serving(adapters=adapters, send_buffer=4096, drain=30) as world:
        _reader, writer = await asyncio.open_connection("127.0.0.1", world.port, limit=1)
        writer.write(f"GET {EVENTS} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await asyncio.sleep(0.3)  # it is full
        for _ in range(stops):
            world.server.stop()
            await asyncio.sleep(0.05)
        async with asyncio.timeout(3):
            await world.ended
        writer.close()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_open_pages_are_counted_apart_from_the_operators(monkeypatch: Patch) -> None:
    """And a silent one is told something, since proxies end what is silent."""
    monkeypatch.setattr(monitoring, "MAX_PAGES", 1)
    monkeypatch.setattr(monitoring, "SILENCE", 0.5)
    async with serving() as world:
        async with watching(world) as told:
            refused = await world.ask("GET", EVENTS)
            assert (refused.status, "retry-after" in refused.headers) == (429, True)
            async with watching(world, OPERATOR) as operators:
                assert operators.first["operator"]
            assert await told.next() == {}
        tasks = asyncio.all_tasks
        await until(lambda: "lorax client's presence" not in {t.get_name() for t in tasks()})
        async with watching(world) as told:
            assert told.first


async def complete(world: World, model: str) -> str:
    answer = await world.client.completions.create(model=model, prompt="x", max_tokens=8)
    return answer.choices[0].text


async def cold_ones(world: World, headers: dict[str, str] | None = None) -> list[Any]:
    """The last one first."""
    async with watching(world, headers) as told:
        return told.cold


async def cold_of(world: World, headers: dict[str, str] | None = None) -> Any:
    return next(iter(await cold_ones(world, headers)), None)


async def names_in(world: World, headers: dict[str, str] | None = None, of: str = "") -> set[str]:
    answer = await world.ask("GET", TRACE + of, **(headers or {}))
    assert answer.status == 200
    require_trace(answer.json)
    return set(re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(answer.json["traceEvents"])))


async def test_the_first_request_is_cold_and_the_second_is_not(tmp_path: Path) -> None:
    folder, there = tiny.write(tmp_path / "pirate"), tiny_loader()
    async with serving(FakeEngine(loading(there)), there, adapters={"pirate": folder}) as world:
        answer = await world.ask("GET", TRACE)
        assert (answer.status, answer.error["code"]) == (404, "no_cold_request")
        async with watching(world) as told:
            assert told.cold == []
            assert await complete(world, "pirate") == "loaded"
            await told.until(lambda: told.cold)
            (cold,) = told.cold
            assert (cold["name"], cold["outcome"]) == ("pirate", "first token")
            assert 0 < cold["seconds"] < 20
            assert await complete(world, "pirate") == "loaded"
            assert await complete(world, "base") == "loaded"
            assert there.tracer.on is None
        assert await cold_of(world) == cold
        trace = await world.ask("GET", TRACE)
        assert "attachment" in trace.headers["content-disposition"]
        assert trace.json["otherData"]["producer"] == "lorax_async"
        args = [e["args"] for e in require_trace(trace.json) if e["name"] == "request pirate"]
        assert args == [{"adapter": "pirate", "outcome": "first token"}]
        assert {"request pirate", "load pirate", "fetch header", "layer 0"} <= await names_in(world)
        assert trace.headers["cache-control"] == "no-store"
        await there.unload(folder)
        await complete(world, "pirate")
        async with watching(world) as told:
            await told.until(lambda: [each["number"] for each in told.cold] == [2, 1])


@pytest.mark.parametrize(
    ("rule", "status", "outcome"),
    [
        *[("load", 404, "AdapterNotFoundError"), (FakeTokens.end, 200, "no token")],
        *[("refuse the second", 429, "cancelled"), ("hang up", None, "cancelled")],
        ("closed", 503, None),
    ],
)
async def test_a_cold_request_without_a_token_is_shown_with_its_outcome(
    tmp_path: Path, rule: Any, status: int | None, outcome: str | None
) -> None:
    there, engine = over(make_source(tmp_path, "org/there")), FakeEngine()

    def refuse_the_second(_: FakeTokens) -> None:
        if len(engine.submitted) == 2:
            raise CapacityError("there is no room for a second one")

    rules = {"load": loading(there), "refuse the second": refuse_the_second}
    engine.rule = rule if callable(rule) else rules.get(rule)
    async with serving(engine, there, adapters={"gone": "org/gone"}) as world:
        engine.alive = rule != "closed"
        body = {"model": "gone", "prompt": ["x", "y"] if rule == "refuse the second" else "x"}
        if status is not None:
            assert (await world.ask("POST", COMPLETIONS, body)).status == status
        else:
            task = world.completing(body)
            await engine.asked()
            assert there.tracer.on is not None
            task.cancel()
            await asyncio.wait([task])
        await until(lambda: there.tracer.on is None)
        cold = await cold_of(world)
        assert (cold and cold["outcome"]) == outcome


async def test_a_mistyped_name_is_no_cold_request(tmp_path: Path) -> None:
    """It must not displace a request that a viewer may choose."""
    folder, there = tiny.write(tmp_path / "pirate"), tiny_loader()
    async with serving(FakeEngine(loading(there)), there, adapters={"pirate": folder}) as world:
        await complete(world, "pirate")
        for model in ("priate", "./priate", "a/b/c"):
            answer = await world.ask("POST", COMPLETIONS, {"model": model, "prompt": "x"})
            assert answer.status == 404
        for headers in (None, OPERATOR):
            assert [each["name"] for each in await cold_ones(world, headers)] == ["pirate"]
        assert "request pirate" in await names_in(world, OPERATOR)


async def test_each_viewer_may_choose_of_the_last_ones(tmp_path: Path, monkeypatch: Patch) -> None:
    """What strangers ask for pushes none out that all may see."""
    monkeypatch.setattr(monitoring, "MAX_COLD", 3)
    named = {f"a{n}": f"org/a{n}" for n in range(4)}
    ids = [id for n in range(4) for id in (f"a{n}", f"org/s{n}")][:-1]
    there = over(make_source(tmp_path, *named.values(), *ids[1::2]), max_slots=8)
    async with serving(FakeEngine(loading(there)), there, adapters=named) as world:
        for id in ids:
            await complete(world, id)
        anybodys, operators = await cold_ones(world), await cold_ones(world, OPERATOR)
        assert [(each["number"], each["name"]) for each in anybodys] == [
            *((7, "a3"), (5, "a2"), (3, "a1"))
        ]
        assert [(each["number"], each["name"]) for each in operators] == [
            *((7, "a3"), (6, "s2"), (5, "a2"))
        ]
        for headers, seen in ((None, anybodys), (OPERATOR, operators)):
            for number in range(1, 9):
                answer = await world.ask("GET", f"{TRACE}?number={number}", **(headers or {}))
                name = next((each["name"] for each in seen if each["number"] == number), None)
                assert answer.status == (404 if name is None else 200), number
                if name is not None:
                    assert f'"request {name}"'.encode() in answer.body
            assert "request a3" in await names_in(world, headers)
        for odd in ("", "x", "-1", "1.0", "\u0661", "9" * 5000):
            answer = await world.ask("GET", f"{TRACE}?number={quote(odd)}")
            assert (answer.status, answer.error["param"]) == (400, "number")
        await world.admin("/v1/unload_lora_adapter", {"lora_name": "a2"})
        async with watching(world) as told:
            await told.until(lambda: [each["number"] for each in told.cold] == [7, 3])
        assert (await world.ask("GET", f"{TRACE}?number=5")).status == 404
        assert "request a2" in await names_in(world, OPERATOR, of="?number=5")


async def test_long_traces_push_out_earlier_ones(tmp_path: Path, monkeypatch: Patch) -> None:
    folders = {f"a{n}": tiny.write(tmp_path / f"a{n}", n) for n in range(6)}
    there = tiny_loader(max_slots=8)
    async with serving(FakeEngine(loading(there)), there, adapters=folders) as world:
        await complete(world, "a0")
        (first,) = world.service.cold.visible(operator=True)
        monkeypatch.setattr(monitoring, "MAX_COLD_SPANS", 3 * first.trace.kept)
        for name in folders:
            await complete(world, name)
        kept = world.service.cold.visible(operator=True)
        assert kept[0].row["number"] == 6
        assert 1 < len(kept) < 6
        assert sum(each.trace.kept for each in kept) <= 3 * first.trace.kept


async def test_few_cold_requests_are_recorded_at_a_time(tmp_path: Path) -> None:
    """Of one adapter, one; and strangers' keep no adapter with a name from being recorded."""
    most, engine = monitoring.MAX_RECORDINGS, FakeEngine()
    folders = {f"a{n}": tiny.write(tmp_path / f"a{n}", n) for n in range(most + 1)}
    async with serving(engine, adapters=folders) as world:
        names = ["org/slow", "org/slower", "a0", *folders]
        tasks = [asyncio.create_task(complete(world, name)) for name in names]
        await engine.asked(len(names))
        recorder = world.service.loader.tracer.on
        assert recorder is not None
        assert len(recorder.rings) == most
        for tokens in engine.submitted:
            tokens.say("x")
            tokens.end()
        await asyncio.gather(*tasks)
        assert world.service.loader.tracer.on is None
        assert (await cold_of(world))["number"] == most


async def test_a_trace_is_made_once_in_a_thread(tmp_path: Path, monkeypatch: Patch) -> None:
    adapters = {name: tiny.write(tmp_path / name, n) for n, name in enumerate(("one", "two"))}
    encoded, there, made = Trace.encoded, tiny_loader(), list[threading.Thread]()

    def encode(self: Trace, *given: Any) -> Any:
        made.append(threading.current_thread())
        time.sleep(0.1)
        return encoded(self, *given)

    monkeypatch.setattr(Trace, "encoded", encode)
    async with serving(FakeEngine(loading(there)), there, adapters=adapters) as world:
        await complete(world, "one")
        answers = await asyncio.gather(*(world.ask("GET", TRACE) for _ in range(4)))
        assert {answer.status for answer in answers} == {200}
        assert (len({answer.body for answer in answers}), len(made)) == (1, 1)
        await complete(world, "two")
        assert b"request two" in (await world.ask("GET", TRACE)).body
        for number in (1, 2, 1, 2):
            assert (await world.ask("GET", f"{TRACE}?number={number}")).status == 200
    assert len(made) == 2
    assert threading.main_thread() not in made


async def test_a_trace_does_not_wait_for_anothers_encoding(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    adapters = {name: tiny.write(tmp_path / name, n) for n, name in enumerate(("one", "two"))}
    encoded, there, begun, free = Trace.encoded, tiny_loader(), list[Trace](), threading.Event()

    def encode(self: Trace, *given: Any) -> Any:
        begun.append(self)
        assert free.wait(20)
        return encoded(self, *given)

    async with serving(FakeEngine(loading(there)), there, adapters=adapters) as world:
        await complete(world, "one")
        await complete(world, "two")
        free.set()
        first = await world.ask("GET", f"{TRACE}?number=1")
        monkeypatch.setattr(Trace, "encoded", encode)
        free.clear()
        other = asyncio.create_task(world.service.cold.encoded(2, operator=False))
        try:
            await until(lambda: begun)
            async with asyncio.timeout(5):
                assert (await world.ask("GET", f"{TRACE}?number=1")).body == first.body
        finally:
            free.set()
        assert b"request two" in (await other or b"")


async def test_adapters_without_names_are_the_operators_to_see(tmp_path: Path) -> None:
    """What was asked for is anybody's to see, not what came beside it; ids may end alike."""
    adapters = {"pirate": "org/pirate", "loud": "org/shout", "two": "two/last"}
    beside = ("org/secret", "org/shout", "two/last", "three/last")
    there = over(make_source(tmp_path, "org/pirate", *beside), max_slots=8)
    async with serving(FakeEngine(), there, adapters=adapters | {"x": "three/last"}) as world:
        task = asyncio.create_task(complete(world, "pirate"))
        tokens = await world.engine.asked()
        for id in (*beside, "org/pirate"):
            (await there.load(id)).release()
        saying("aye")(tokens)
        await task
        seen = await names_in(world)
        assert not [name for name in seen if re.search("secret|last|two|three", name)]
        assert {"load another adapter", "load pirate", "load loud", "pirate"} <= seen
        assert {"load secret", "load pirate"} <= await names_in(world, OPERATOR)
        await world.admin("/v1/unload_lora_adapter", {"lora_name": "loud"})
        assert "load loud" not in await names_in(world), "its name was taken back"

        world.engine.rule = loading(there)
        for id in ("two/last", "org/secret"):
            await there.unload(id)
        await complete(world, "two")
        assert "load two" in await names_in(world)
        await complete(world, "org/secret")
        assert (await cold_of(world))["name"] == "two"
        assert (await cold_of(world, OPERATOR))["name"] == "secret"
        for name, last in (("two", ["pirate"]), ("pirate", [])):
            await world.admin("/v1/unload_lora_adapter", {"lora_name": name})
            async with watching(world) as told:
                await told.until(lambda: [each["name"] for each in told.cold] == last)
        assert (await world.ask("GET", TRACE)).status == 404


async def test_an_adapter_has_the_operators_name(tmp_path: Path) -> None:
    """Behind a link, the id that was asked for ends in one word, and what was found in another."""
    (tmp_path / "link").symlink_to(tiny.write(tmp_path / "real"))
    there, adapters = tiny_loader(), {"pirate": tmp_path / "link"}
    async with serving(FakeEngine(loading(there)), there, adapters=adapters) as world:
        await complete(world, "pirate")
        assert (await cold_of(world))["name"] == "pirate"
        seen = await names_in(world)
        assert {"request pirate", "load pirate", "pirate"} <= seen
        assert not seen & {"another adapter", "link", "real"}


def test_the_first_name_that_is_left_counts(tmp_path: Path) -> None:
    names = ModelNames("base", {"one": "org/x", "two": "org/x", "path": tmp_path})
    ids = ("org/x", tmp_path, str(tmp_path))  # a request's text is not a path
    assert [names.name_of(id) for id in ids] == ["one", "path", None]
    names.add("one", "org/y")
    assert (names.name_of("org/x"), names.name_of("org/y")) == ("two", "one")
    left = (names.remove("two"), names.name_of("org/x"), names.remove("two"))
    assert left == ("org/x", None, None)


def test_a_look_for_a_name_compares_it_with_no_other() -> None:
    adapters: dict[str, Any] = {f"n{n}": MagicMock() for n in range(9)}
    assert ModelNames("base", adapters).name_of(adapters["n8"]) == "n8"
    assert not any(adapter.__eq__.called for adapter in adapters.values())
