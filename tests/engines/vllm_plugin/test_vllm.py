"""The plug-in in vLLM's server: two slots, and room for two adapters in vLLM's own cache."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines.vllm_plugin.conftest import DEMO, HUGE, NAMES, SPOILT, World, counts, loaded, until
from vllm_stage import BASE, Arrival, Reply, VllmServer, watch_arrival

HOST_BYTES = "76MiB"
"""Room for the huge adapter and one small one."""


@pytest.fixture(scope="module")
def own(world: World) -> tuple[dict[str, str], Arrival]:
    """vLLM without the plug-in: the texts of local adapters, and what a hub's costs the others."""
    with world.start("own", plugin=False) as server:
        for name in NAMES:
            path = str(world.folders[name])
            assert (
                server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path).status == 200
            )
        texts = {name: server.text(name) for name in (BASE, *NAMES)}
        load = {"lora_name": "huge", "lora_path": HUGE}
        arrival = watch_arrival(
            server, lambda: server.post("/v1/load_lora_adapter", **load), tokens=200
        )
    return texts, arrival


@pytest.fixture(scope="module")
def server(world: World, own: object) -> Iterator[VllmServer]:
    with world.start("plugin", plugin=True, LORAX_ASYNC_HOST_BYTES=HOST_BYTES) as server:
        yield server


@pytest.fixture(autouse=True)
def alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, the server answers afterwards, and the base's text is the same."""
    yield
    server, (texts, _) = request.getfixturevalue("server"), request.getfixturevalue("own")
    assert server.text(BASE) == texts[BASE]


def forget(server: VllmServer) -> None:
    """Unload all adapters, and wait until the engine has let them go."""
    for model in server.get("/v1/models").json["data"][1:]:
        server.post("/v1/unload_lora_adapter", lora_name=model["id"])
    until(lambda: not any(loaded(server)))


def test_texts_equal_those_of_local_adapters(
    server: VllmServer, world: World, own: tuple[dict[str, str], Arrival]
) -> None:
    """Six adapters over two slots and two places in vLLM's cache, whole and streamed."""
    texts, _ = own
    for name in NAMES:
        assert server.text(world.url(name)) == texts[name]
    for name in reversed(NAMES):  # each has left vLLM's cache
        assert server.stream(world.url(name)).text.startswith(texts[name])
        assert server.text(name) == texts[name]  # by its name in a folder
    assert server.text("alias") == texts["shout"]
    events = counts(server)
    assert events["built"] >= 2 * len(NAMES)
    assert events["hits"] >= 2 * len(NAMES)
    # In one batch, roundings differ: the trained adapters are not near a tie.
    with ThreadPoolExecutor(len(DEMO)) as pool:
        assert list(pool.map(server.text, DEMO)) == [texts[name] for name in DEMO]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("wrong-base", 400, "wrong shapes for this base"),
        ("deeper", 400, "the base has no such module"),
        ("large-rank", 400, "its rank is 136, and this server takes up to 128"),
        ("cut", 400, "the file ends 1,000 bytes before"),
        ("absent", 404, "adapter_config.json"),
        (SPOILT, 502, "does not have the promised sha256 digest"),
    ],
)
def test_a_wrong_adapter_is_refused_before_the_engine_sees_it(
    server: VllmServer, world: World, name: str, status: int, message: str
) -> None:
    before = loaded(server)
    model = name if name == SPOILT else world.url(name)
    for reply in (server.chat(model), server.chat(model)):
        assert reply.status == status
        assert message in reply.json["error"]["message"]
    assert loaded(server) == before
    assert message in server.adapters()[model]["last_error"]


def test_a_hundred_unknown_names_are_404(server: VllmServer, world: World) -> None:
    names = [f"nobody-{n}" for n in range(50)] + [world.url(f"nobody/{n}") for n in range(50)]
    with ThreadPoolExecutor(16) as pool:
        replies: list[Reply] = list(pool.map(server.chat, names))
    assert {reply.status for reply in replies} == {404}


def test_the_folder_of_an_adapter_that_left_vllms_cache_may_vanish(
    server: VllmServer, world: World, own: tuple[dict[str, str], Arrival]
) -> None:
    """From our memory while it has it, and from the open files after that."""
    texts, _ = own
    forget(server)
    for name in NAMES:
        assert server.text(world.url(name)) == texts[name]
    for name in NAMES:
        shutil.rmtree(world.entry(name, "plugin"))
    before = counts(server)
    for name in NAMES:
        assert server.text(world.url(name)) == texts[name]
    during = counts(server)
    assert during["hits"] - before["hits"] >= len(NAMES) - 2
    assert during["reopened"] == before["reopened"]
    assert server.chat(HUGE, tokens=1).status == 200  # drives the others out of our memory
    for name in NAMES[:3]:
        assert server.text(world.url(name)) == texts[name]
    assert counts(server)["reopened"] - during["reopened"] >= 2
    forget(server)
    assert server.text(world.url("red")) == texts["red"]  # fetched again


def test_requests_of_an_adapter_that_cannot_be_read_again_fail_alone(
    server: VllmServer, world: World, own: tuple[dict[str, str], Arrival]
) -> None:
    texts, _ = own
    forget(server)
    assert server.text(world.url("red")) == texts["red"]
    os.truncate(world.entry("red", "plugin") / "adapter_model.safetensors", 100)
    assert server.text(world.url("pirate")) == texts["pirate"]
    assert server.chat(HUGE, tokens=1).status == 200
    assert server.text(world.url("shout")) == texts["shout"]
    reply = server.chat(world.url("red"))
    assert reply.status == 503
    assert "could not be read again" in reply.json["error"]["message"]
    assert server.text(world.url("green")) == texts["green"]


def test_unloading_frees_the_engine_when_the_last_request_ends(
    server: VllmServer, world: World, own: tuple[dict[str, str], Arrival]
) -> None:
    texts, _ = own
    forget(server)
    assert server.text("pirate") == texts["pirate"]
    streams: list[str] = []
    reader = threading.Thread(
        target=lambda: streams.append(server.stream("pirate", tokens=60).text)
    )
    reader.start()
    time.sleep(1.0)
    assert server.post("/v1/unload_lora_adapter", lora_name="pirate").status == 200
    assert server.post("/v1/unload_lora_adapter", lora_name="pirate").status == 404
    elsewhere = {"lora_name": "elsewhere", "lora_path": "s3://bucket/a/"}
    assert server.post("/v1/load_lora_adapter", **elsewhere).status == 404
    reader.join()
    assert streams[0].startswith(texts["pirate"][:20])
    until(lambda: not any(loaded(server)))
    assert "pirate" not in server.adapters()


def test_a_folder_that_was_replaced_is_served_as_it_is_now(
    server: VllmServer, world: World, own: tuple[dict[str, str], Arrival]
) -> None:
    """Requests that have begun keep the version before, in the same steps as the new one."""
    texts, _ = own
    forget(server)
    folder, new = world.folders["red"].parent / "changing", world.root / "new"
    shutil.copytree(world.folders["pirate"], folder)
    shutil.copytree(world.folders["shout"], new)
    assert server.text("changing") == texts["pirate"]
    streams: list[str] = []
    reader = threading.Thread(
        target=lambda: streams.append(server.stream("changing", tokens=200).text)
    )
    reader.start()
    time.sleep(1.0)
    folder.rename(world.root / "before")
    new.rename(folder)
    time.sleep(1.1)
    assert server.text("changing") == texts["shout"]
    assert reader.is_alive()
    assert len(loaded(server)[0]) == 2
    reader.join()
    assert streams[0].startswith(texts["pirate"][:20])
    until(lambda: len(loaded(server)[0]) == 1)
    assert server.text("changing") == texts["shout"]
    shutil.rmtree(folder)
    time.sleep(1.1)
    reply = server.chat("changing")
    assert reply.status == 404
    assert "'changing'" in reply.json["error"]["message"]
    until(lambda: not any(loaded(server)))


def test_an_adapter_may_be_unloaded_while_it_loads(server: VllmServer, world: World) -> None:
    forget(server)
    load = {"lora_name": "late", "lora_path": world.url("huge")}
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(server.post, "/v1/load_lora_adapter", **load)
        time.sleep(0.2)
        unloaded = server.post("/v1/unload_lora_adapter", lora_name="late")
        assert unloaded.status in {200, 404}
        assert loading.result().status == 200
    server.post("/v1/unload_lora_adapter", lora_name="late")
    until(lambda: not any(loaded(server)))


def test_an_origin_that_dies_in_mid_download_is_503_with_a_time(
    server: VllmServer, world: World
) -> None:
    url = world.dying.url("huge/")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, url)
        until(lambda: world.dying.counts()["bytes"] > 1 << 20)
        world.dying.__exit__()
        replies = [asked.result(), server.chat(url)]
    for reply in replies:
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) > 0
        assert world.dying.url("")[:-1] in reply.json["error"]["message"]


def test_prefetch_brings_weights_to_host_memory(
    server: VllmServer, world: World, own: tuple[dict[str, str], Arrival]
) -> None:
    texts, _ = own
    forget(server)
    before = counts(server)
    assert server.post("/v1/lorax/prefetch", adapters=["green", "s3://bucket/a/"]).status == 404
    assert server.post("/v1/lorax/prefetch", adapters=["blue"]).status == 202
    until(lambda: server.adapters().get("blue", {}).get("tier") == "host")
    assert not any(loaded(server))
    assert server.text("blue") == texts["blue"]
    assert counts(server)["built"] == before["built"] + 1
    row = server.adapters()["blue"]
    assert row["tier"] == "device"
    assert row["bytes"] > 0
    metrics = server.get("/metrics").body
    assert 'vllm:lora_adapter_loaded{adapter_name="blue",engine="0",level="gpu"} 1.0' in metrics
    ours = dict(each.rsplit(" ", 1) for each in metrics.splitlines() if each.startswith("lorax_"))
    assert {"lorax_downloads_total", "lorax_downloaded_bytes_total"} <= ours.keys()
    assert float(ours["lorax_wait_seconds_count"]) >= 1
    assert float(ours["lorax_waiting"]) == 0


def test_an_adapter_loaded_in_place_is_loaded_once(
    server: VllmServer, world: World, own: tuple[dict[str, str], Arrival]
) -> None:
    """Once more, its folder has other files; and no step loads it again."""
    texts, _ = own
    forget(server)
    folder = world.root / "edited"
    load = {"lora_name": "edited", "lora_path": str(folder), "load_inplace": True}
    for name in ("red", "blue"):
        shutil.copytree(world.folders[name], folder, dirs_exist_ok=True)
        assert server.post("/v1/load_lora_adapter", **load).status == 200
    before = counts(server)
    assert server.text("edited") == texts["blue"]
    assert counts(server) == before


def test_an_adapter_from_the_hub_stalls_nobody(
    server: VllmServer, own: tuple[dict[str, str], Arrival]
) -> None:
    """78 MB at 8 MB/s per connection: vLLM's loop waits for all of it, and ours for a slot alone.

    `bench_vllm.py` measures how long.
    """
    _, theirs = own
    forget(server)
    before = counts(server)
    load = {"lora_name": "huge", "lora_path": HUGE}
    replies: list[Reply] = []
    ours = watch_arrival(
        server, lambda: replies.append(server.post("/v1/load_lora_adapter", **load)), tokens=80
    )
    assert replies[0].status == 200
    after = counts(server)
    changed = {
        event: after[event] - before[event] for event in after if after[event] != before[event]
    }
    assert changed == {"built": 1, "hits": 1}
    assert theirs.busy_gap > 78 / 8 / 2  # nothing can make it shorter
    assert ours.busy_gap < theirs.busy_gap
