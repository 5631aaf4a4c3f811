"""Runs of tokens that use one adapter: found, joined, and counted over the last tokens only.

An adapter is named by LoRAX's adapter index, an integer that a server gives it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise, repeat
from operator import itemgetter

from torch import Tensor

from lorax_async.errors import UsageError

Integers = Tensor | Sequence[int]
"""A tensor `[n]` of integers on any device, or as many plain ones."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Run i is the rows `bounds[i]` to `bounds[i + 1]`, not included, of adapter `indices[i]`.

    A run may be empty, and neighbours may share an adapter.
    """

    bounds: tuple[int, ...] = (0,)
    indices: tuple[int, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.bounds))

    def by_row(self) -> list[int]:
        """The adapter index of each row."""
        return list(chain.from_iterable(map(repeat, self.indices, self.lengths)))

    def over(self, heads: Integers) -> Runs:
        """The same runs over the rows `heads` only, the tokens whose logits are wanted.

        A run without one of them stays, empty. Raises UsageError unless the heads are in ascending
        order (in any other, a run's rows would not be neighbours) and rows of the batch.
        """
        rows = to_list("prefill_head_indices", heads)
        if rows != sorted(rows) or (rows and not 0 <= rows[0] <= rows[-1] < self.bounds[-1]):
            raise UsageError(
                f"expected prefill_head_indices in ascending order and from 0 to "
                f"{self.bounds[-1] - 1}, got {rows}; give each request's last token, in the order "
                "of the batch"
            )
        return Runs(tuple(bisect_left(rows, bound) for bound in self.bounds), self.indices)


def find_segments(adapter_indices: Integers) -> tuple[list[int], list[int]]:
    """Bounds and adapter indices of the longest runs of tokens with one adapter.

    `adapter_indices` `[tokens]` is the adapter of each token; a tensor on an accelerator is
    copied once. Segment i is the tokens `bounds[i]` to `bounds[i + 1]`, not included; there is one
    bound more than there are segments. Raises UsageError for anything but a row of integers.
    """
    tokens = to_list("adapter_indices", adapter_indices)
    changes = [at for at, (before, after) in enumerate(pairwise(tokens), 1) if before != after]
    starts = [0, *changes] if tokens else []
    return [*starts, len(tokens)], [tokens[start] for start in starts]


def concat_segments(
    batches: Iterable[tuple[Integers, Sequence[int]]],
) -> tuple[list[int], list[int]]:
    """The segments of batches put one after another, each given as `find_segments` gives it.

    Neighbours of one adapter are joined, so that the result is what `find_segments` finds in all
    tokens together; a batch may be empty. Raises UsageError for bounds that do not fit.
    """
    runs = [runs_of(bounds, indices) for bounds, indices in batches]
    pieces = ((i, n) for run in runs for i, n in zip(run.indices, run.lengths, strict=True) if n)
    joined_bounds, joined = [0], list[int]()
    for index, same in groupby(pieces, key=itemgetter(0)):
        joined.append(index)
        joined_bounds.append(joined_bounds[-1] + sum(length for _, length in same))
    return joined_bounds, joined


def runs_of(bounds: Integers, segment_indices: Integers) -> Runs:
    """Checked: raises UsageError unless bounds are 0, …, ascending, one more than indices."""
    ends, indices = to_list("adapter_segments", bounds), to_list("segment_indices", segment_indices)
    if len(ends) != len(indices) + 1 or ends[0] != 0 or ends != sorted(ends):
        raise UsageError(
            f"expected adapter_segments of {len(indices) + 1} bounds from 0 in ascending order "
            f"for {len(indices)} segments, got {ends}; use find_segments"
        )
    return Runs(tuple(ends), tuple(indices))


def to_list(name: str, values: Integers) -> list[int]:
    """`values` on the host. Raises UsageError unless they are a row of integers."""
    if not isinstance(values, Tensor):
        return list(values)
    fractions = values.is_floating_point() or values.is_complex()
    if values.dim() != 1 or (fractions and values.numel()):
        raise UsageError(
            f"expected {name} to be a row of integers, got {list(values.shape)} in {values.dtype}"
        )
    on_host: list[int] = values.tolist()
    return on_host
