"""What this process has open or running: files, maps, sockets, threads."""

import os
import threading
from contextlib import suppress
from pathlib import Path


def open_files() -> set[str]:
    """What the process's descriptors point to, without the loop's own plumbing."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("/") and not target.startswith("/dev") and int(fd) > 2:
            found.add(f"{fd} {target}")
    return found


def open_sockets() -> int:
    """How many sockets the process has."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return found


def our_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("lorax")}


def mapped_files() -> list[str]:
    """Maps of adapters' files; nothing of ours maps a file that it does not own."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "adapter_model" in line]
