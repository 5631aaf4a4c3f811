"""Names that are looked up: who waits for which answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import cast

import pytest
from fault_server import meanwhile, until
from fetching import LoopbackOnly

from lorax_async.io.http.network import Endpoint, Lookups

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


class Names(LoopbackOnly):
    """A name service that answers when it is told to."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.resolved: list[str] = []

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        self.resolved.append(host)
        self.answer.wait(20)
        return [Endpoint(socket.AF_INET, "127.0.0.1", port)]


@pytest.fixture
def names() -> Iterator[Names]:
    network = Names()
    yield network
    network.answer.set()
    until(lambda: not [t for t in threading.enumerate() if t.name == "lorax-lookup"])


def test_a_name_is_given_up_in_time(names: Names) -> None:
    looks = []

    def look() -> None:
        looks.append(1)
        assert len(looks) < 9

    with pytest.raises(TimeoutError):
        Lookups(names).find("slow.example", 80, 0.1, look)


def test_two_who_ask_at_once_share_a_question(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the second comes while the thread for the first is being started."""
    lookups = Lookups(names)
    waits = threading.Event()
    start = threading.Thread.start
    started: list[threading.Thread] = []
    others: list[threading.Thread] = []

    def slowly(thread: threading.Thread) -> None:
        if thread.name == "lorax-lookup":
            started.append(thread)
            if len(started) == 1:
                others.append(meanwhile(lambda: lookups.find("slow.example", 80, 3, waits.set)))
        start(thread)

    def look() -> None:
        if waits.is_set():
            names.answer.set()

    monkeypatch.setattr(threading.Thread, "start", slowly)
    lookups.find("slow.example", 80, 3, look)
    others[0].join()
    assert names.resolved == ["slow.example"]


class Late:
    """A lock that threads of lookups get after everybody else."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        if threading.current_thread().name == "lorax-lookup":
            time.sleep(0.2)
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_an_answer_is_for_those_who_asked_before(names: Names) -> None:
    lookups = Lookups(names)
    lookups._lock = cast(threading.Lock, Late())
    names.answer.set()
    for _ in range(2):
        lookups.find("files.example", 80, 20, lambda: None)
    assert names.resolved == ["files.example"] * 2
