"""The fleet as one store knows it: its members, whose turn it is, and proofs of access."""

from __future__ import annotations

import hmac
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256

from lorax_async.errors import ConfigError, shorten
from lorax_async.types import require_bool, require_seconds
from lorax_async.urls import InvalidUrlError, parse_url

REST_SECONDS = 10.0
"""A member that failed is not asked for this long: its next one is, by all alike."""

MAX_ASKED = 2
"""Members that are asked for one adapter before its source."""

_TOKEN = re.compile(r"[\x21-\x7e]+")


class Peers:
    """The other replicas of a fleet, whose mirrors a store asks before an adapter's source.

    One object for each store. A peer's failure never fails a load: the source is asked.

    Parameters
    ----------
    token
        The secret that the members of the fleet share: printable ASCII without spaces.
    trust
        Take adapters whose source names no digest, too: nothing but the peer vouches for them. And
        serve members what object stores gave this machine, whose identity is no secret to prove.
    patience
        Seconds without a byte, a third of those without progress of the peer's own download, after
        which the next member or the source is asked.

    Attributes
    ----------
    taken, taken_bytes
        Adapters that came from peers.
    problems
        The last failure of each member, by its URL.

    Raises
    ------
    ConfigError
        An argument is malformed; when `members` is set, a URL is.
    """

    def __init__(self, token: str, *, trust: bool = False, patience: float = 5.0) -> None:
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise ConfigError("the token of Peers must be printable ASCII without spaces")
        require_bool("trust", trust)
        require_seconds("patience", patience)
        self.token, self.trust, self.patience = token, trust, patience
        self.taken = self.taken_bytes = 0
        self.problems: dict[str, str] = {}
        self.own_url: str | None = None
        """Set by the store's own mirror while it serves."""
        self._direct: Counter[str] = Counter()
        self._members: tuple[str, ...] = ()
        self._resting: dict[str, float] = {}

    @property
    def members(self) -> tuple[str, ...]:
        """The URLs of all mirrors, this store's own too, in any order. May be set at any time."""
        return self._members

    @members.setter
    def members(self, urls: Iterable[str]) -> None:
        self._members = tuple(dict.fromkeys(map(_member, urls)))
        for known in (self.problems, self._resting):
            for gone in known.keys() - set(self._members):
                del known[gone]

    def choose(self, adapter: str, tried: Collection[str]) -> str | None:
        """Return the next member to ask for an adapter; None where the source's turn has come.

        A member asks only those before itself in the order of `home_of`, which all have alike, so
        that no two wait for each other. `adapter` is a `RemoteKey.location`.
        """
        if len(tried) >= MAX_ASKED or adapter in self._direct:
            return None
        now = time.monotonic()
        able = [self.own_url] if self.own_url else []
        able += [
            url for url in self._members if url not in tried and self._resting.get(url, 0.0) <= now
        ]
        first = home_of(adapter, able)
        return None if first == self.own_url else first

    @contextmanager
    def fetches_directly(self, adapter: str) -> Iterator[None]:
        """Ask no member for it in the block: a member that has asked others waits for it."""
        self._direct[adapter] += 1
        try:
            yield
        finally:
            self._direct[adapter] -= 1
            if not self._direct[adapter]:
                del self._direct[adapter]

    def note_problem(self, member: str, problem: str, *, rest: bool) -> None:
        """Record a failure; ask the member nothing for a while if it has to `rest`."""
        if member in self._members:
            self.problems[member] = problem
            if rest:
                self._resting[member] = time.monotonic() + REST_SECONDS

    def proof(self, member: str, entry: str, scope: str) -> str:
        """Return what proves to a member that this one may have an entry under a scope's name.

        It proves nothing to other members, to which that one might show it.
        """
        text = f"{member} {entry} {scope}"
        return hmac.new(self.token.encode(), text.encode(), sha256).hexdigest()

    def is_member(self, authorization: str) -> bool:
        """Return whether a request's `Authorization` field has the fleet's token."""
        return is_same_secret(authorization, f"Bearer {self.token}")


def home_of(adapter: str, members: Iterable[str]) -> str | None:
    """Return the member that is first by rendezvous hashing; None if there is none.

    Each adapter, in all its versions, has an order of its own, which no other member changes.
    """

    def rank(url: str) -> bytes:
        return sha256(f"{adapter} {url}".encode("utf-8", "surrogatepass")).digest()

    return min(members, key=rank, default=None)


def is_same_secret(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _member(text: object) -> str:
    try:
        url = parse_url(text if isinstance(text, str) else "")
    except InvalidUrlError as error:
        raise ConfigError(f"member {shorten(str(text), 200)!r} of Peers: {error}") from None
    if url.target != "/":
        raise ConfigError(f"a member of Peers is http(s)://host[:port], not {url} with a path")
    return str(url.origin)
