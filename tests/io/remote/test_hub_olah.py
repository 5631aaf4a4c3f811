"""Through a mirror that nobody here wrote: olah, in front of a stand-in and over git repositories."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fetching import PATIENT, engine
from hub_stand_in import HubStandIn, git_sha1, sha256
from hub_world import ADAPTER, CONFIG, REPO, TOKEN, locating

import servers
from common import Run
from lorax_async.adapter import AdapterRef
from lorax_async.core.file_digest import Digest
from lorax_async.core.spans import Span
from lorax_async.errors import AccessDeniedError, AdapterNotFoundError
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.target import Answer
from tools import tool

pytestmark = [
    pytest.mark.needs("olah-cli"),
    pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client"),
]

WEIGHTS = os.urandom(3_000_000)
FILES = {**ADAPTER, "adapter_model.safetensors": WEIGHTS}


@contextmanager
def olah(folder: Path, hub: HubStandIn, **more: object) -> Iterator[str]:
    """The endpoint of a mirror of that hub.

    All is said in its file: what is given on the command line does not count beside one.
    """
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
        **more,
    }
    settings = folder / "olah.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in basic.items()]
    settings.write_text("\n".join(["[basic]", *lines, ""]))
    command = [tool("olah-cli") or "", "--config", settings, "--log-path", folder / "logs"]
    with servers.running(command, [port], folder / "log"):
        yield f"http://{own}"


class Bytes:
    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


def downloaded(fetching: RangeEngine, answer: Answer, nbytes: int) -> bytes:
    third = nbytes // 3
    groups: list[list[Span]] = [[(third, 2 * third)], [(0, third), (2 * third, nbytes)]]
    sink = Bytes(nbytes)
    fetching.download(answer, groups, sink, lambda _: None, timeout=50).done.result(55)
    return bytes(sink.data)


def test_in_front_of_another_hub(run: Run, tmp_path: Path) -> None:
    """It serves ranges, and its ETags are the hub's."""
    with HubStandIn() as hub, olah(tmp_path, hub) as endpoint:
        commit = hub.put(REPO, FILES)
        hub.put("org/private", FILES, private_token=TOKEN)
        with locating(endpoint) as locator, engine(8, timeouts=PATIENT) as fetching:
            located = run(locator.locate(AdapterRef(REPO)))
            assert located.version == commit
            config, weights = located.files
            assert config.expected == Digest("git-sha1", git_sha1(CONFIG))
            assert weights.expected == Digest("sha256", sha256(WEIGHTS))
            assert weights.nbytes == len(WEIGHTS)
            answer = fetching.ask(weights.target, 1_000, timeout=50).done.result(55)
            assert answer.ranges
            assert downloaded(fetching, answer, len(WEIGHTS)) == WEIGHTS
            private = run(locator.locate(AdapterRef("org/private", token=TOKEN)))
            begun = fetching.ask(private.files[0].target, 1_000, timeout=50)
            assert begun.done.result(55).start == CONFIG
            for name in ("org/private", "org/nobody"):
                with pytest.raises(AccessDeniedError, match="check the id, or .* give a token"):
                    run(locator.locate(AdapterRef(name)))
            with pytest.raises(AdapterNotFoundError, match="no revision 'v9'"):
                run(locator.locate(AdapterRef(REPO, revision="v9")))
            hub.put(REPO, {"adapter_config.json": CONFIG}, "bare")
            with pytest.raises(AdapterNotFoundError, match="neither"):
                run(locator.locate(AdapterRef(REPO, revision="bare")))


def git(folder: Path, *words: str) -> str:
    """As a user who has no settings."""
    who = {
        f"GIT_{role}_{what}": "a@b"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", "-C", folder, *words],
        env=os.environ | who | alone,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def committed(folder: Path, files: dict[str, bytes]) -> str:
    """In a git repository; the weights by LFS, as its program leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for name, content in files.items():
        tracked = content
        if name.endswith(".safetensors"):
            oid = sha256(content)
            place = folder / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            head = "version https://git-lfs.github.com/spec/v1"
            tracked = f"{head}\noid sha256:{oid}\nsize {len(content)}\n".encode()
        (folder / name).write_bytes(tracked)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "files")
    return git(folder, "rev-parse", "HEAD")


def test_over_git_repositories(run: Run, tmp_path: Path) -> None:
    """It ignores ranges, and says no length: what comes is read as the whole, and checked by size."""
    commit = committed(tmp_path / "mirrors" / "models" / "org" / "name", FILES)
    with HubStandIn() as hub:
        hub.put(REPO, FILES)  # it is asked whether the repository may be seen
        with (
            olah(tmp_path, hub, **{"mirrors-path": [str(tmp_path / "mirrors")]}) as endpoint,
            locating(endpoint) as locator,
            engine(8, timeouts=PATIENT) as fetching,
        ):
            located = run(locator.locate(AdapterRef(REPO)))
            assert located.version == commit
            config, weights = located.files
            assert config.expected == Digest("git-sha1", git_sha1(CONFIG))
            assert weights.expected == Digest("sha256", sha256(WEIGHTS))
            assert weights.nbytes == len(WEIGHTS)
            assert run(locator.locate(AdapterRef(REPO, revision=commit))).version == commit
            answer = fetching.ask(weights.target, 1_000, timeout=50).done.result(55)
            assert not answer.ranges
            assert downloaded(fetching, answer, len(WEIGHTS)) == WEIGHTS
