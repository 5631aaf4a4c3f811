"""Digests by which a file is known, fed in order while its bytes arrive in any."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, get_args

from lorax_async.errors import UsageError

DigestKind = Literal["sha256", "git-sha1", "transport"]
"""By whose word: the source's sha256, its git blob sha1, or nobody's: our own sha256."""

_SHAPES = {"sha256": "[0-9a-f]{64}", "git-sha1": "[0-9a-f]{40}", "transport": "[0-9a-f]{64}"}


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file's bytes come to. `value` in lower-case hexadecimal digits.

    Raises `UsageError` for what is no such digest.
    """

    kind: DigestKind
    value: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(DigestKind):
            raise UsageError(f"a digest is one of {', '.join(_SHAPES)}, not {self.kind!r}")
        if not isinstance(self.value, str) or not re.fullmatch(_SHAPES[self.kind], self.value):
            raise UsageError(
                f"{self.value!r} is no {self.kind} digest in lower-case hexadecimal digits"
            )


class FileHash:
    """The digest of a file of `nbytes` as far as it was fed."""

    __slots__ = ("_hash", "_kind", "done")

    def __init__(self, kind: DigestKind, nbytes: int) -> None:
        self._kind: DigestKind = kind
        self._hash = hashlib.sha1(usedforsecurity=False) if kind == "git-sha1" else hashlib.sha256()
        if kind == "git-sha1":
            # git's name of a blob: its own header comes first.
            self._hash.update(b"blob %d\0" % nbytes)
        self.done = 0

    def feed(self, content: memoryview) -> None:
        """The bytes that follow those fed so far."""
        self._hash.update(content)
        self.done += content.nbytes

    def digest(self) -> Digest:
        return Digest(self._kind, self._hash.hexdigest())
