"""The files, maps, sockets and threads of this process."""

import os
import threading
from contextlib import suppress
from pathlib import Path


def descriptors() -> dict[str, str]:
    """Return the targets of open descriptors by number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def open_files() -> set[str]:
    """Return the open files, without standard streams, devices, pipes and sockets."""
    return {
        f"{number} {target}"
        for number, target in descriptors().items()
        if target.startswith("/") and not target.startswith("/dev") and int(number) > 2
    }


def open_sockets() -> int:
    """Return the number of open sockets."""
    return sum(target.startswith("socket:") for target in descriptors().values())


def our_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("lorax")}


def mapped_files() -> list[str]:
    """Return the maps of adapters' files."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "adapter_model" in line]
