"""Which process writes to a partial download, and whether it still runs."""

from __future__ import annotations

import os
from pathlib import Path

from lorax_async.core.cache_names import Owner, PartialName


def this_process() -> Owner:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    pid = os.getpid()
    return Owner(boot, _namespace(), pid, _start_of(pid) or 0)


def is_running(owner: Owner, here: Owner) -> bool:
    """Is it known to run? What is in another container or on another machine is not known."""
    if (owner.boot, owner.namespace) != (here.boot, here.namespace):
        return False
    return _start_of(owner.pid) == owner.started


def can_be_trusted(partial: PartialName, here: Owner) -> bool:
    """Is all that its maps tell in its files?

    It is if it was brought to the disk when its owner left it, or if the kernel that took it has
    run ever since: pages that were written are seen by everybody, whatever became of the process.
    """
    return partial.owner is None or partial.owner.boot == here.boot


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if it runs no more (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Its name stands in brackets, and may hold any.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])
