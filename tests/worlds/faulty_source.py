"""The adapters of a soak, and their source: a process that fails three requests of ten."""

import base64
import hashlib
import json
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from fault_server import Asked, Client, FaultServer, Hangup

COUNT = 200
LAYERS = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
HIDDEN = 512
ITEM = 2  # Bytes of a bfloat16

MODULES = tuple(
    f"model.layers.{layer}.self_attn.{target}" for layer in range(LAYERS) for target in TARGETS
)
BYTES_PER_RANK = len(MODULES) * 2 * HIDDEN * ITEM
LARGEST = 256 * BYTES_PER_RANK

_PERIOD = 1_000_003  # a prime: bytes differ at every offset, so a wrong offset shows
_STRIDE = 7_919


@dataclass(frozen=True)
class Stored:
    """One adapter as its source has it."""

    number: int
    rank: int
    pattern: bytes

    @property
    def name(self) -> str:
        return f"a{self.number:03d}"

    @property
    def promised(self) -> bool:
        """Whether the source sends the digests of its files before they are read."""
        return self.number % 2 == 0

    @cached_property
    def config(self) -> bytes:
        said = {"peft_type": "LORA", "r": self.rank, "lora_alpha": 8, "target_modules": TARGETS}
        return json.dumps(said).encode()

    @cached_property
    def header(self) -> bytes:
        """The header that safetensors writes, with tensors in the order of their names."""
        fields, at = {}, 0
        for module in sorted(MODULES):
            for part, shape in (("A", [self.rank, HIDDEN]), ("B", [HIDDEN, self.rank])):
                stop = at + shape[0] * shape[1] * ITEM
                field = {"dtype": "BF16", "shape": shape, "data_offsets": [at, stop]}
                fields[f"base_model.model.{module}.lora_{part}.weight"] = field
                at = stop
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """The size of the weights' file."""
        return len(self.header) + self.rank * BYTES_PER_RANK

    def weights(self, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes [start, stop) of the weights' file."""
        stop = self.nbytes if stop is None else stop
        at, end = max(0, start - len(self.header)), max(0, stop - len(self.header))
        first = (at + self.number * _STRIDE) % _PERIOD
        data = self.pattern * ((end - at) // _PERIOD + 2)
        return self.header[start:stop] + data[first : first + end - at]

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The sha256 of config and weights."""
        return tuple(hashlib.sha256(data).hexdigest() for data in (self.config, self.weights()))

    @property
    def version(self) -> str:
        """The version in its ETags."""
        return hashlib.sha1(f"{self.name} {self.rank}".encode() + self.pattern[:64]).hexdigest()


def library(seed: int) -> tuple[Stored, ...]:
    """Return all adapters, the most popular first; sizes are spread evenly by their logarithms."""
    draw = random.Random(seed)
    pattern = draw.randbytes(_PERIOD)
    ranks = [round(2 * 128 ** (n / (COUNT - 1))) for n in range(COUNT)]
    draw.shuffle(ranks)
    return tuple(Stored(number, rank, pattern) for number, rank in enumerate(ranks))


SHARE = 0.3  # Of the requests

DAMAGING = ("wrong", "changed")  # After these the bytes are not those that were promised


@dataclass(frozen=True)
class Answer:
    """A correct response: its body begins at `start` of the file of `total` bytes."""

    status: str
    fields: list[str]
    body: bytes
    start: int
    header: int  # The first bytes of the file that say what follows


class FaultySource(FaultServer):
    """Serves `/aNNN/FILE`; and `/counts` and `/calm` for the soak itself."""

    def __init__(self, seed: int) -> None:
        super().__init__(b"")
        self.seed = seed
        self.behave = self.serve
        self._there = {stored.name: stored for stored in library(seed)}
        self._lock = threading.Lock()
        self._times: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._damaged: dict[str, set[str]] = defaultdict(set)
        self._requests = 0
        self._calm = False

    def serve(self, asked: Asked, client: Client) -> None:
        with self._lock:  # a long soak keeps nothing of what is over
            self.asked.clear()
            self.clients[:] = [each for each in self.clients if each.socket.fileno() >= 0]
            self._threads[1:] = [each for each in self._threads[1:] if each.is_alive()]
        if asked.target == "/counts":
            self._json(client, self.counts())
        elif asked.target == "/calm":
            self._calm = True
            self._json(client, {})
        else:
            self._file(asked, client)

    def counts(self) -> dict[str, object]:
        with self._lock:
            damaged = {kind: sorted(names) for kind, names in self._damaged.items()}
            return {"requests": self._requests, "faults": dict(self._faults), "damaged": damaged}

    def _json(self, client: Client, said: object) -> None:
        body = json.dumps(said).encode()
        client.head("200 OK", f"Content-Length: {len(body)}")
        client.send(body)

    def _file(self, asked: Asked, client: Client) -> None:
        _, name, file = asked.target.split("/")
        stored = self._there.get(name)
        if stored is None or file not in {"adapter_config.json", "adapter_model.safetensors"}:
            client.head("404 Not Found", "Content-Length: 0")
            return
        answer = _right(stored, file, asked)
        draw, kind = self._fault(stored, asked, answer)
        if kind is None:
            client.head(answer.status, *answer.fields)
            client.send(answer.body)
        else:
            FAULTS[kind][1](answer, client, draw)

    def _fault(
        self, stored: Stored, asked: Asked, answer: Answer
    ) -> tuple[random.Random, str | None]:
        request = f"{asked.target} {asked.span}"
        with self._lock:
            self._requests += 1
            self._times[request] += 1
            draw = random.Random(f"{self.seed} {request} {self._times[request]}")
            if self._calm or draw.random() >= SHARE:
                return draw, None
            possible = {kind: share for kind, (share, _) in FAULTS.items()}
            if not stored.promised or answer.start + len(answer.body) <= answer.header:
                del possible["wrong"]  # no digest would show it
            (kind,) = draw.choices(list(possible), list(possible.values()))
            self._faults[kind] += 1
            if kind in DAMAGING:
                self._damaged[kind].add(stored.name)
            return draw, kind


def _right(stored: Stored, file: str, asked: Asked) -> Answer:
    is_config = file == "adapter_config.json"
    total = len(stored.config) if is_config else stored.nbytes
    etag = f'"{stored.version}-{file}"'
    fields = [f"ETag: {etag}"]
    if stored.promised:
        digest = bytes.fromhex(stored.digests[0 if is_config else 1])
        fields.append(f"Repr-Digest: sha-256=:{base64.b64encode(digest).decode()}:")
    header = 0 if is_config else len(stored.header)
    wanted = asked.fields.get("if-match", etag)
    if wanted != etag:
        return Answer("412 Precondition Failed", ["Content-Length: 0"], b"", 0, header)
    span = asked.span if asked.fields.get("if-range", etag) == etag else None
    start, stop = (0, total) if span is None else (span[0], min(span[1], total))
    body = stored.config[start:stop] if is_config else stored.weights(start, stop)
    fields.append(f"Content-Length: {len(body)}")
    if span is None:
        return Answer("200 OK", fields, body, start, header)
    fields.append(f"Content-Range: bytes {start}-{stop - 1}/{total}")
    return Answer("206 Partial Content", fields, body, start, header)


def _half(answer: Answer, client: Client) -> int:
    client.head(answer.status, *answer.fields)
    client.send(answer.body[: len(answer.body) // 2])
    return len(answer.body) // 2


def _reset(answer: Answer, client: Client, draw: random.Random) -> None:
    _half(answer, client)
    client.reset()


def _truncated(answer: Answer, client: Client, draw: random.Random) -> None:
    _half(answer, client)
    raise Hangup


def _wait(client: Client, seconds: float) -> None:
    if client.ending.wait(seconds):
        raise Hangup


def _stall(answer: Answer, client: Client, draw: random.Random) -> None:
    """Stall for longer or shorter than the reader's timeout."""
    sent = _half(answer, client)
    _wait(client, draw.uniform(0.1, 2.0))
    client.send(answer.body[sent:])


def _slow(answer: Answer, client: Client, draw: random.Random) -> None:
    """Send so slowly that reads do not time out; for some seconds at most."""
    client.head(answer.status, *answer.fields)
    sent = 0
    for _ in range(draw.randrange(5, 40)):
        client.send(answer.body[sent : sent + 500])
        sent += 500
        _wait(client, 0.05)
    client.send(answer.body[sent:])


def _crowded(answer: Answer, client: Client, draw: random.Random) -> None:
    seconds = draw.choice([0, 0, 1])
    client.head("503 Service Unavailable", "Content-Length: 0", f"Retry-After: {seconds}")


def _wrong(answer: Answer, client: Client, draw: random.Random) -> None:
    client.head(answer.status, *answer.fields)
    client.send(_other(answer, draw))


def _changed(answer: Answer, client: Client, draw: random.Random) -> None:
    """Answer with another ETag, and with other bytes unless the body begins the file.

    There is one such ETag per file for its beginning: readers remember every version.
    """
    rest = [field for field in answer.fields if not field.startswith("ETag")]
    name = f"{draw.getrandbits(64):016x}" if answer.start else "once"
    client.head(answer.status, *rest, f'ETag: "changed-{name}"')
    client.send(_other(answer, draw) if answer.start else answer.body)


def _other(answer: Answer, draw: random.Random) -> bytes:
    """Change one byte after the header."""
    body = bytearray(answer.body)
    body[draw.randrange(max(0, answer.header - answer.start), len(body))] ^= 1 << draw.randrange(8)
    return bytes(body)


FAULTS: dict[str, tuple[int, Callable[[Answer, Client, random.Random], None]]] = {
    "reset": (20, _reset),
    "truncated": (20, _truncated),
    "stall": (15, _stall),
    "slow": (15, _slow),
    "crowded": (20, _crowded),
    "wrong": (5, _wrong),
    "changed": (5, _changed),
}
"""How often each is chosen, of a hundred."""


def main() -> None:
    """Serve until stdin ends, as it also does when the parent process is killed."""
    with FaultySource(int(sys.argv[1])) as source:
        sys.stdout.write(f"{source.port}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
