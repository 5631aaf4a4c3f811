"""A fleet without Ray: the router's policy, and its simulation."""

import json
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from command_line import base

from lorax_async import LoaderConfig, StoreConfig
from lorax_async.engines.ray.ray_llm import model_downloader
from lorax_async.engines.ray.routing import ReplicaResidency, RoutingPolicy
from lorax_async.errors import ConfigError
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.server.ray_serve import build_app
from simulate_capacity import DeviceCapacity, main, simulate_fleet

FLEET = tuple(f"r{n}" for n in range(8))


def zipf(count: int, requests: int, seed: int = 0) -> list[str]:
    sums = list(accumulate(1 / (n + 1) for n in range(count)))
    ids = [f"org/{n}" for n in range(count)]
    return random.Random(seed).choices(ids, cum_weights=sums, k=requests)


def policy(
    fleet: Sequence[str] = FLEET, queue_of: Callable[[str], int | None] = lambda _: None
) -> RoutingPolicy:
    made = RoutingPolicy(queue_of)
    made.set_replicas(fleet)
    return made


def route(policy: RoutingPolicy, adapters: Sequence[str]) -> list[str]:
    """Send a request for each, and return where it went."""
    went = []
    for adapter in adapters:
        went += policy.choose(adapter)
        policy.sent(adapter, went[-1])
    return went


@pytest.mark.parametrize("count", [2, 3, 8, 50])
@pytest.mark.parametrize("seed", range(3))
def test_no_replica_gets_more_than_its_bound_and_adapters_stay(count: int, seed: int) -> None:
    fleet, asked = [f"r{n}" for n in range(count)], zipf(1000, 120 * count, seed)
    went = route(policy(fleet), asked)
    assert max(Counter(went).values()) <= 1.25 * len(went) / count
    homes: dict[str, set[str]] = {}
    moved = 0
    for adapter, replica in zip(asked, went, strict=True):
        known = homes.setdefault(adapter, {replica})
        moved += replica not in known
        known.add(replica)
    assert moved / len(went) < 0.05


def test_adapters_that_are_asked_for_alike_are_spread_though_their_hashes_are_not() -> None:
    router, asked = policy(), [f"org/{n}" for n in range(200)] * 10
    assert max(Counter(map(router.first_on_ring, asked)).values()) > 1.3 * len(asked) / 8
    went = route(router, asked)
    assert max(Counter(went).values()) <= 1.25 * len(asked) / 8
    assert len({*zip(asked, went, strict=True)}) < 1.1 * 200


def test_one_adapter_alone_spreads_over_the_whole_fleet() -> None:
    router = policy()
    went = Counter(route(router, ["org/hot"] * 1600))
    assert max(went.values()) <= 1.1 * 1600 / 8 + 1
    assert len(went) == 8
    rare = route(router, [f"org/{n}" for n in range(100)] * 2)
    assert rare[:100] == rare[100:]


def test_few_adapters_move_when_a_replica_joins_or_leaves() -> None:
    ids = [f"org/{n}" for n in range(4000)]
    routers = policy(FLEET), policy(FLEET[:-1])
    firsts = [[router.choose(id)[0] for id in ids] for router in routers]
    moved = [(old, new) for old, new in zip(*firsts, strict=True) if old != new]
    assert {old for old, _ in moved} == {"r7"}
    assert 0.06 < len(moved) / len(ids) < 0.2  # an eighth
    assert len({new for _, new in moved}) == 7


def test_what_replicas_publish_comes_before_the_ring() -> None:
    router, one, two, three = policy(), *policy().choose("org/a", 3)
    router.publish(two, ReplicaResidency({"org/a": "host"}))
    assert router.choose("org/a", 2) == [two, one]
    router.publish(three, ReplicaResidency({"org/a": "device"}))
    assert router.choose("org/a", 3) == [three, two, one]
    router.publish(two, ReplicaResidency({"org/a": "device"}))
    assert router.choose("org/a", 3) == [two, three, one]
    router.publish(three, ReplicaResidency({"org/b": "device"}))
    router.publish(two, ReplicaResidency({}))
    assert router.choose("org/a")[0] == one
    assert router.choose("org/b")[0] == three


def test_what_was_sent_counts_until_the_replica_has_published_twice() -> None:
    router, one, two, _ = policy(), *policy().choose("org/a", 3)
    router.sent("org/a", two)
    router.publish(two, ReplicaResidency({"org/other": "disk"}))  # perhaps collected before
    assert router.choose("org/a")[0] == two
    router.publish(two, ReplicaResidency({}))
    assert router.choose("org/a")[0] == one


def test_a_replica_that_is_gone_is_not_chosen_whatever_it_published() -> None:
    router, one = policy(), policy().choose("org/a")[0]
    router.sent("org/a", one)
    router.publish(one, ReplicaResidency({"org/a": "device"}))
    router.set_replicas(set(FLEET) - {one})
    router.publish(one, ReplicaResidency({"org/a": "device"}))  # late
    router.sent("org/a", one)
    assert one not in router.choose("org/a", 8)
    assert len(router.choose("org/a", 8)) == 7
    router.set_replicas([])
    assert router.choose("org/a") == []


def test_an_id_that_is_not_unicode_has_a_place_too() -> None:
    assert policy().choose("\ud800", 3) == policy().choose("\ud800", 3)


def test_replicas_without_room_are_the_last_choices() -> None:
    router = policy(FLEET[:2])
    route(router, ["org/hot"] * 100)
    choices = [router.choose("org/hot", 3) for _ in range(2)]
    assert [sorted(each) for each in choices] == [["r0", "r1"]] * 2


def test_a_request_that_went_elsewhere_counts_there() -> None:
    router = policy(("one", "other"))
    for _ in range(100):
        router.sent("org/a", "one")
        router.take_back("org/a", "one")
        router.sent("org/a", "other")
    assert {*route(router, [f"org/{n}" for n in range(50)])} == {"one"}


def test_a_long_queue_gives_a_request_to_the_second_choice() -> None:
    first, second, _ = policy().choose("org/a", 3)
    for queues, chosen in (((8, 2), first), ((9, 2), second), ((4, 0), first), ((5, 0), second)):
        router = policy(queue_of=dict(zip((first, second), queues, strict=True)).get)
        router.publish(first, ReplicaResidency({"org/a": "device"}))
        assert router.choose("org/a") == [chosen]


def test_a_new_adapter_avoids_loads_and_takes_free_memory() -> None:
    first, second, _ = policy().choose("org/a", 3)
    for one, other, chosen in (
        (ReplicaResidency({}, free_bytes=1), ReplicaResidency({}, free_bytes=2), first),
        (ReplicaResidency({}, free_bytes=0), ReplicaResidency({}, free_bytes=2), second),
        (ReplicaResidency({}, free_bytes=1, loading=5), ReplicaResidency({}, free_bytes=2), second),
        (ReplicaResidency({"org/a": "disk"}, loading=5), ReplicaResidency({}, free_bytes=2), first),
    ):
        router = policy()
        router.publish(first, one)
        router.publish(second, other)
        assert router.choose("org/a") == [chosen]


# -- the simulation -------------------------------------------------------------------------------


def test_a_fleet_of_one_is_one_device_and_one_disk() -> None:
    """Against caches of functools' kind, of 4 adapters on the device and 10 on the disk."""
    asked = [int(id[4:]) for id in zipf(40, 3000)]
    needs = [GroupSizes((64,), file_nbytes=100)] * 40
    names = [str(n) for n in range(40)]
    capacity = DeviceCapacity(4 * 64, 64, 16)
    for found in simulate_fleet(asked, names, needs, capacity, 1000, 1):
        hits, fetches = _lru(asked, 4), 3000 - _lru(asked, 10)
        assert (found.hits, found.fetches) == (hits, fetches)
        assert found.repeated == fetches - len(set(asked))
        assert found.fetched_bytes == 100 * fetches
        assert (found.shares["affinity"], found.busiest) == (1.0, 1.0)


def _lru(asked: Sequence[int], size: int) -> int:
    cache, hits = OrderedDict[int, None](), 0
    for each in asked:
        hits += each in cache
        cache[each] = cache.pop(each, None)
        if len(cache) > size:
            cache.popitem(last=False)
    return hits


def test_a_dead_replicas_adapters_are_fetched_again() -> None:
    """Every adapter is asked for once before the death, and once after: nothing is evicted."""
    asked = [*range(400), *range(400)]
    needs = [GroupSizes((64,), file_nbytes=1)] * 400
    names = [f"org/{n}" for n in range(400)]
    capacity = DeviceCapacity(1 << 20, 64, 1 << 10)
    for found in simulate_fleet(asked, names, needs, capacity, 1 << 20, 4, deaths=1):
        assert found.fetches == 400 + found.repeated
        if found.routing == "random":  # a quarter has it, more or less, and a quarter lost it
            assert 0.15 < found.affine / found.had < 0.35
            assert 260 < found.repeated < 360
        else:
            assert found.affine / found.had > (0.98 if found.routing == "adapters" else 0.7)
            # A quarter of 400. On the ring, the new one also takes adapters of the others.
            assert 60 < found.repeated < (140 if found.routing == "adapters" else 220)
        assert found.hits + found.refused + found.fetches == 800


def test_the_script_shows_each_routing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = base(tmp_path / "base", num_hidden_layers=2)
    words = ["--base", folder, "--adapters", "50x4", "--device-bytes", "1MiB"]
    words += ["--replicas", "3", "--requests", "600", "--deaths", "1"]
    assert main([*words, "--json"]) == 0
    adapters, hashed, chance = json.loads(capsys.readouterr().out)["routings"]
    assert adapters["busiest"] <= 1.25 < hashed["busiest"]
    assert adapters["affinity"] > 0.95 > chance["affinity"]
    assert main(words) == 0
    shown = [line.split()[:1] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in shown if line][-3:] == ["adapters", "hash", "random"]


# -- removed --------------------------------------------------------------------------------------


def test_what_replicas_had_for_each_other_says_that_it_is_gone(tmp_path: Path) -> None:
    def peers() -> None:
        from lorax_async.mirror import Peers  # type: ignore[attr-defined]  # noqa: F401

    def fleet() -> None:
        from lorax_async.engines.ray.replicas import join_fleet  # noqa: F401

    def build() -> None:
        build_app(tmp_path, LoaderConfig(), {}, fleet="chat")

    def download() -> None:
        model_downloader(StoreConfig(), fleet="chat")  # type: ignore[arg-type]

    for use in (peers, fleet, build, download):
        with pytest.raises(ConfigError, match=r"removed in 0\.3\.0.*caching proxy.*fleet\.md"):
            use()
