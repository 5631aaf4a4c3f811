"""Requests by Zipf's law to replicas on real Ray Serve: counts of what came from where."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
import tiny

from engines.ray_serve.conftest import (
    ADAPTERS,
    MANY,
    REQUESTS,
    REVALIDATE,
    World,
    affinity,
    busiest,
    name_of,
    until,
    zipf,
)
from engines.ray_serve.run_picture import draw

pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]  # Ray's own


NAMES = {
    "ours2": "AdapterRouter",
    "default": "Ray's default",
    "multiplexed": "@serve.multiplexed",
    "hash": "ConsistentHashRouter",
}


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}")


@pytest.mark.parametrize("replicas", [2, 3])
def test_behind_the_proxy_the_origin_sends_each_adapter_once(world: World, replicas: int) -> None:
    from ray import serve

    app = f"ours{replicas}"
    world.handle(app)
    answers = world.play(app, zipf(world.ids(app)), serve.get_app_handle(app))
    assert len({answer.adapter for answer in answers}) == ADAPTERS
    assert world.are_right(answers)
    assert world.fetches(app) == ADAPTERS
    assert affinity(answers) >= 0.95
    assert busiest(answers, replicas) <= 1.25
    fetched = len({(answer.adapter, answer.pid) for answer in answers})
    say(f"{app}: affinity {affinity(answers):.2f}, busiest {busiest(answers, replicas):.2f},")
    say(f"{fetched} downloads by replicas, {world.fetches(app)} from the origin")


@pytest.mark.parametrize("replicas", [2, 3])
def test_the_router_alone_spares_the_origin(world: World, replicas: int) -> None:
    """Where there are many adapters, few of them are so popular that they have to spread."""
    from ray import serve

    app, fetched = f"ours{replicas}", world.fetches("many")
    world.handle(app)
    asked = zipf(world.ids("many", proxied=False), 3 * MANY)
    answers = world.play(app, asked, serve.get_app_handle(app))
    ratio = (world.fetches("many") - fetched) / len(set(asked))
    say(f"{app}: {ratio:.3f} fetches for each of {len(set(asked))} adapters")
    assert world.are_right(answers)
    assert affinity(answers) >= 0.95
    assert busiest(answers, replicas) <= 1.25
    assert ratio <= 1.15


def test_beside_other_routers(world: World, request: pytest.FixtureRequest) -> None:
    """Counts of two replicas each, without the proxy."""
    from ray import serve

    rows, runs = [], {}
    for app in ("ours2", "default", "multiplexed", "hash"):
        world.handle(app)
        prefix = "unproxied" if app == "ours2" else app
        ids = zipf(world.ids(prefix, proxied=False), seed=2)
        answers = world.play(app, ids, serve.get_app_handle(app))
        times = sorted(answer.seconds for answer in answers)
        row = affinity(answers), world.fetches(prefix), busiest(answers, 2)
        rows.append(row)
        counts = f"affinity {row[0]:.2f}, {row[1]} origin fetches, busiest {row[2]:.2f} × mean"
        runs[f"{NAMES[app]}: {counts}"] = [(name_of(a.adapter), a.pid) for a in answers]
        say(f"{app}: {counts}, {1000 * median(times):.0f} to {1000 * times[-1]:.0f} ms")
    folder = request.config.getoption("pictures")
    if folder is not None:
        (folder / "fleet-run.svg").write_text(draw(runs, sorted(world.digests)[:ADAPTERS]))
    (affine, fetched, most), default, *others = rows
    assert (affine >= 0.95, most <= 1.25) == (True, True)
    assert ADAPTERS <= fetched < default[1]
    assert default[1] > 1.5 * ADAPTERS
    assert min(fetches for _, fetches, _ in others) >= ADAPTERS


def test_a_new_router_finds_what_replicas_have(world: World) -> None:
    from ray import serve

    ids, app = world.ids("ours2"), "ours2"
    homes = Counter((answer.adapter, answer.pid) for answer in world.play(app, ids * 2))
    fetched = world.fetches(app)
    time.sleep(5)  # the replicas publish ten times, on an idle machine
    new = serve.get_app_handle(app)
    answers = world.play(app, ids, new)
    assert sum((answer.adapter, answer.pid) in homes for answer in answers) >= 0.95 * ADAPTERS
    assert world.fetches(app) == fetched == ADAPTERS


def test_an_adapter_changes_at_the_origin(world: World, tmp_path: Path) -> None:
    """And back: to the old bytes, which are a new version."""
    app, name = "ours3", "a001"
    (id,) = (each for each in world.ids(app) if name_of(each) == name)
    world.play(app, [id] * 12)
    old, fetched = world.digests[name], world.fetches(app)
    before = old
    for seed in (99, 1):
        now = world.put(app, name, tiny.write(tmp_path / str(seed), seed, rank=200))
        seen: list[str] = []
        time.sleep(REVALIDATE)

        def changed(now: str = now, seen: list[str] = seen) -> bool:
            seen.extend(answer.digest for answer in world.play(app, [id] * 12))
            return set(seen[-12:]) == {now}

        until(changed)
        assert set(seen) <= {before, now}
        fetched, before = fetched + 1, now
        assert world.fetches(app) == fetched
    assert now == old


def test_a_replica_is_killed_in_mid_load(world: World) -> None:
    """What it alone had, others download from the proxy."""
    app = "ours3"
    ids = world.ids(app)
    world.play(app, ids)
    homes = {answer.adapter: answer.pid for answer in world.play(app, ids)}
    victim = Counter(homes.values()).most_common(1)[0][0]
    fetched, world.lost = world.fetches(app), 0
    killer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
    killer.start()
    answers = world.play(app, zipf(ids, seed=3))
    killer.join()
    assert len(answers) == REQUESTS
    assert world.are_right(answers)
    assert victim in {answer.pid for answer in answers}
    assert world.fetches(app) == fetched
    assert world.lost <= 6 * 2  # those in flight there, and Ray may take a moment to notice
    say(f"killed: {world.lost} sent again")
