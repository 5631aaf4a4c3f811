"""olah, a mirror of hubs that nobody here wrote, and the git repositories that it can serve."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hub_stand_in import HubStandIn, sha256

import servers
from tools import tool


@contextmanager
def olah(folder: Path, hub: HubStandIn, mirrors: Path | None = None) -> Iterator[str]:
    """The endpoint of a mirror of that hub; what lies below `mirrors` it takes from there.

    All is said in its file: what is given on the command line does not count beside one.
    """
    program = tool("olah-cli")
    assert program is not None
    port = servers.free_port()
    own = f"127.0.0.1:{port}"
    basic: dict[str, object] = {
        "host": "127.0.0.1",
        "port": port,
        "repos-path": str(folder / "repos"),
        "hf-scheme": "http",
        "hf-netloc": hub.netloc,
        "hf-lfs-netloc": hub.store_netloc,
        "mirror-scheme": "http",
        "mirror-netloc": own,
        "mirror-lfs-netloc": own,
        "mirrors-path": [] if mirrors is None else [str(mirrors)],
    }
    settings = folder / "olah.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in basic.items()]
    settings.write_text("\n".join(["[basic]", *lines, ""]))
    command: servers.Command = [program, "--config", settings, "--log-path", folder / "logs"]
    with servers.running(command, [port], folder / "log"):
        yield f"http://{own}"


def committed(folder: Path, files: Mapping[str, bytes], *, lfs: bool) -> str:
    """Files in a git repository, the weights by LFS, as its program leaves them; the commit."""
    folder.mkdir(parents=True, exist_ok=True)
    _git(folder, "init", "--quiet", "--initial-branch=main")
    for name, content in files.items():
        by_lfs = lfs and name.endswith(".safetensors")
        (folder / name).write_bytes(_in_lfs(folder, content) if by_lfs else content)
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--message", "files")
    return _git(folder, "rev-parse", "HEAD")


def _in_lfs(folder: Path, content: bytes) -> bytes:
    """Keep it beside the repository; what stands for it there."""
    oid = sha256(content)
    place = folder / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    head = "version https://git-lfs.github.com/spec/v1"
    return f"{head}\noid sha256:{oid}\nsize {len(content)}\n".encode()


def _git(folder: Path, *words: str) -> str:
    """As a user who has no settings."""
    roles, whats = ("AUTHOR", "COMMITTER"), ("NAME", "EMAIL")
    who = {f"GIT_{role}_{what}": "a@b" for role in roles for what in whats}
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", "-C", folder, *words],
        env=os.environ | who | alone,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()
