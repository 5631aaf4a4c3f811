"""What goes wrong on the way to the hub, and who is not disturbed by it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from answering_server import Asked, Reply
from fetching import Anywhere
from hub_stand_in import HubStandIn
from hub_world import ADAPTER, QUICK, REPO, TOKEN, locating, refused, tells_no_secret
from huggingface_hub import constants, utils
from huggingface_hub.errors import OIDCError

from common import Run, until
from lorax_async.adapter import AdapterRef
from lorax_async.errors import AccessDeniedError, FetchError, FetchTimeoutError
from lorax_async.io.http.settings import PublicOnly
from lorax_async.io.remote.hub import HubLocator

pytestmark = pytest.mark.usefixtures("hub_client", "nothing_left")


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


def test_a_hub_where_nobody_listens(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = refused(run, f"http://127.0.0.1:{port}", AdapterRef(REPO, token=TOKEN))
    assert (type(error), error.retryable) == (FetchError, True)
    assert f"127.0.0.1:{port} failed (ECONNREFUSED)" in error.problem


def test_a_hub_that_hangs_up(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def hang_up() -> None:
            while not ended.is_set():
                client, _ = listener.accept()
                client.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            error = refused(run, endpoint, AdapterRef(REPO, token=TOKEN))
        finally:
            ended.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join(10)
    assert (type(error), error.retryable) == (FetchError, True)


async def test_a_silent_hub_holds_nobody_but_who_asked() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with locating(endpoint, timeout=0.4) as locator:
            asking = asyncio.ensure_future(locator.locate(AdapterRef(REPO, token=TOKEN)))
            ticks = 0
            while not asking.done():
                await asyncio.sleep(0.01)
                ticks += 1
            with pytest.raises(FetchTimeoutError, match="did not answer in time") as caught:
                await asking
            tells_no_secret(caught.value)
            assert (
                ticks >= 6
            )  # in more than a second; held, it would have ticked between attempts only


async def test_who_does_not_wait_any_more(hub: HubStandIn) -> None:
    """A cancelled question leaves a thread, which ends with its answer, and nothing else."""
    hub.put(REPO, ADAPTER)
    go_on = threading.Event()

    def wait(asked: Asked) -> Reply | None:
        assert go_on.wait(30)
        return None

    hub.behave = wait
    with ThreadPoolExecutor(1) as threads:
        locator = HubLocator(
            endpoint=hub.endpoint, rules=Anywhere(), threads=threads, timeout=30, retries=QUICK
        )
        asking = asyncio.ensure_future(locator.locate(AdapterRef(REPO)))
        await until(lambda: hub.asked)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go_on.set()
    assert len(hub.asked) == 1, "the second question was never put"


async def test_an_endpoint_that_the_operator_did_not_allow(hub: HubStandIn) -> None:
    hub.put(REPO, ADAPTER)
    said = pytest.raises(AccessDeniedError, match="not allowed; allow it explicitly")
    with locating(hub, rules=PublicOnly()) as locator, said:
        await locator.locate(AdapterRef(REPO, token=TOKEN))
    assert not hub.asked


def test_where_huggingface_hub_was_told_to_be_offline(
    hub: HubStandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(run, hub, AdapterRef(REPO))
    assert (type(error), error.retryable) == (FetchError, False)
    assert "HF_HUB_OFFLINE" in error.problem
    assert not hub.asked


def test_a_machine_whose_own_token_cannot_be_had(
    hub: HubStandIn, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reason to ask without one; who brings his own is not concerned."""
    commit = hub.put(REPO, ADAPTER)
    lent = AdapterRef(REPO, use_token=True)
    (tmp_path / "token").write_bytes(b"hf_\xff\xfe")
    error = refused(run, hub, lent)
    assert type(error) is AccessDeniedError
    assert "log in anew" in error.problem

    def fail(**_: object) -> dict[str, str]:
        raise OIDCError(f"no id token but {TOKEN}")

    with monkeypatch.context() as patched:
        patched.setattr(utils, "build_hf_headers", fail)
        assert "OIDCError" in refused(run, hub, lent).problem
        with locating(hub) as locator:
            assert locator.own_scope() is None
    assert not hub.asked
    with locating(hub) as locator:
        for ref in (AdapterRef(REPO, token=TOKEN), AdapterRef(REPO)):
            assert run(locator.locate(ref)).version == commit


async def test_waiting_between_attempts_can_be_ended(hub: HubStandIn) -> None:
    hub.behave = lambda asked: Reply(503, {"Retry-After": "30"})
    with locating(hub, retries=replace(QUICK, obeyed=60)) as locator:
        asking = asyncio.ensure_future(locator.locate(AdapterRef(REPO)))
        await until(lambda: len(hub.asked) == 2)
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert len(hub.asked) == 2
