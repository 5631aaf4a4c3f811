"""Adapters that came from nowhere else: in host memory, within a budget, or in a home elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

import torch

from lorax_async.adapter import AdapterKey, TensorsKey
from lorax_async.errors import CapacityError, FetchError, IntegrityError
from lorax_async.io.ports import Demand, Reader
from lorax_async.io.snapshot import TensorsFile


class Claim:
    """Bytes of a budget, until they are given back."""

    def __init__(self, nbytes: int, give_back: Callable[[int], None]) -> None:
        self._give_back = give_back
        self._nbytes = nbytes
        self._lock = Lock()

    def end(self) -> None:
        """Idempotent, from any thread."""
        with self._lock:
            nbytes, self._nbytes = self._nbytes, 0
        self._give_back(nbytes)


class Users:
    """Counts who uses something, its maker first; calls `ended` when nobody does. Any thread."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.count = 1
        self._ended = ended
        self._lock = Lock()

    def join(self) -> None:
        """One more."""
        with self._lock:
            self.count += 1

    def leave(self) -> None:
        """One less."""
        with self._lock:
            self.count -= 1
            unused = not self.count
        if unused:
            self._ended()


class Home(Protocol):
    """Where an adapter's bytes are, for as long as somebody uses them; its maker does."""

    def open(self) -> Reader:
        """One more user, until the reader is closed. Quick."""

    def leave(self) -> None:
        """Its maker uses it no longer. Quick."""


class InMemory:
    """The `Home` of a file in memory, whose bytes are claimed. `changed` hears of who leaves."""

    def __init__(self, file: TensorsFile, claim: Claim, changed: Callable[[], None]) -> None:
        self.file = file
        self._changed = changed
        self._users = Users(claim.end)

    @property
    def nbytes(self) -> int:
        return self.file.content.nbytes

    @property
    def is_idle(self) -> bool:
        """Nobody reads it now."""
        return self._users.count == 1

    def open(self) -> HostReader:
        self._users.join()
        return HostReader(self.file, self.leave)

    def leave(self) -> None:
        self._users.leave()
        self._changed()


class HostCopy:
    """One adapter's file, wherever it is, until it is dropped."""

    def __init__(self, key: TensorsKey, home: InMemory) -> None:
        self.key = key
        self._home: Home = home
        self._lock = Lock()
        self._dropped = False
        self.moving: Demand | None = None
        """Of whoever is about to move it; ends when it is dropped."""

    @property
    def in_memory(self) -> InMemory | None:
        """None if it has moved elsewhere."""
        home = self._home
        return home if isinstance(home, InMemory) else None

    def open(self) -> Reader:
        """Of where it is now; there it is read to the reader's end. Quick."""
        with self._lock:
            return self._home.open()

    def move(self, home: Home) -> None:
        """From here on it is read from there. From any thread."""
        with self._lock:
            left = home if self._dropped else self._home
            self._home = home
        left.leave()

    def drop(self) -> None:
        """Once, on the loop; who reads it reads on."""
        with self._lock:
            self._dropped = True
            left = self._home
        if self.moving is not None:
            self.moving.end()
        left.leave()


class HostReader:
    """The `Reader` of a file in memory, with its config and header."""

    def __init__(self, file: TensorsFile, closed: Callable[[], None]) -> None:
        self.config = file.config
        self.prefix = file.prefix
        self.nbytes = file.content.nbytes
        self._content: torch.Tensor | None = file.content
        self._closed: Callable[[], None] | None = closed
        self._lock = Lock()

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        content = self._up_to(offset + sum(buffer.nbytes for buffer in buffers))
        for buffer in buffers:
            if buffer.nbytes:
                target = torch.frombuffer(buffer.cast("B"), dtype=torch.uint8)
                # As a memoryview it would hold the GIL.
                target.copy_(content[offset : offset + buffer.nbytes])
                offset += buffer.nbytes

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        stop = offset + (rows - 1) * pitch + size
        apart = self._up_to(stop)[offset:stop].as_strided((rows, size), (pitch, 1))
        torch.frombuffer(buffer.cast("B"), dtype=torch.uint8).view(rows, size).copy_(apart)

    def _up_to(self, stop: int) -> torch.Tensor:
        """The content, which has so many bytes."""
        content = self._content
        if content is None:
            raise FetchError("the reader was closed before it was read")
        if stop > content.nbytes:
            raise IntegrityError(f"the adapter ends before byte {stop:,}")
        return content

    def close(self) -> None:
        with self._lock:
            closed, self._closed, self._content = self._closed, None, None
        if closed is not None:
            closed()


class HostCopies:
    """The copies by key, the one that was used last at the end; in memory, within `nbytes`.

    On the loop, but for what readers give back.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used = 0
        self._copies: dict[AdapterKey, HostCopy] = {}
        self._lock = Lock()
        self._watchers: tuple[Callable[[], None], ...] = ()

    @property
    def sizes(self) -> Mapping[AdapterKey, int]:
        """Bytes of each that is in memory."""
        homes = {key: copy.in_memory for key, copy in self._copies.items()}
        return {key: home.nbytes for key, home in homes.items() if home is not None}

    @property
    def idle(self) -> Mapping[HostCopy, int]:
        """Bytes of each that is in memory and not read now; the first was used longest ago."""
        found: dict[HostCopy, int] = {}
        for copy in self._copies.values():
            home = copy.in_memory
            # Looked at again, for who moves it may have left it just now.
            if home is not None and home.is_idle and copy.in_memory is home:
                found[copy] = home.nbytes
        return found

    def claim(self, nbytes: int) -> Claim:
        """Room for one more. Raises `CapacityError` if there is none."""
        with self._lock:
            if nbytes > self.nbytes - self.used:
                raise CapacityError(
                    f"{nbytes:,} bytes of tensors do not fit beside {self.used:,} in memory_bytes"
                    f" ({self.nbytes:,}); unload adapters that were given as tensors, or raise it",
                    retryable=nbytes <= self.nbytes,
                )
            self.used += nbytes
        return Claim(nbytes, self._give_back)

    def put(self, file: TensorsFile, claim: Claim) -> AdapterKey:
        """Keep a file, or the one that is here with the same content."""
        known = self.get(file.key)
        if known is not None:
            claim.end()
            return known.key
        home = InMemory(file, claim, self._changed)
        self._copies[file.key] = HostCopy(file.key, home)
        self._changed()
        return file.key

    def get(self, key: AdapterKey) -> HostCopy | None:
        """For using it now."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._copies[key] = copy
        return copy

    def in_memory(self, key: AdapterKey) -> bool:
        """Whether it is kept, and here."""
        copy = self._copies.get(key)
        return copy is not None and copy.in_memory is not None

    def drop(self, key: AdapterKey) -> None:
        """Keep it no longer; who reads it reads on."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            copy.drop()

    def clear(self) -> None:
        for key in tuple(self._copies):
            self.drop(key)

    @contextmanager
    def watched(self, changed: Callable[[], None]) -> Iterator[None]:
        """Call `changed`, in any thread, whenever there may be more room, or another idle copy."""
        self._watchers += (changed,)
        try:
            yield
        finally:
            self._watchers = tuple(each for each in self._watchers if each is not changed)

    def _changed(self) -> None:
        for changed in self._watchers:
            changed()

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes
        self._changed()
