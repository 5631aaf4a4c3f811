"""How far the bytes of an adapter were checked against somebody's word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

VerificationKind = Literal["sha256", "git-sha1", "transport", "none"]
"""Whose word: the source's (or the caller's) sha256, git's name of the content, nobody's but of the
transport (lengths and validators: the digest is our own, and checked from then on), or none."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of checking an adapter's weights.

    `digest`, in lower-case hexadecimal, is what they come to; None where they were not hashed. Of
    weights in several files it is the sha256 of the lines "digest  file name", as `sha256sum` has
    them, in the order of the names.
    """

    kind: VerificationKind
    digest: str | None = None

    @property
    def vouched(self) -> bool:
        """Whether the bytes have the digest that the source or the caller promised.

        If not, nobody vouched for them: a source that changes a file without another ETag, size or
        date is not noticed.
        """
        return self.kind in {"sha256", "git-sha1"}


UNCHECKED = Verification("none")

_BY_STRENGTH: tuple[VerificationKind, ...] = ("none", "transport", "git-sha1", "sha256")


def weakest(several: Iterable[Verification]) -> Verification:
    """What is true of all of them together; no digest, for they are several files."""
    kinds = [each.kind for each in several]
    return Verification(min(kinds, key=_BY_STRENGTH.index))
