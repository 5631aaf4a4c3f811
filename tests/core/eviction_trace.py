"""One trace of requests, and what three eviction policies make of it, worked out by hand.

Popularity falls off as in Zipf's law (c first, d and f more towards the end), and from request 16
to 26 ids that come only once (u to z) go through. A request that finds its adapter uses it; else
the policy's first go until the adapter fits, and it is loaded. All sizes are multiples of one
layer group's, so that in an arena that is cut into such groups no hole is ever too small.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorax_async.core.policies import PolicyName

MIB = 1 << 20
GROUP_NBYTES = 2 * MIB
DEVICE_NBYTES = 26 * MIB
SLOTS = 4
OPENING_COST = 4 * MIB
"""Part of a reload's cost beside the adapter's bytes; from 0 to 15 MiB the hits are the same."""

_MIB = {"a": 4, "b": 8, "c": 2, "d": 16, "e": 4, "f": 8}
_MIB_OF_SCAN = {"u": 8, "v": 4, "w": 2, "x": 16, "y": 8, "z": 4}
SIZES = {name: mib * MIB for name, mib in (_MIB | _MIB_OF_SCAN).items()}

REQUESTS = tuple("cccbacdbeccfecedueybzcwcvfxadddccfecddefccdcfedc")

_HITS: dict[PolicyName, str] = {
    "lru": "1 2 5 10 12 13 14 23 29 30 32 35 37 38 41 43 44",
    "lfu": "1 2 5 9 10 12 13 14 17 21 23 29 30 31 32 34 35 37 38 40 41 43 45 47",
    "gdsf": "1 2 5 9 10 12 13 14 17 21 23 29 30 31 32 35 36 37 38 40 41 42 43 44 46 47",
}
HITS = {name: frozenset(map(int, numbers.split())) for name, numbers in _HITS.items()}
"""The numbers of the requests, from 0 on, that find their adapter."""

RELOADED: dict[PolicyName, int] = {"lru": 146 * MIB, "lfu": 132 * MIB, "gdsf": 84 * MIB}
"""Bytes loaded again, the first load of each adapter not counted."""

# A row is a request (number, adapter, size in MiB), then for LRU, LFU and GDSF what it did ("hit",
# "+" loaded into free room, "-bf" loaded after b and f had gone) and the cache after it, the first
# to go first. With LFU behind each adapter its uses since it was loaded, with GDSF its priority
# L + uses x (size + 4) / size as of its last use; the last column is L, the priority of the
# last that went. Equals stand in the order of their last use. Full is 26 MiB or 4 adapters.
WORKING = """
 0 c2  | +    c           | +    c1              | +    c3 | 0
 1 c2  | hit  c           | hit  c2              | hit  c6 | 0
 2 c2  | hit  c           | hit  c3              | hit  c9 | 0
 3 b8  | +    c b         | +    b1 c3           | +    b1.5 c9 | 0
 4 a4  | +    c b a       | +    b1 a1 c3        | +    b1.5 a2 c9 | 0
 5 c2  | hit  b a c       | hit  b1 a1 c4        | hit  b1.5 a2 c12 | 0
 6 d16 | -b   a c d       | -b   a1 d1 c4        | -b   a2 d2.75 c12 | 1.5
 7 b8  | -a   c d b       | -a   d1 b1 c4        | -a   d2.75 b3.5 c12 | 2
 8 e4  | -cd  b e         | -d   b1 e1 c4        | -d   b3.5 e4.75 c12 | 2.75
 9 c2  | +    b e c       | hit  b1 e1 c5        | hit  b3.5 e4.75 c17.75 | 2.75
10 c2  | hit  b e c       | hit  b1 e1 c6        | hit  b3.5 e4.75 c20.75 | 2.75
11 f8  | +    b e c f     | +    b1 e1 f1 c6     | +    b3.5 f4.25 e4.75 c20.75 | 2.75
12 e4  | hit  b c f e     | hit  b1 f1 e2 c6     | hit  b3.5 f4.25 e6.75 c20.75 | 2.75
13 c2  | hit  b f e c     | hit  b1 f1 e2 c7     | hit  b3.5 f4.25 e6.75 c23.75 | 2.75
14 e4  | hit  b f c e     | hit  b1 f1 e3 c7     | hit  b3.5 f4.25 e8.75 c23.75 | 2.75
15 d16 | -bf  c e d       | -bf  d1 e3 c7        | -bf  d5.5 e8.75 c23.75 | 4.25
16 u8  | -ce  d u         | -d   u1 e3 c7        | -d   u7 e8.75 c23.75 | 5.5
17 e4  | -d   u e         | hit  u1 e4 c7        | hit  u7 e13.5 c23.75 | 5.5
18 y8  | +    u e y       | +    u1 y1 e4 c7     | +    u7 y7 e13.5 c23.75 | 5.5
19 b8  | -u   e y b       | -u   y1 b1 e4 c7     | -u   y7 b8.5 e13.5 c23.75 | 7
20 z4  | +    e y b z     | -y   b1 z1 e4 c7     | -y   b8.5 z9 e13.5 c23.75 | 7
21 c2  | -e   y b z c     | hit  b1 z1 e4 c8     | hit  b8.5 z9 e13.5 c31 | 7
22 w2  | -y   b z c w     | -b   z1 w1 e4 c8     | -b   z9 w11.5 e13.5 c31 | 8.5
23 c2  | hit  b z w c     | hit  z1 w1 e4 c9     | hit  z9 w11.5 e13.5 c35.5 | 8.5
24 v4  | -b   z w c v     | -z   w1 v1 e4 c9     | -z   v11 w11.5 e13.5 c35.5 | 9
25 f8  | -z   w c v f     | -w   v1 f1 e4 c9     | -v   w11.5 f12.5 e13.5 c35.5 | 11
26 x16 | -wcv f x         | -vf  x1 e4 c9        | -wf  e13.5 x13.75 c35.5 | 12.5
27 a4  | -f   x a         | +    x1 a1 e4 c9     | +    e13.5 x13.75 a14.5 c35.5 | 12.5
28 d16 | -x   a d         | -x   a1 d1 e4 c9     | -ex  a14.5 d15 c35.5 | 13.75
29 d16 | hit  a d         | hit  a1 d2 e4 c9     | hit  a14.5 d16.25 c35.5 | 13.75
30 d16 | hit  a d         | hit  a1 d3 e4 c9     | hit  a14.5 d17.5 c35.5 | 13.75
31 c2  | +    a d c       | hit  a1 d3 e4 c10    | hit  a14.5 d17.5 c43.75 | 13.75
32 c2  | hit  a d c       | hit  a1 d3 e4 c11    | hit  a14.5 d17.5 c46.75 | 13.75
33 f8  | -a   d c f       | -ad  f1 e4 c11       | -a   f16 d17.5 c46.75 | 14.5
34 e4  | -d   c f e       | hit  f1 e5 c11       | -f   d17.5 e18 c46.75 | 16
35 c2  | hit  f e c       | hit  f1 e5 c12       | hit  d17.5 e18 c52 | 16
36 d16 | -f   e c d       | -f   d1 e5 c12       | hit  e18 d21 c52 | 16
37 d16 | hit  e c d       | hit  d2 e5 c12       | hit  e18 d22.25 c52 | 16
38 e4  | hit  c d e       | hit  d2 e6 c12       | hit  e20 d22.25 c52 | 16
39 f8  | -cd  e f         | -d   f1 e6 c12       | -e   f21.5 d22.25 c52 | 20
40 c2  | +    e f c       | hit  f1 e6 c13       | hit  f21.5 d22.25 c59 | 20
41 c2  | hit  e f c       | hit  f1 e6 c14       | hit  f21.5 d22.25 c62 | 20
42 d16 | -e   f c d       | -f   d1 e6 c14       | hit  f21.5 d27.5 c62 | 20
43 c2  | hit  f d c       | hit  d1 e6 c15       | hit  f21.5 d27.5 c65 | 20
44 f8  | hit  d c f       | -d   f1 e6 c15       | hit  f23 d27.5 c65 | 20
45 e4  | -d   c f e       | hit  f1 e7 c15       | -f   e25 d27.5 c65 | 23
46 d16 | -cf  e d         | -f   d1 e7 c15       | hit  e25 d31.75 c65 | 23
47 c2  | +    e d c       | hit  d1 e7 c16       | hit  e25 d31.75 c71 | 23
"""


@dataclass(frozen=True)
class Step:
    """What one request did: `victims` in the order they went, then the cache, first to go first."""

    request: str
    hit: bool
    victims: tuple[str, ...]
    ranked: tuple[str, ...]


def steps(policy: PolicyName) -> tuple[Step, ...]:
    """The working of one policy, by request."""
    column = 1 + ("lru", "lfu", "gdsf").index(policy)
    rows = [row.split("|") for row in WORKING.strip().splitlines()]
    return tuple(_step(row[0].split()[1][0], row[column].split()) for row in rows)


def _step(request: str, cell: list[str]) -> Step:
    did, *cache = cell
    victims = tuple(did[1:]) if did != "hit" else ()
    return Step(request, did == "hit", victims, tuple(entry[0] for entry in cache))
