"""A server of objects that nobody here wrote, as a process on loopback, and what it is asked with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from fault_server import until

NOWHERE = "http://127.0.0.1:1"
_OTHERS = ("AWS_", "GOOGLE_", "AZURE_", "MSI_", "IDENTITY_")


def free_ports(count: int) -> list[int]:
    """Different ones, for all are taken at once."""
    with ExitStack() as held:
        found = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in found]


@contextmanager
def running(command: Sequence[str | Path], log: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """Until it is ready a minute may pass. At the end it is killed: what it wrote is nobody's."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: process.poll() is not None or ready(), 60)
        assert process.poll() is None, log.read_text(errors="replace")[-2_000:]
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def status(
    method: str, url: str, data: bytes | None = None, fields: dict[str, str] | None = None
) -> int:
    """Of the answer; 0 where there is none."""
    try:
        with urlopen(Request(url, data, fields or {}, method=method), timeout=20) as answer:
            return int(answer.status)
    except HTTPError as error:
        error.close()
        return error.code
    except (URLError, OSError):
        return 0


def set_environment(patch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    """These, and nothing else by which obstore would find credentials, here or in a network."""
    for name in list(os.environ):
        if name.startswith(_OTHERS):
            patch.delenv(name)
    patch.setenv("AWS_METADATA_ENDPOINT", NOWHERE)
    for name, value in values.items():
        patch.setenv(name, value)
