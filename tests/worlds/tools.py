"""Find third-party programs that tests run or need.

`python tests/worlds/tools.py NAME…` tells, and fails if one is missing.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".tools" / "bin"
"""Where `make servers` puts them. It comes first: versions are chosen there."""

_ADMINISTRATORS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Servers are there, and not everybody's PATH leads there."""


INSTALLED_BY = {
    "triton": "the extra `test` brings it, where it is to be had",
    "openapi_spec_validator": "the extra `test` brings it",
    "playwright": "`make page` installs it, and a browser",
}
"""Python's modules, which are told of as programs are; all else is a server."""

_PERMITTED = {"unshare": ("-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp")}
"""What a program has to be let do here; else it is as good as not installed."""


@cache
def tool(name: str) -> Path | None:
    """Return the program's path; None if it is not installed, or lacks a permission that it needs."""
    if name in INSTALLED_BY:
        spec = find_spec(name)
        return None if spec is None or spec.origin is None else Path(spec.origin)
    usual = os.environ.get("PATH", os.defpath)
    found = shutil.which(name, path=os.pathsep.join([str(FOLDER), usual, *_ADMINISTRATORS]))
    if found is None:
        return None
    words = _PERMITTED.get(name)
    tried = words and subprocess.run([found, *words], capture_output=True, check=False)
    return None if tried and tried.returncode else Path(found)


def on_a_small_disk(folder: Path) -> list[str]:
    """Return a command prefix that mounts a private disk of 2 MiB for the command."""
    mount = f"mount -t tmpfs -o size=2m,mode=700 tmpfs '{folder}'"
    return [str(tool("unshare")), "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"]


def main(names: list[str]) -> None:
    for name in names:
        sys.stdout.write(f"{name}: {tool(name) or 'not installed'}\n")
    sys.exit(any(tool(name) is None for name in names))


if __name__ == "__main__":
    main(sys.argv[1:])
