"""Each request through the vLLM plug-in is answered by what its name means when it begins."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from event_loops import until
from hub_stand_in import HubStandIn
from hub_stand_in import Reply as HubReply
from prometheus_client import CollectorRegistry
from vllm_doubles import Engine, Gated, Lora, LoRARequest, Reply, Server, digest, running, settings

from lorax_async.engines.vllm.routes import AdapterCollector
from lorax_async.engines.vllm.served_adapters import ServedAdapters
from lorax_async.engines.vllm.worker import FILES, BuiltWeights
from vllm_stage import write_adapter

pytestmark = pytest.mark.usefixtures("vllm", "hub_client", "builds_end")

ALWAYS: dict[str, Any] = {"revalidate_files": 0}
"""Each request looks at the files."""

REPO = "org/name"


@pytest.fixture(autouse=True)
def no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_async.engines.vllm.served_adapters.LINGER", 0.0)


def write(folder: Path, seed: int) -> str:
    """Put an adapter where one may be, by a rename; return its digest."""
    new = write_adapter(folder.with_name(f".{folder.name}-{seed}"), rank=1, seed=seed, layers=1)
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}-before-{seed}"))
    new.rename(folder)
    return digest(folder)


def local(root: Path) -> Any:
    return settings(SOURCES=str(root), CACHE_DIR=str(root / "cache"))


def of_hub(root: Path, hub: HubStandIn, **values: str) -> tuple[Any, dict[str, Any]]:
    """Settings of a plug-in that asks the hub for each request, and of its store."""
    sources = f"hub:org/ http://{hub.store_netloc}/"
    given = settings(SOURCES=sources, CACHE_DIR=str(root / "cache"), REVALIDATE="0", **values)
    return given, {"hub_endpoint": hub.endpoint, "timeout": 10.0}


def put(hub: HubStandIn, root: Path, seed: int) -> str:
    """Commit another version; return its digest."""
    found = write(root / "origin", seed)
    hub.put(REPO, {name: (root / "origin" / name).read_bytes() for name in FILES})
    return found


async def leave(served: ServedAdapters, done: Callable[[], object]) -> None:
    """Refresh until something has left."""
    async with asyncio.timeout(10):
        while not done():
            await served.refresh()
            await asyncio.sleep(0.01)


async def begin(server: Server, name: str) -> "asyncio.Task[Reply]":
    """Begin a request that goes on until `server.go_on` is set."""
    server.go_on.clear()
    states = server.engine.output_processor.request_states
    before = len(states)
    task = asyncio.create_task(server.ask(name))
    await until(lambda: len(states) > before)
    return task


async def test_requests_get_the_version_that_is_there_when_they_begin(tmp_path: Path) -> None:
    """Those that have begun keep theirs, though both have one name and fill all slots in turn."""
    engine = Engine(Lora())
    old, other = write(tmp_path / "a", 1), write(tmp_path / "b", 9)
    async with running(local(tmp_path), engine, **ALWAYS) as (server, served):
        before = await begin(server, "a")
        new = write(tmp_path / "a", 2)
        after = await begin(server, "a")
        server.go_on.set()
        first, second = await before, await after
        assert (first.json["weights"], second.json["weights"]) == ([old], [new])
        assert first.json["number"] != second.json["number"]
        assert first.json["path"] != second.json["path"], "vLLM keys what it computed by it"
        await leave(served, lambda: ("remove_lora", first.json["number"]) in engine.calls)
        assert (await server.ask("a")).json == second.json
        assert (await server.ask("b")).json["weights"] == [other]


async def test_an_unchanged_adapter_is_neither_built_nor_added_again(tmp_path: Path) -> None:
    engine = Engine(Lora())
    write(tmp_path / "a", 1)
    async with running(local(tmp_path), engine, **ALWAYS) as (server, served):
        replies = [await server.ask("a") for _ in range(5)]
        assert len({str(reply.json) for reply in replies}) == 1
        await served.refresh()
        assert served.counts["built"] == 1
        assert len([call for call in engine.calls if call[0] == "add_lora"]) == 1


async def test_versions_of_one_name_share_steps_while_others_fill_the_slots(tmp_path: Path) -> None:
    """vLLM gives its workers a set in which they are one: the step would end the engine."""
    engine = Engine(Lora())
    old = write(tmp_path / "a", 1)
    async with running(local(tmp_path), engine, **ALWAYS) as (server, _):
        before = await begin(server, "a")
        new = write(tmp_path / "a", 2)
        after = await begin(server, "a")
        number = next(iter(engine.lora.cached))
        del engine.lora.cached[number]  # as if another adapter had been in its place
        await asyncio.sleep(0.05)
        server.go_on.set()
        assert (await before).json["weights"] == [old]
        assert (await after).json["weights"] == [new]


async def test_without_the_extension_a_version_waits_for_the_one_before(tmp_path: Path) -> None:
    engine = Engine(Lora(), is_extended=False)
    old = write(tmp_path / "a", 1)
    async with running(local(tmp_path), engine, **ALWAYS) as (server, _):
        before = await begin(server, "a")
        new = write(tmp_path / "a", 2)
        after = asyncio.create_task(server.ask("a"))
        await asyncio.sleep(0.2)
        server.go_on.set()
        assert old in (await before).json["weights"]
        assert (await after).json["weights"] == [new]
        numbers = [call[1] for call in engine.calls if call[0] == "add_lora"]
        assert len(numbers) == len(set(numbers)) == 2


async def test_a_request_that_is_tokenized_while_its_adapter_changes_is_answered(
    tmp_path: Path,
) -> None:
    engine = Engine(Lora())
    write(tmp_path / "a", 1)
    async with running(local(tmp_path), engine, **ALWAYS) as (server, _):
        await server.ask("a")
        server.rendered.clear()
        early = asyncio.create_task(server.ask("a"))
        await asyncio.sleep(0.05)
        new = write(tmp_path / "a", 2)
        late = asyncio.create_task(server.ask("a"))
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert "a" in server.models.lora_requests
        server.rendered.set()
        assert (await early).status == 200
        assert (await late).json["weights"] == [new]


async def test_a_request_does_not_take_what_another_one_asked_for_before_it_began(
    tmp_path: Path,
) -> None:
    engine, may_add = Engine(Lora()), asyncio.Event()
    add_lora = engine.add_lora

    async def add_late(lora_request: Any) -> None:
        adding.set()
        await may_add.wait()
        await add_lora(lora_request)

    with HubStandIn() as hub:
        put(hub, tmp_path, 1)
        given, changed = of_hub(tmp_path, hub)
        async with running(given, engine, **changed) as (server, _):
            await server.ask(REPO)
            adding = asyncio.Event()
            engine.add_lora = add_late  # type: ignore[method-assign]
            second = put(hub, tmp_path, 2)
            early = asyncio.create_task(server.ask(REPO))
            await adding.wait()
            third = put(hub, tmp_path, 3)
            asked = len(hub.asked)
            late = asyncio.create_task(server.ask(REPO))
            await until(lambda: len(hub.asked) > asked)
            may_add.set()
            assert (await early).json["weights"] in ([second], [third])
            assert (await late).json["weights"] == [third]


async def test_a_request_that_waits_for_a_first_build_gets_what_its_name_means_then(
    tmp_path: Path,
) -> None:
    lora = Gated()
    with HubStandIn() as hub:
        put(hub, tmp_path, 1)
        given, changed = of_hub(tmp_path, hub)
        async with running(given, Engine(lora), **changed) as (server, _):
            early = asyncio.create_task(server.ask(REPO))
            await until(lambda: lora.begun)
            new = put(hub, tmp_path, 2)
            late = asyncio.create_task(server.ask(REPO))
            await asyncio.sleep(0.05)
            lora.may_load.release(2)
            assert (await late).json["weights"] == [new]
            assert (await early).status == 200


async def test_an_answer_counts_for_as_long_as_the_operator_says(tmp_path: Path) -> None:
    with HubStandIn() as hub:
        old = put(hub, tmp_path, 1)
        given, changed = of_hub(tmp_path, hub)
        async with running(given, Engine(Lora()), **changed | {"revalidate": 600.0}) as (server, _):
            assert (await server.ask(REPO)).json["weights"] == [old]
            asked = len(hub.asked)
            put(hub, tmp_path, 2)
            assert (await server.ask(REPO)).json["weights"] == [old]
            assert len(hub.asked) == asked


async def test_a_branch_that_moved_is_noticed_without_an_unload(tmp_path: Path) -> None:
    with HubStandIn() as hub:
        put(hub, tmp_path, 1)
        given, changed = of_hub(tmp_path, hub)
        async with running(given, Engine(Lora()), **changed | {"revalidate": 0.2}) as (server, _):
            assert (await server.ask(f"{REPO}@main")).status == 200
            new = put(hub, tmp_path, 2)
            await asyncio.sleep(0.2)
            assert (await server.ask(f"{REPO}@main")).json["weights"] == [new]


async def test_metrics_count_downloads_failures_and_waits(tmp_path: Path) -> None:
    with HubStandIn() as hub:
        put(hub, tmp_path, 1)
        given, changed = of_hub(tmp_path, hub)
        async with running(given, Engine(Lora()), **changed) as (server, served):
            registry = CollectorRegistry()
            registry.register(AdapterCollector(served, "0"))

            async def value(name: str, **labels: str) -> float | None:
                """Read a metric as vLLM's route does, which is no coroutine: in a thread."""
                read = registry.get_sample_value
                return await asyncio.to_thread(read, f"lorax_{name}", labels)

            assert (await value("downloads_total"), await value("waiting")) == (0, 0)
            for _ in range(2):
                assert (await server.ask(REPO)).status == 200
            size = sum((tmp_path / "origin" / name).stat().st_size for name in FILES)
            assert (await value("downloads_total"), await value("downloaded_bytes_total")) == (
                1,
                size,
            )
            assert (await value("wait_seconds_count"), await value("waiting")) == (1, 0)
            hub.gate(REPO, "hf_0thers")
            refusal = {"stage": "resolve", "error": "AccessDeniedError"}
            for number in (1, 2):
                assert (await server.ask(REPO)).status == 403
                assert await value("failures_total", **refusal) == number
            hub.repos[REPO].accepted = None
            os.truncate(tmp_path / "origin" / FILES[1], 1000)
            contents = {name: (tmp_path / "origin" / name).read_bytes() for name in FILES}
            hub.put(REPO, contents)
            assert (await server.ask(REPO)).status == 400
            torn = {"stage": "verify", "error": "AdapterFormatError"}
            assert await value("failures_total", **torn) == 1
            assert (await value("wait_seconds_count"), await value("waiting")) == (2, 0)


async def test_a_failed_adapter_leaves_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it was served, or fails in another way."""

    def lines() -> list[str]:
        return [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]

    write(tmp_path / "a", 1)
    os.truncate(tmp_path / "a" / FILES[1], 1000)
    async with running(local(tmp_path), Engine(Lora()), **ALWAYS) as (server, _):
        for _ in range(3):
            assert (await server.ask("a")).status == 400
        assert len(lines()) == 1
        assert lines()[0].startswith("the adapter 'a' cannot be used: ")
        assert "stage verify" in lines()[0]
        assert {each.name.partition(".")[0] for each in caplog.records} == {"vllm"}
        write(tmp_path / "a", 2)
        assert (await server.ask("a")).status == 200
        assert len(lines()) == 1
        shutil.rmtree(tmp_path / "a")
        for _ in range(3):
            assert (await server.ask("a")).status == 404
        assert len(lines()) == 2
        assert "no such folder" in lines()[1]


async def test_a_permission_that_was_withdrawn_ends_new_requests_alone(tmp_path: Path) -> None:
    engine = Engine(Lora())
    with HubStandIn() as hub:
        old = put(hub, tmp_path, 1)
        given, changed = of_hub(tmp_path, hub)
        async with running(given, engine, **changed) as (server, served):
            before = await begin(server, REPO)
            hub.gate(REPO, "hf_0thers")
            for _ in range(2):
                refused = await server.ask(REPO)
                assert refused.status == 403
                assert f"LORAX_ASYNC_ADAPTERS (NAME={REPO})" in refused.json["error"]["message"]
                assert "use_token" not in refused.json["error"]["message"]
            server.go_on.set()
            assert (await before).json["weights"] == [old]
            await leave(served, lambda: REPO not in server.models.lora_requests)
            assert (await server.ask(REPO)).status == 403
            assert "gated" in served.describe()[0]["last_error"]
            hub.repos[REPO].accepted = None
            assert (await server.ask(REPO)).json["weights"] == [old]


@pytest.mark.parametrize("stale", ["0", "1"])
async def test_a_source_that_is_away_serves_what_it_named_last_only_if_allowed(
    tmp_path: Path, stale: str
) -> None:
    away = False
    with HubStandIn(behave=lambda _: HubReply(503) if away else None) as hub:
        old = put(hub, tmp_path, 1)
        given, changed = of_hub(tmp_path, hub, ALLOW_STALE=stale)
        async with running(given, Engine(Lora()), **changed | {"timeout": 2.0}) as (server, _):
            assert (await server.ask(REPO)).status == 200
            away = True
            reply = await server.ask(REPO)
            if stale == "1":
                assert reply.json["weights"] == [old]
            else:
                assert reply.status == 503
                assert int(reply.headers["retry-after"]) > 0
            away = False
            assert (await server.ask(REPO)).json["weights"] == [old]


async def test_a_version_that_cannot_be_used_is_refused_until_another_comes(tmp_path: Path) -> None:
    engine = Engine(Lora())
    write(tmp_path / "a", 1)
    async with running(local(tmp_path), engine, **ALWAYS) as (server, served):
        await server.ask("a")
        write(tmp_path / "a", 2)
        os.truncate(tmp_path / "a" / FILES[1], 1000)
        for _ in range(2):
            refused = await server.ask("a")
            assert refused.status == 400
            assert "'a'" in refused.json["error"]["message"]
        shutil.rmtree(tmp_path / "a")
        assert (await server.ask("a")).status == 404
        await leave(served, lambda: "a" not in server.models.lora_requests)
        new = write(tmp_path / "a", 3)
        assert (await server.ask("a")).json["weights"] == [new]


async def test_an_operators_folder_stays_as_it_was_loaded(tmp_path: Path) -> None:
    """Until it is loaded again; then vLLM's prefix cache has another path for it."""
    engine, folder = Engine(Lora()), tmp_path / "own"
    old = write(folder, 1)
    load = {"lora_name": "named", "lora_path": str(folder)}
    async with running(local(tmp_path / ".."), engine, host_bytes=1, **ALWAYS) as (server, served):
        assert (await server.post("/v1/load_lora_adapter", **load)).status == 200
        first = await server.ask("named")
        assert first.json["weights"] == [old]
        new = write(folder, 2)
        engine.lora.cached.clear()
        assert (await server.ask("named")).json == first.json
        reply = await server.post("/v1/load_lora_adapter", **load, load_inplace=True)
        assert reply.status == 200
        second = await server.ask("named")
        assert second.json["weights"] == [new]
        assert second.json["number"] == first.json["number"]
        assert second.json["path"] != first.json["path"]
        await leave(served, lambda: ("lorax_forget", first.json["path"], False) in engine.calls)
        assert (await server.ask("named")).json == second.json


async def test_a_name_that_the_operator_gave_to_an_id_means_what_the_id_does(
    tmp_path: Path,
) -> None:
    engine = Engine(Lora())
    write(tmp_path / "a", 1)
    async with running(local(tmp_path), engine, **ALWAYS) as (server, served):
        load = {"lora_name": "named", "lora_path": "a"}
        assert (await server.post("/v1/load_lora_adapter", **load)).status == 200
        new = write(tmp_path / "a", 2)
        assert (await server.ask("named")).json["weights"] == [new]
        shutil.rmtree(tmp_path / "a")
        assert (await server.ask("named")).status == 404
        await served.refresh()
        assert "named" in server.models.lora_requests, "only the operator takes it away"


async def test_files_that_change_while_they_are_read_are_read_again(tmp_path: Path) -> None:
    """The config of one version is never served with the weights of another."""
    folder, digests = tmp_path / "a", [write(tmp_path / "a", 1)]

    class Changing(Lora):
        def _load_adapter(self, lora_request: Any) -> Any:
            if len(digests) < changes:
                digests.append(write(folder, 1 + len(digests)))
            return super()._load_adapter(lora_request)

    changes = 3
    async with running(local(tmp_path), Engine(Changing()), **ALWAYS) as (server, served):
        reply = await server.ask("a")
        assert reply.json["weights"] == digests[-1:]
        await served.refresh()
        assert served.counts["built"] == 3
        changes = 100
        write(folder, 50)
        reply = await server.ask("a")
        assert reply.status == 502
        assert "rename" in reply.json["error"]["message"]


async def test_bytes_that_were_overwritten_are_never_taken_for_those_before(tmp_path: Path) -> None:
    """An adapter that left memory is read again from the files that it was built from, or fails."""
    engine = Engine(Lora())
    write(tmp_path / "a", 1)
    async with running(local(tmp_path), engine, host_bytes=1, **ALWAYS) as (server, served):
        old = await begin(server, "a")
        weights = tmp_path / "a" / FILES[1]
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        engine.lora.cached.clear()
        await asyncio.sleep(0.05)
        await served.refresh()
        reply = await old
        assert reply.status == 503
        assert "overwritten" in reply.json["error"]["message"]
        server.go_on.set()
        assert (await server.ask("a")).json["weights"] == [digest(tmp_path / "a")]


async def test_the_end_waits_until_a_build_that_it_cancels_is_discarded(tmp_path: Path) -> None:
    lora, given = Gated(), local(tmp_path)
    engine = Engine(lora)
    write(tmp_path / "a", 1)
    async with running(given, engine, **ALWAYS) as (_, served):
        served.prefetch("a", given.find("a"))
        await until(lambda: lora.begun)
        await served.close()
        lora.may_load.release()
        assert "lorax_forget" in {call[0] for call in engine.calls}


def test_a_worker_activates_what_a_set_of_requests_leaves_out(tmp_path: Path) -> None:
    lora = Lora()
    built = BuiltWeights(lora, 1 << 20)
    vars(lora)["_load_adapter"] = built.load
    paths = [str(write_adapter(tmp_path / f"{n}", rank=1, seed=n, layers=1)) for n in range(2)]
    one, two = (LoRARequest("a", n, path) for n, path in enumerate(paths, 1))
    mapping = SimpleNamespace(index_mapping=(1, 1, 0, 2))
    lora.add_adapter(one)
    lora.add_adapter(two)
    assert len({one, two}) == 1
    lora.cached.clear()
    built.activate({one, two}, mapping)
    assert lora.cached.keys() == {1, 2}
