"""Copies of layer groups: from a command to an I/O thread, and back to the loop as an outcome."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Copy
from lorax_async.files import Files
from lorax_async.io.inbox import Inbox
from lorax_async.io.transfer import GroupCopy, Transfer


@dataclass(frozen=True, slots=True)
class CopyOutcome:
    """What an I/O thread says about one copy: `nbytes` on the device, or why not."""

    command: Copy
    nbytes: int
    error: BaseException | None
    seconds: float


class Copies:
    """Hands copies to the I/O threads; `copied` hears of each once, on the loop.

    An adapter that comes back to the device is opened again first; its copies wait for that.
    """

    def __init__(
        self,
        files: Files,
        transfer: Transfer,
        threads: Executor,
        inbox: Inbox[Callable[[], None]],
        copied: Callable[[CopyOutcome], None],
    ) -> None:
        self._files = files
        self._transfer = transfer
        self._threads = threads
        self._inbox = inbox
        self._copied = copied
        self._unread: dict[AdapterKey, list[Copy]] = {}

    def start(self, command: Copy) -> None:
        key = command.key
        if key in self._unread:
            self._unread[key].append(command)
        elif key in self._files.readers:
            self._submit(command)
        else:
            self._unread[key] = [command]
            self._files.start_reopen(key)

    def take_unread(self, key: AdapterKey) -> list[Copy]:
        """The copies that waited for the reader of `key`, which never came."""
        return self._unread.pop(key)

    def resume(self, key: AdapterKey) -> None:
        """The reader is here."""
        for command in self._unread.pop(key):
            self._submit(command)

    def _submit(self, command: Copy) -> None:
        plan = self._files.plans[command.key]
        copy = GroupCopy(
            self._files.readers[command.key],
            plan.groups[command.group],
            plan.dtype,
            command.grant.extents[command.group],
            command.grant.slot.index,
        )
        self._threads.submit(self._run, command, copy)

    def _run(self, command: Copy, copy: GroupCopy) -> None:
        """In an I/O thread: whatever happens, the loop hears of it."""
        started = perf_counter()
        error: BaseException | None = None
        try:
            self._transfer.run(copy).result()
        except BaseException as problem:  # noqa: BLE001 - it is carried to the loop and told there
            error = problem
        outcome = CopyOutcome(command, copy.group.nbytes, error, perf_counter() - started)
        self._inbox.put(lambda: self._copied(outcome))
