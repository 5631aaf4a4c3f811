"""Answers that lead elsewhere: nothing goes where it may not, and no token goes along."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import test_http_trust
from fault_server import FaultServer
from fault_world import FaultyWorld, assert_at_rest, at, in_turn, loads_right, over
from faults import redirected, status
from fetching import PretendNetwork, engine
from test_http_trust import tls_server

from common import Run
from lorax_async import AccessDeniedError, FetchError
from lorax_async.adapter import AdapterRef

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

certificate = test_http_trust.certificate

PUBLIC = "93.184.216.34"
SECRET = "hf_swordfish"

PRIVATE = {
    "10.0.0.8": "http://10.0.0.8/x",
    "192.168.1.1": "http://192.168.1.1:8080/x",
    "169.254.169.254": "http://169.254.169.254/latest/meta-data",
    "100.64.0.1": "http://shared.example/x",
    "fd00::1": "http://[fd00::1]/x",
    "::ffff:10.0.0.8": "http://[::ffff:10.0.0.8]/x",
    "0.0.0.0": "http://0.0.0.0/x",
}


class Pretence:
    """A network in which only the world's server, and what is named, can be connected to."""

    def __init__(self) -> None:
        self.network = PretendNetwork(names={"127.0.0.1": ["127.0.0.1"]})

    def world(self, tmp_path: Path, ca_bundle: str | None = None) -> FaultyWorld:
        http = engine(network=self.network, ca_bundle=ca_bundle)
        world = FaultyWorld(tmp_path / "cache", tmp_path, http=http)
        self.network.ports["127.0.0.1"] = world.server.port
        return world


async def denied(world: FaultyWorld, good: Path, words: str, ref: AdapterRef | None = None) -> str:
    """What is told of the refusal, in all that can be shown of it; `good` loads meanwhile."""
    async with over(world) as loader:
        healthy = asyncio.create_task(loads_right(loader, world, good))
        with pytest.raises(FetchError, match=words) as caught:
            await loader.load(ref or world.ref("bad"))
        assert type(caught.value) is AccessDeniedError
        assert (caught.value.stage, caught.value.retryable) == ("fetch", False)
        await healthy
        await assert_at_rest(loader, world)
        return f"{caught.value} {caught.value!r} {caught.value.story} {caught.value.key!r}"


PLACES = [(part, address) for part in ("config", "header", "body") for address in PRIVATE]


@pytest.mark.parametrize(("run", "case"), in_turn(PLACES), indirect=["run"])
def test_nobody_is_led_to_a_private_address(
    run: Run, tmp_path: Path, case: tuple[str, str]
) -> None:
    part, address = case
    pretence = Pretence()
    for host in (address, "shared.example"):
        pretence.network.names[host] = [address]
    with pretence.world(tmp_path) as world:
        world.stock("bad")
        good = world.stock("good", 1)
        world.faults["bad"] = at(part, redirected(PRIVATE[address]))
        told = run(denied(world, good, "not public"))
        assert "meta-data" not in told
        assert set(pretence.network.connected) == {"127.0.0.1"}


@pytest.mark.parametrize("part", ["config", "header", "body"])
def test_https_does_not_become_http(run: Run, tmp_path: Path, certificate: Path, part: str) -> None:
    pretence = Pretence()
    pretence.network.names["files.example"] = [PUBLIC]
    with (
        tls_server(certificate) as secure,
        pretence.world(tmp_path, str(certificate)) as world,
        FaultServer(b"") as plain,
    ):
        pretence.network.ports[PUBLIC] = secure.port
        world.stock("bad")
        good = world.stock("good", 1)
        world.locator.elsewhere["bad"] = "https://files.example"
        fault = at(part, redirected(plain.url("/x")))
        secure.behave = lambda asked, client: fault(world, asked, client)
        run(denied(world, good, "from https to http"))
        assert not plain.clients
        assert secure.asked


def test_a_token_goes_to_its_own_origin_only(run: Run, tmp_path: Path) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path) as world, FaultServer(b"") as store:
        bad, good = world.stock("bad"), world.stock("good", 1)
        store.behave = world.well
        world.locator.there["bad"].token = SECRET

        def away(_: FaultyWorld, asked: object, client: object) -> None:
            place = store.url(asked.target)  # type: ignore[attr-defined]
            redirected(place)(world, asked, client)  # type: ignore[arg-type]

        world.faults["bad"] = away

        async def body() -> None:
            async with over(world) as loader:
                mine = AdapterRef("bad", source="hub", token=SECRET)
                (await loader.load(mine)).release()
                await loads_right(loader, world, good)
                await assert_at_rest(loader, world)

        run(body())
        assert bad.exists()
        assert all(SECRET in each.fields["authorization"] for each in world.asked_of("bad"))
        assert all("authorization" not in each.fields for each in world.asked_of("good"))
        assert len(store.asked) >= 3
        assert not any(SECRET in each.raw for each in store.asked)


@pytest.mark.parametrize("line", ["401 No", "403 No"])
@pytest.mark.parametrize("part", ["config", "header", "body"])
def test_no_token_is_told(run: Run, tmp_path: Path, part: str, line: str) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        world.stock("bad")
        good = world.stock("good", 1)
        world.faults["bad"] = at(part, status(line))
        mine = AdapterRef("bad", source="hub", token=SECRET)
        told = run(denied(world, good, line[:3], mine))
        assert SECRET not in told
        assert SECRET not in repr(mine)
