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
from fault_server import Asked, Client, FaultServer, answer

import tiny
from engines.ray_serve.conftest import ADAPTERS, REQUESTS, World, affinity, busiest, until, zipf
from engines.ray_serve.run_picture import draw

pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]  # Ray's own


NAMES = {
    "ours2": "AdapterRouter, with peers",
    "default": "Ray's default",
    "multiplexed": "@serve.multiplexed",
    "hash": "ConsistentHashRouter",
}


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}")


@pytest.mark.parametrize("replicas", [2, 3])
def test_the_origin_is_asked_once_for_each_adapter(world: World, replicas: int) -> None:
    from ray import serve

    app = f"ours{replicas}"
    world.handle(app)
    answers = world.play(app, zipf(world.ids(app)), serve.get_app_handle(app))
    assert len({answer.adapter for answer in answers}) == ADAPTERS
    assert all(answer.digest == world.digests[answer.adapter[-4:-1]] for answer in answers)
    assert world.fetches(app) == ADAPTERS
    assert affinity(answers) >= 0.95
    assert busiest(answers, replicas) <= 1.25
    say(f"{app}: affinity {affinity(answers):.2f}, busiest {busiest(answers, replicas):.2f}")


def test_beside_other_routers(world: World, request: pytest.FixtureRequest) -> None:
    """Counts of two replicas each; without peers, which only ours has here."""
    from ray import serve

    rows, runs = [], {}
    for app in ("ours2", "default", "multiplexed", "hash"):
        world.handle(app)
        answers = world.play(app, zipf(world.ids(app), seed=2), serve.get_app_handle(app))
        times = sorted(answer.seconds for answer in answers)
        row = affinity(answers), world.fetches(app), busiest(answers, 2)
        rows.append(row)
        counts = f"affinity {row[0]:.2f}, {row[1]} origin fetches, busiest {row[2]:.2f} × mean"
        runs[f"{NAMES[app]}: {counts}"] = [(a.adapter[-4:-1], a.pid) for a in answers]
        say(f"{app}: {counts}, {1000 * median(times):.0f} to {1000 * times[-1]:.0f} ms")
    folder = request.config.getoption("pictures")
    if folder is not None:
        (folder / "fleet-run.svg").write_text(draw(runs, sorted(world.digests)))
    (affine, fetched, most), default, *others = rows
    assert (affine >= 0.95, fetched, most <= 1.25) == (True, ADAPTERS, True)
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
    app, name = "ours3", "a01"
    id = world.origin.url(f"{app}/{name}/")
    old, fetched = world.digests[name], world.fetches(app)
    new = world.put(app, name, tiny.write(tmp_path / name, 99, rank=200))
    seen: list[str] = []

    def changed() -> bool:
        seen.extend(answer.digest for answer in world.play(app, [id] * 12))
        return set(seen[-12:]) == {new}

    until(changed)
    assert set(seen) <= {old, new}
    assert world.fetches(app) == fetched + 1
    world.put(app, name, tiny.write(tmp_path / "old", 1, rank=200))


def test_a_peer_that_sends_wrong_bytes_is_left_for_the_origin(world: World) -> None:
    """It is in the directory like any mirror; the hub names the digests of what it has."""
    import ray

    def lie(asked: Asked, client: Client) -> None:
        target = asked.target.partition("?")[0]
        body = b"x" * 600_000 if "model" in target else b'{"state": "ready"}'
        answer(asked, client, body)

    ids = [f"org/{name}" for name in world.digests]
    directory = ray.get_actor("lorax-mirrors-ours2", namespace="lorax_async")
    with FaultServer(b"", lie) as false:
        url = f"http://{false.netloc}"
        until(lambda: len(ray.get(directory.report.remote(url))) == 3)
        time.sleep(3)  # the replicas meet it
        answers = world.play("ours2", ids)
    assert [a.digest for a in answers] == [world.digests[a.adapter[4:]] for a in answers]
    assert any(url in answer.problems for answer in answers)
    assert false.asked


def test_a_replica_is_killed_in_mid_load(world: World) -> None:
    """All that it had is on no other replica, or comes from one: at most that is fetched again."""
    app = "ours3"
    ids = world.ids(app)
    world.play(app, ids)
    homes = {answer.adapter: answer.pid for answer in world.play(app, ids)}
    (victim, had) = Counter(homes.values()).most_common(1)[0]
    fetched, world.lost = world.fetches(app), 0
    killer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
    killer.start()
    answers = world.play(app, zipf(ids, seed=3))
    killer.join()
    assert len(answers) == REQUESTS
    assert all(answer.digest == world.digests[answer.adapter[-4:-1]] for answer in answers)
    assert victim in {answer.pid for answer in answers}
    assert world.fetches(app) - fetched <= had + 3
    assert world.lost <= 6 * 2  # those in flight there, and Ray may take a moment to notice
    say(f"killed: {world.lost} sent again, {world.fetches(app) - fetched} of {had} fetched again")


def test_the_directory_of_mirrors_may_die(world: World) -> None:
    """The replicas make a new one, and know each other again."""
    import ray

    ray.kill(ray.get_actor("lorax-mirrors-ours2", namespace="lorax_async"))
    ids = world.ids("ours2")
    assert len(world.play("ours2", ids)) == len(ids)

    def met() -> bool:
        try:
            actor = ray.get_actor("lorax-mirrors-ours2", namespace="lorax_async")
            return len(ray.get(actor.report.remote("http://127.0.0.1:9"))) == 3
        except (ValueError, ray.exceptions.RayActorError):
            return False

    until(met)
