"""What is odd and yet right, or wrong for a while, is overcome; and nobody else notices."""

from __future__ import annotations

import asyncio
import http.server
import threading
from functools import partial
from pathlib import Path

import pytest
from fault_world import Fault, FaultyWorld, assert_at_rest, at, in_turn, loads_right, over
from faults import (
    in_an_hour,
    more_than_said,
    reset,
    status,
    tagged,
    truncated,
    whole_in_place_of_range,
    whole_without_length,
)

from common import Run
from lorax_async.io.cache.upkeep import ls

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

PASSING: dict[str, Fault] = {
    "config truncated once": at("config", truncated, 1),
    "config 500 twice": at("config", status("500 No"), 2),
    "config 503 for a second": at("config", status("503 No", "Retry-After: 1"), 1),
    "config more than said": at("config", more_than_said),
    "config without length": at("config", whole_without_length),
    "header truncated once": at("header", truncated, 1),
    "header reset once": at("header", reset, 1),
    "header more than said": at("header", more_than_said),
    "body truncated twice": at("body", truncated, 2),
    "body reset once": at("body", reset, 1),
    "body 429 now": at("body", status("429 No", "Retry-After: 0"), 2),
    "body 503 for a second": at("body", status("503 No", "Retry-After: 1"), 1),
    "body 500 twice": at("body", status("500 No"), 2),
    "body more than said": at("body", more_than_said),
    "ranges, and then no ranges": at("body", whole_in_place_of_range),
}


async def comes_right(world: FaultyWorld, bad: Path, good: Path) -> None:
    async with over(world) as loader:
        await asyncio.gather(*(loads_right(loader, world, each) for each in (bad, good, bad)))
        await assert_at_rest(loader, world)
        assert len(ls(world.cache)) == 2


@pytest.mark.parametrize(("run", "name"), in_turn(PASSING), indirect=["run"])
def test_what_passes_is_overcome(run: Run, tmp_path: Path, name: str) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = PASSING[name]
        run(comes_right(world, bad, good))


def test_bytes_that_came_before_an_end_are_not_asked_for_again(run: Run, tmp_path: Path) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = at("body", truncated, 1)
        run(comes_right(world, bad, good))
        spans = world.spans_of("bad")
        assert len(set(spans)) == len(spans)
        rests = [(a, c) for a, b in spans for c, d in spans if a < c and b == d]
        assert len(rests) == 1, "one piece was gone on with"


@pytest.mark.parametrize("promises", [True, False])
def test_a_server_without_ranges_sends_the_whole(run: Run, tmp_path: Path, promises: bool) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        world.locator.promises = promises
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = whole_in_place_of_range
        run(comes_right(world, bad, good))


def test_pythons_own_server_has_no_ranges(run: Run, tmp_path: Path) -> None:
    """It answers 200 to a range, and has no ETag."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    serving = partial(Quiet, directory=str(tmp_path))
    with (
        FaultyWorld(tmp_path / "cache", tmp_path) as world,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), serving) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            folders = [world.stock(name, seed) for seed, name in enumerate(("bad", "good"))]
            place = f"http://127.0.0.1:{server.server_address[1]}"
            world.locator.elsewhere = dict.fromkeys(["bad", "good"], place)
            run(comes_right(world, *folders))
            assert not world.server.asked
        finally:
            world.engine.close()  # it waits for whoever is connected
            server.shutdown()
            thread.join(10)


# -- what a server calls its bytes ----------------------------------------------------------------

ETAGS = {
    "quotes inside": '""a" or "b"',
    "no quotes": "../../x",
    "a path": '"../../../../etc/passwd"',
    "8 KB": '"' + "x" * 8_000 + '"',
    "not ASCII": '"\xe9\xff\xa0"',
    "another request": '"%0d%0aX-Injected: 1"',
    "tabs": '"a\tb"',
    "empty": '""',
    "weak": 'W/"v1"',
    "a list": '"a", "b"',
    "a star": "*",
}


@pytest.mark.parametrize(("run", "name"), in_turn(ETAGS), indirect=["run"])
def test_etags_are_sent_back_and_name_nothing(run: Run, tmp_path: Path, name: str) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path / "adapters") as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = tagged(ETAGS[name])
        run(comes_right(world, bad, good))
        assert {each.name for each in tmp_path.iterdir()} == {"cache", "adapters"}
        sent = {each.fields.get("if-range") for each in world.asked_of("bad")} - {None}
        assert sent == (set() if name == "weak" else {ETAGS[name]})
        assert all("x-injected" not in each.fields for each in world.server.asked)


def test_an_etag_cannot_end_its_line(run: Run, tmp_path: Path) -> None:
    """On the wire CR and LF end the field: what follows is a field of the response, or malformed."""
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = tagged('"a"\r\nX-More: "b"')
        run(comes_right(world, bad, good))
        assert all(len(each.raw.split("x-more")) == 1 for each in world.server.asked)


def test_a_wait_that_is_too_long_is_not_waited(run: Run, tmp_path: Path) -> None:
    """Once is enough: nobody is asked again before the hour is over."""
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        world.stock("bad")
        world.faults["bad"] = at("config", in_an_hour())

        async def body() -> None:
            async with over(world) as loader:
                with pytest.raises(Exception, match="503"):
                    await loader.load(world.ref("bad"))

        run(body())
        assert sum(asked.target.endswith(".json") for asked in world.server.asked) == 1
