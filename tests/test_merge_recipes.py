"""Which merges there are, when two are the same, and how the others are refused."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from lorax_async import AdapterKey, AdapterRef, InvalidAdapterIdError, Merge, UsageError
from lorax_async.adapter import FileIdentity, MergedKey, as_ref, text_of
from lorax_async.identity import PartId
from lorax_async.merge import MAX_PARTS


def key(name: str, *numbers: int) -> AdapterKey:
    files = tuple(FileIdentity(0, n, 10, n, n) for n in numbers)
    return AdapterKey(f"/adapters/{name}", files)


TWO: list[PartId] = ["one", Path("two")]
MERGED = MergedKey.of(Merge("linear", TWO, [1, 1]), [key("one", 1, 2), key("two", 3, 4)])


_HUGE = 10**5000  # more digits than Python spells out


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            ("sum", TWO, [1, 1]),
            "strategy is one of linear, ties, dare_linear, dare_ties, not 'sum'",
        ),
        ((["linear"], TWO, [1, 1]), "strategy is one of"),
        (("linear", "one", [1]), "refs is a list of one adapter or more, not 'one'"),
        (("linear", Path("one"), [1]), "refs is a list"),
        (("linear", [], []), "refs is a list"),
        (("linear", {"one"}, [1]), "refs is a list"),
        (("linear", ["a"] * 65, [1] * 65), "64 parts at most, not 65"),
        (
            ("linear", ["one", 2], [1, 1]),
            r"refs\[1\]: an adapter id is a str or a pathlib.Path, not int",
        ),
        (("linear", ["one", Merge("linear", TWO, [1, 1])], [1, 1]), r"refs\[1\] is a merge itself"),
        (("linear", [MERGED], [1]), r"refs\[0\] is a merge itself"),
        (("linear", TWO, [1]), "one number for each of 2 refs"),
        (("linear", TWO, [1, 1, 1]), "one number for each of 2 refs"),
        (("linear", TWO, 1), "one number for each of 2 refs"),
        (("linear", TWO, None), "one number for each of 2 refs"),
        (("linear", TWO, [1, nan]), r"weights\[1\] is a finite number that float32 holds, not nan"),
        (("linear", TWO, [-inf, 1]), r"weights\[0\] is a finite number"),
        (("linear", TWO, [1, 1e39]), r"weights\[1\] is a finite number"),
        (("linear", TWO, [10**400, 1]), r"weights\[0\] is a finite number"),
        (("linear", TWO, [1, _HUGE]), r"weights\[1\] is a finite number"),
        (("linear", TWO, [1, True]), r"weights\[1\] is a finite number"),
        (("linear", TWO, [1, "1"]), r"weights\[1\] is a finite number"),
        (("linear", TWO, [1, 1], 0.5), "'linear' keeps every weight; leave the density out"),
        (("linear", TWO, [1, 1], None, "frequency"), "'linear' elects no sign"),
        (("dare_linear", TWO, [1, 1], 0.5, "frequency"), "'dare_linear' elects no sign"),
        (
            ("ties", TWO, [1, 1], 0.5, "most"),
            "majority_sign is one of total, frequency, not 'most'",
        ),
        (("ties", TWO, [1, 1]), "'ties' needs a density above 0 and up to 1, not None"),
        (("ties", TWO, [1, 1], 0), "'ties' needs a density above 0 and up to 1, not 0"),
        (("dare_ties", TWO, [1, 1], -0.1), "'dare_ties' needs a density"),
        (("dare_linear", TWO, [1, 1], 1.01), "'dare_linear' needs a density"),
        (("ties", TWO, [1, 1], _HUGE), "'ties' needs a density"),
        (("ties", TWO, [1, 1], nan), "'ties' needs a density"),
        (("ties", TWO, [1, 1], True), "'ties' needs a density"),
        (("ties", TWO, [1, 1], "0.5"), "'ties' needs a density"),
        (("ties", ["one"], [1], 0.5), "'ties' merges two adapters or more; one is for 'linear'"),
        (("linear", TWO, [1, 1], None, "total", 1), "'linear' draws nothing at random"),
        (("ties", TWO, [1, 1], 0.5, "total", 1), "'ties' draws nothing at random"),
        (("dare_ties", TWO, [1, 1], 0.5, "total", -1), r"a seed is a whole number from 0 to"),
        (("dare_ties", TWO, [1, 1], 0.5, "total", 1 << 63), "a seed is a whole number"),
        (("dare_ties", TWO, [1, 1], 0.5, "total", _HUGE), "a seed is a whole number"),
        (("dare_ties", TWO, [1, 1], 0.5, "total", 1.0), "a seed is a whole number"),
        (("dare_ties", TWO, [1, 1], 0.5, "total", True), "a seed is a whole number"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value)[:40],
)
def test_no_such_merge(given: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Merge(*given)


def test_a_part_that_is_no_id_keeps_its_kind_of_error() -> None:
    with pytest.raises(InvalidAdapterIdError, match=r"refs\[0\]: an adapter id"):
        Merge("linear", [None], [1])  # type: ignore[list-item]


def test_what_is_given_is_kept_as_tuples() -> None:
    merge = Merge("dare_ties", TWO, [1, -2], density=1, majority_sign="frequency", seed=3)
    assert merge.parts == (AdapterRef("one"), AdapterRef(Path("two")))
    assert merge.weights == (1.0, -2.0)
    assert merge.density == 1.0
    assert merge.text == (
        "dare_ties(1.0 * one, -2.0 * two, density=1.0, majority_sign=frequency, seed=3)"
    )


def test_as_many_parts_as_are_accepted() -> None:
    assert len(Merge("linear", ["a"] * MAX_PARTS, [0.5] * MAX_PARTS).parts) == MAX_PARTS


def test_a_merge_is_an_id_by_value() -> None:
    merge = Merge("ties", TWO, [1, 0.5], density=0.5)
    again = Merge("ties", tuple(TWO), (1.0, 0.5), 0.5)
    assert merge == again
    assert hash(merge) == hash(again)
    assert as_ref(merge) is merge
    assert text_of(merge) == "ties(1.0 * one, 0.5 * two, density=0.5, majority_sign=total)"
    with pytest.raises(UsageError, match="a Merge says source"):
        as_ref(merge, token="mine")


def test_tokens_are_not_shown() -> None:
    merge = Merge("linear", [AdapterRef("one", token="secret")], [1])
    assert "secret" not in repr(merge) + merge.text


OTHERS = [
    Merge("linear", ["two", "one"], [1, 0.5]),
    Merge("linear", ["one", "two"], [1, 0.25]),
    Merge("ties", ["one", "two"], [1, 0.5], density=0.5),
    Merge("ties", ["one", "two"], [1, 0.5], density=0.25),
    Merge("ties", ["one", "two"], [1, 0.5], density=0.5, majority_sign="frequency"),
    Merge("dare_ties", ["one", "two"], [1, 0.5], density=0.5),
    Merge("dare_ties", ["one", "two"], [1, 0.5], density=0.5, seed=1),
]


def test_keys_are_equal_where_the_bytes_would_be() -> None:
    """Whatever the parts were called, and not by their texts alone."""
    parts = {"one": key("one", 1, 2), "two": key("two", 3, 4)}
    merge = Merge("linear", ["one", "two"], [1, 0.5])
    first = MergedKey.of(merge, list(parts.values()))
    by_path = Merge("linear", [Path("somewhere/one"), AdapterRef("two", token="t")], [1, 0.5])
    second = MergedKey.of(by_path, list(parts.values()))
    assert first == second
    assert hash(first) == hash(second)
    assert first != AdapterKey(first.location, first.files)
    saved_again = MergedKey.of(merge, [key("one", 1, 2), key("two", 3, 5)])
    assert (saved_again.location, saved_again != first) == (first.location, True)
    keys = {
        MergedKey.of(m, [parts[p.text] for p in m.parts if isinstance(p, AdapterRef)])
        for m in OTHERS
    }
    assert len(keys | {first}) == len(OTHERS) + 1


def test_a_key_says_what_it_is() -> None:
    assert str(MERGED) == "linear(1.0 * /adapters/one, 1.0 * /adapters/two)"
    assert MERGED.files == key("one", 1, 2, 3, 4).files
