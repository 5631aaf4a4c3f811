"""Through a mirror that nobody here wrote: olah, in front of a stand-in and over git repositories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fetching import PATIENT, engine
from hub_stand_in import HubStandIn, git_sha1, sha256
from hub_world import ADAPTER, CONFIG, REPO, TOKEN, locating
from olah import committed, olah

from lorax_async.adapter import AdapterRef
from lorax_async.core.file_digest import Digest
from lorax_async.core.spans import Span
from lorax_async.errors import AccessDeniedError, AdapterNotFoundError
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.target import Answer

pytestmark = [
    pytest.mark.needs("olah-cli"),
    pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client"),
]

WEIGHTS = os.urandom(3_000_000)
FILES = {**ADAPTER, "adapter_model.safetensors": WEIGHTS}


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


async def test_in_front_of_another_hub(tmp_path: Path) -> None:
    """It serves ranges, and its ETags are the hub's."""
    with HubStandIn() as hub, olah(tmp_path, hub) as endpoint:
        commit = hub.put(REPO, FILES)
        hub.put("org/private", FILES, private_token=TOKEN)
        with locating(endpoint) as locator, engine(8, timeouts=PATIENT) as fetching:
            located = await locator.locate(AdapterRef(REPO))
            assert located.version == commit
            config, weights = located.files
            assert config.expected == Digest("git-sha1", git_sha1(CONFIG))
            assert weights.expected == Digest("sha256", sha256(WEIGHTS))
            assert weights.nbytes == len(WEIGHTS)
            answer = fetching.ask(weights.target, 1_000, timeout=50).done.result(55)
            assert answer.ranges
            assert downloaded(fetching, answer, len(WEIGHTS)) == WEIGHTS
            private = await locator.locate(AdapterRef("org/private", token=TOKEN))
            begun = fetching.ask(private.files[0].target, 1_000, timeout=50)
            assert begun.done.result(55).start == CONFIG
            for name in ("org/private", "org/nobody"):
                with pytest.raises(AccessDeniedError, match="check the id, or .* give a token"):
                    await locator.locate(AdapterRef(name))
            with pytest.raises(AdapterNotFoundError, match="no revision 'v9'"):
                await locator.locate(AdapterRef(REPO, revision="v9"))
            hub.put(REPO, {"adapter_config.json": CONFIG}, "bare")
            with pytest.raises(AdapterNotFoundError, match="neither"):
                await locator.locate(AdapterRef(REPO, revision="bare"))


async def test_over_git_repositories(tmp_path: Path) -> None:
    """It ignores ranges, and says no length: what comes is read as the whole, and checked by size."""
    commit = committed(tmp_path / "mirrors" / "models" / REPO, FILES, lfs=True)
    with HubStandIn() as hub:
        hub.put(REPO, FILES)  # it is asked whether the repository may be seen
        with (
            olah(tmp_path, hub, tmp_path / "mirrors") as endpoint,
            locating(endpoint) as locator,
            engine(8, timeouts=PATIENT) as fetching,
        ):
            located = await locator.locate(AdapterRef(REPO))
            assert located.version == commit
            config, weights = located.files
            assert config.expected == Digest("git-sha1", git_sha1(CONFIG))
            assert weights.expected == Digest("sha256", sha256(WEIGHTS))
            assert weights.nbytes == len(WEIGHTS)
            assert (await locator.locate(AdapterRef(REPO, revision=commit))).version == commit
            answer = fetching.ask(weights.target, 1_000, timeout=50).done.result(55)
            assert not answer.ranges
            assert downloaded(fetching, answer, len(WEIGHTS)) == WEIGHTS
