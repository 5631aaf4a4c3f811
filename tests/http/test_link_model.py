"""Downloads over links in virtual time, beside lower bounds and simple clients."""

import pytest
from simulated_link import HEAD, FixedDownload, LinkConditions, PlannedDownload, simulate

from lorax_async.http.client import LinkModels
from lorax_async.http.link_model import LinkModel
from lorax_async.urls import Origin

QUARTERS = (0.25, 0.5, 0.75)
SHAPED = 256 << 10
"""The burst of a shaper."""


def best_seconds(conditions: LinkConditions, nbytes: int, layers: int) -> float:
    """The time of the best of 1, 4 and 16 fixed connections, with the header's."""
    found = []
    for connections in (1, 4, 16):
        fixed = FixedDownload(nbytes, layers, connections=connections)
        simulate(conditions, fixed)
        found.append(fixed.finished)
    return min(found)


def planned(
    conditions: LinkConditions, nbytes: int, layers: int, links: LinkModel | None = None
) -> PlannedDownload:
    download = PlannedDownload(nbytes, layers, links=links)
    simulate(conditions, download)
    return download


SHARED = {
    "bucket, 0.75 s": (LinkConditions(0.0, shared=14.7e6), 11e6),
    "bucket, 0.75 s, 10 ms": (LinkConditions(0.01, shared=14.7e6), 11e6),
    "bucket, 3 s": (LinkConditions(0.0, shared=3.67e6), 11e6),
    "bucket, 3 s, 10 ms": (LinkConditions(0.01, shared=3.67e6), 11e6),
    **{
        f"{mbit} Mbit/s, {delay * 1e3:g} ms": (
            LinkConditions(delay, shared=mbit * 125e3, burst=SHAPED),
            11e6,
        )
        for mbit in (40, 120, 400)
        for delay in (0.001, 0.01)
    },
    "1 Gbit/s, 10 ms": (LinkConditions(0.01, shared=125e6, burst=SHAPED), 84e6),
    "1 Gbit/s, 10 ms, large": (LinkConditions(0.01, shared=125e6, burst=SHAPED), 336e6),
}


@pytest.mark.parametrize("name", SHARED)
def test_layers_come_in_order_where_connections_share_a_rate(name: str) -> None:
    """And no later than with the best number of fixed connections."""
    conditions, nbytes = SHARED[name]
    layers = 24 if nbytes < 50e6 else 32
    download = planned(conditions, int(nbytes), layers)
    assert download.finished <= 1.05 * best_seconds(conditions, int(nbytes), layers)
    assert max(map(download.late, QUARTERS)) <= 0.10
    assert download.most < 16, "it never needs all connections"


@pytest.mark.parametrize("nbytes", [84_000_000, 336_000_000])
def test_connections_with_a_rate_of_their_own_are_all_used(nbytes: int) -> None:
    conditions = LinkConditions(0.010, own=20e6)
    download = planned(conditions, nbytes, 32)
    bound = 2 * conditions.delay + HEAD / 20e6 + (nbytes - HEAD) / (16 * 20e6)
    assert download.finished <= 1.08 * bound
    assert (download.times[0] - download.header) / download.seconds <= 0.08
    assert download.most == 16


@pytest.mark.parametrize("delay", [0.002, 0.010, 0.030])
@pytest.mark.parametrize("own", [5e6, 20e6, 50e6, 80e6])
@pytest.mark.parametrize("burst", [32 << 10, 64 << 10])
def test_connections_found_too_few_at_first_are_tried_again(
    own: float, delay: float, burst: int
) -> None:
    """The first bytes of each come in a burst, so a link like this looks like a shared one."""
    conditions, links = LinkConditions(delay, own=own, burst=burst), LinkModel()
    best = best_seconds(conditions, 84_000_000, 32)
    first, *others = [planned(conditions, 84_000_000, 32, links).finished for _ in range(3)]
    assert first <= 2.5 * best
    assert max(others) <= 1.25 * best


def test_an_origin_that_receives_is_not_forgotten_for_others() -> None:
    now = 0.0
    links = LinkModels(lambda: now)
    busy = Origin("https", "busy.example", 443)
    reception = links.began(busy, 0.25)
    for n in range(1000):
        other = Origin("https", f"{n}.example", 443)
        links.ended(other, links.began(other, 0.01))
    for _ in range(9):
        now += 0.1
        links.received(busy, reception, 100_000)
    links.ended(busy, reception)
    assert links.estimate(busy).delay == 0.25
    never_seen = Origin("https", "other.example", 443)
    assert links.estimate(Origin("https", "0.example", 443)) == links.estimate(never_seen)
