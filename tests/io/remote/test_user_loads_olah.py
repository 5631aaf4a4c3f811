"""`loader.load("org/name")` through olah: in front of a stand-in, and over git repositories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from hub_stand_in import HubStandIn
from olah import committed, olah
from user_loads import contents, has, loader, size_of, stored_in, written

import split_files
from lorax_async import AccessDeniedError, AdapterNotFoundError
from lorax_async.adapter import AdapterRef

pytestmark = [
    pytest.mark.needs("olah-cli"),
    pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client"),
]

TOKEN = "hf_q5ecre7Token"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mirrors")


@pytest.fixture(scope="module")
def endpoint(
    hub: HubStandIn, mirrors: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with olah(tmp_path_factory.mktemp("olah"), hub, mirrors) as endpoint:
        yield endpoint


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of this test alone: the mirror is everybody's, and remembers."""
    return f"org/{request.node.name.translate(str.maketrans('[ ', '--', ']'))}"


def answered(endpoint: str, name: str) -> int:
    """The status of the answer to a range of the weights."""
    url = f"{endpoint}/{name}/resolve/main/adapter_model.safetensors"
    with urlopen(Request(url, headers={"Range": "bytes=10-99"}), timeout=60) as answer:
        answer.read()
        return int(answer.status)


@pytest.mark.parametrize("files", ["one file", "several files"])
async def test_in_front_of_a_hub(
    hub: HubStandIn, endpoint: str, name: str, files: str, tmp_path: Path
) -> None:
    """By ranges; the version is the hub's commit."""
    adapter = written(tmp_path / "a", layers=16, rank=128)
    several = split_files.split(adapter, tmp_path / "several")
    commit = hub.put(name, contents(adapter if files == "one file" else several))
    if files == "one file":
        assert answered(endpoint, name) == 206
    async with loader(tmp_path, layers=16, hub_endpoint=endpoint) as there:
        assert await has(there, name, adapter) == commit
    async with loader(tmp_path, layers=16, hub_endpoint=endpoint, offline=True) as there:
        assert await has(there, name, adapter) == commit
    assert stored_in(tmp_path) == (1, 0)


async def test_what_it_refuses(hub: HubStandIn, endpoint: str, name: str, tmp_path: Path) -> None:
    adapter = written(tmp_path / "a", layers=16, rank=16)
    hub.put(name, contents(adapter), private_token=TOKEN)
    hub.put(f"{name}-public", contents(adapter))
    async with loader(tmp_path, layers=16, hub_endpoint=endpoint) as there:
        for id in (name, "org/nobody"):
            with pytest.raises(AccessDeniedError, match="give a token"):
                await there.load(id)
        with pytest.raises(AdapterNotFoundError, match="no revision 'v9'"):
            await there.load(f"{name}-public@v9")
        await has(there, AdapterRef(name, token=TOKEN), adapter)


@pytest.mark.parametrize("lfs", [True, False], ids=["lfs", "blobs"])
async def test_over_a_git_repository(
    hub: HubStandIn, endpoint: str, mirrors: Path, name: str, lfs: bool, tmp_path: Path
) -> None:
    """It ignores ranges and says no length: what comes is read as the whole, with the next ones."""
    adapter = written(tmp_path / "a", layers=16, rank=128)
    assert size_of(adapter) > 1_000_000
    hub.put(name, contents(adapter))  # it is asked whether the repository may be seen
    commit = committed(mirrors / "models" / name, contents(adapter), lfs=lfs)
    assert answered(endpoint, name) == 200
    async with loader(tmp_path, layers=16, hub_endpoint=endpoint) as there:
        assert await has(there, name, adapter) == commit
        assert await has(there, AdapterRef(name, revision=commit), adapter) == commit
    assert stored_in(tmp_path) == (1, 0)
