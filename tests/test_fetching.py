"""How far a fetch is, while it is on its way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fault_server import Asked, Client

import tiny
from common import Run
from lorax_async.adapter import AdapterRef
from lorax_async.commands.fetching import AT_ONCE, Fetched, fetch_all, place_by
from lorax_async.config import Allow, LoaderConfig
from lorax_async.ids.parsing import parsed
from lorax_async.io.remote.elsewhere import elsewhere_of
from served import NAMES, contents, files_of, right, serving

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left")

BEGINNING = 256 << 10
"""What comes with the header."""


def test_bytes_are_counted_as_they_land(run: Run, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", rank=256)
    files, gate = files_of({"one": folder}), threading.Event()
    size = len(contents(folder)[NAMES[1]])
    assert size > BEGINNING
    seen: list[tuple[str, int, int | None]] = []

    def show(_: int, row: Fetched) -> None:
        seen.append((row.state, *row.landed))
        if seen[-1] == ("fetching", BEGINNING, size):
            gate.set()

    with serving(files) as server:

        def behave(asked: Asked, client: Client) -> None:
            if asked.span is not None and asked.span[0] > 0:
                assert gate.wait(30)
            right(files)(asked, client)

        server.behave = behave
        _fetch(run, tmp_path, [server.url("/one/")], server.port, show)
    assert gate.is_set(), seen
    assert seen[0] == ("waiting", 0, None)
    assert seen[-1] == ("fetched", size, size)


def test_a_few_at_a_time(run: Run, tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(2 * AT_ONCE)]
    folder = tiny.write(tmp_path / "a")
    files, gate = files_of(dict.fromkeys(names, folder)), threading.Event()
    states: dict[int, str] = {}
    asking: list[int] = []

    def show(number: int, row: Fetched) -> None:
        """Nobody is answered before it has been seen twice who asks."""
        states[number] = row.state
        if number == len(names) - 1:
            asking.append(list(states.values()).count("asking"))
            if asking[-2:] == [max(asking)] * 2 and asking[-1]:
                gate.set()

    with serving(files) as server:

        def behave(asked: Asked, client: Client) -> None:
            assert gate.wait(30)
            right(files)(asked, client)

        server.behave = behave
        urls = [server.url(f"/{name}/") for name in names]
        rows = _fetch(run, tmp_path, urls, server.port, show)
    assert {row.state for row in rows} == {"fetched"}
    assert len({row.place for row in rows}) == len(names)
    assert max(asking) == AT_ONCE


def _fetch(run: Run, tmp_path: Path, urls: list[str], port: int, show: object) -> list[Fetched]:
    assert callable(show)
    config = LoaderConfig(cache_dir=tmp_path / "cache", allow=(Allow("http", "127.0.0.1", port),))
    rows = [Fetched(parsed(AdapterRef(url))) for url in urls]
    with elsewhere_of(config) as elsewhere:
        run(fetch_all(elsewhere, rows, place_by(config), show))
    return rows
