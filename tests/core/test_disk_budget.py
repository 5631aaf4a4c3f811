"""The disk's budget: what it counts, and who goes first; expected orders worked out by hand."""

from __future__ import annotations

import pytest

from lorax_async.core.disk_budget import FETCH_FIXED_COST, DiskBudget, Stored
from lorax_async.core.policies import PolicyName, policy


def budget(
    entries: dict[str, Stored], partials: dict[str, Stored], name: PolicyName = "lru"
) -> DiskBudget:
    found = DiskBudget(100, policy(name))
    found.observe(entries, partials)
    return found


def test_what_is_on_disk_counts_whoever_put_it_there() -> None:
    found = budget({"a": Stored(30, 1)}, {"p": Stored(20, 1)})
    assert (found.used, found.free) == (50, 50)
    found.observe({"b": Stored(90, 1)}, {"p": Stored(21, 1)})
    assert (found.used, found.free) == (111, -11)


def test_partials_go_first_and_then_what_was_not_used_for_longest() -> None:
    found = budget(
        {"a": Stored(1, 20), "b": Stored(1, 10), "c": Stored(1, 30)},
        {"p": Stored(1, 99), "q": Stored(1, 98)},
    )
    assert list(found.victims()) == ["q", "p", "b", "a", "c"]


def test_a_use_counts_wherever_it_was() -> None:
    entries = {name: Stored(1, at) for at, name in enumerate("abc")}
    found = budget(entries, {})
    found.use("a", Stored(1, 10))
    assert list(found.victims()) == ["b", "c", "a"]
    found.observe(entries | {"a": Stored(1, 10)}, {})  # our own use again
    assert list(found.victims()) == ["b", "c", "a"]
    found.observe(entries | {"a": Stored(1, 10), "b": Stored(1, 11)}, {})  # another process's
    assert list(found.victims()) == ["c", "a", "b"]


def test_what_was_just_put_there_counts_from_then_on() -> None:
    found = budget({"a": Stored(1, 1)}, {}, "lfu")
    found.use("b", Stored(1, 5))
    found.use("b", Stored(1, 6))
    found.use("a", Stored(1, 7))
    assert list(found.victims()) == ["b", "a"]
    found.observe({"a": Stored(1, 7), "b": Stored(1, 6), "c": Stored(1, 9)}, {})
    assert list(found.victims()) == ["c", "b", "a"]


def test_what_is_gone_is_forgotten() -> None:
    found = budget({"a": Stored(10, 1), "b": Stored(20, 2)}, {"p": Stored(30, 1)})
    found.forget("a", evicted=True)
    found.forget("p", evicted=True)
    found.forget("nobody", evicted=True)
    assert (found.used, list(found.victims())) == (20, ["b"])
    found.observe({}, {})
    assert (found.used, list(found.victims())) == (0, [])


def test_another_one_of_the_same_name_is_new() -> None:
    found = budget({"a": Stored(10, 1), "b": Stored(10, 2)}, {})
    found.observe({"a": Stored(11, 3), "b": Stored(10, 2)}, {})
    assert (found.used, list(found.victims())) == (21, ["b", "a"])
    found.use("b", Stored(12, 4))
    assert (found.used, list(found.victims())) == (23, ["a", "b"])


def test_gdsf_weighs_what_a_fetch_costs() -> None:
    """Of equal use the large one goes: (32 MiB + n) / n falls with n."""
    assert FETCH_FIXED_COST == 33_554_432
    found = budget({"large": Stored(90, 2), "small": Stored(9, 1)}, {}, "gdsf")
    assert list(found.victims()) == ["large", "small"]


def test_an_empty_entry_is_an_entry() -> None:
    assert list(budget({"a": Stored(0, 1)}, {}, "gdsf").victims()) == ["a"]


@pytest.mark.parametrize(
    ("staying", "fits"),
    [((), 100), (("a",), 70), (("a", "p"), 50), (("a", "a", "nobody"), 70)],
)
def test_what_stays_bounds_what_can_fit(staying: tuple[str, ...], fits: int) -> None:
    found = budget({"a": Stored(30, 1), "b": Stored(40, 1)}, {"p": Stored(20, 1)})
    assert found.fits_beside(fits, staying)
    assert not found.fits_beside(fits + 1, staying)
