"""Who gets how many of a batch's rows and tokens, when not all of them fit."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 64
"""Tokens of a prompt that are worth a row; the last ones of it may be fewer."""


def share(
    wants: Sequence[Sequence[int]], max_tokens: int, max_sequences: int, *, least: int = LEAST
) -> Sequence[Sequence[int]]:
    """Tokens for the first sequences of each adapter.

    An adapter gets no less than another one but where it wants less: first rows, one each in turn,
    then the tokens that are left. What one does not want, others have. Where rows do not
    come out even, the more urgent adapter has one more.

    Parameters
    ----------
    wants
        The tokens that each sequence could use, by adapter. Adapters, and the sequences of each,
        by urgency: the first one always gets some.
    max_tokens, max_sequences
        Of the batch; at least 1.
    least
        Nobody's prompt is begun with fewer tokens, unless that is all of it, or of the batch.
    """
    if sum(map(len, wants)) <= max_sequences and sum(map(sum, wants)) <= max_tokens:
        return wants
    least = min(least, max_tokens)
    counts, left = _rows(wants, max_tokens, max_sequences, least)
    chosen = [each[:count] for each, count in zip(wants, counts, strict=True)]
    more = [sum([want - least for want in each if want > least]) for each in chosen]
    if not any(more):
        return chosen
    return [
        _spread(each, least, extra) for each, extra in zip(chosen, level(more, left), strict=True)
    ]


def _rows(
    wants: Sequence[Sequence[int]], tokens: int, rows: int, least: int
) -> tuple[list[int], int]:
    """How many sequences of each adapter, and how many tokens are left besides `least` for each."""
    counts = [0] * len(wants)
    in_turn = [number for number, each in enumerate(wants) if each]
    while in_turn:
        again = []
        for number in in_turn:
            each, count = wants[number], counts[number]
            needed = min(least, each[count])
            if not rows:
                break
            if needed > tokens:
                continue
            rows -= 1
            tokens -= needed
            counts[number] = count + 1
            if count + 1 < len(each):
                again.append(number)
        in_turn = again
    return counts, tokens


def level(wants: Sequence[int], room: int) -> list[int]:
    """Divide `room`: nobody gets more than it wants, nor more than another that wants more."""
    given = [0] * len(wants)
    ascending = sorted(range(len(wants)), key=lambda number: (wants[number], -number))
    for done, number in enumerate(ascending):
        given[number] = min(wants[number], room // (len(wants) - done))
        room -= given[number]
    return given


def _spread(wants: Sequence[int], least: int, extra: int) -> list[int]:
    """`least` for each, and the rest for the first ones."""
    given = []
    for want in wants:
        more = min(extra, max(0, want - least))
        given.append(min(want, least) + more)
        extra -= more
    return given
