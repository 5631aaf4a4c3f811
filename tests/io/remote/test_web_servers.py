"""Folders on servers that nobody here wrote: nginx, Debian's rclone, Python's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import until
from fetching import PATIENT, Anywhere, engine
from web_folder import CONFIG, WEIGHTS

import servers
import tiny
from common import Run
from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.core.spans import Span
from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, IntegrityError
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.remote.beginning import FIRST_BYTES
from lorax_async.io.remote.ports import WEAK, Located
from lorax_async.io.remote.web import WebLocator
from servers import Nginx

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")
on_nginx = pytest.mark.needs("nginx")
on_rclone = pytest.mark.needs("rclone")

LAYERS = 200
"""So that there is more of the weights than the first request brings."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("saved"), seed=3, layers=LAYERS)


@pytest.fixture
def nginx(tmp_path: Path, adapter: Path) -> Iterator[Nginx]:
    with servers.nginx(tmp_path) as server:
        for name in (CONFIG, WEIGHTS):
            server.put(f"one/{name}", (adapter / name).read_bytes())
        yield server


@pytest.fixture
def fetching() -> Iterator[RangeEngine]:
    with engine(8, timeouts=PATIENT) as opened:
        yield opened


@pytest.fixture
def locator(fetching: RangeEngine) -> WebLocator:
    return WebLocator(fetching, Anywhere(), Limits())


class Sink:
    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


def brought(fetching: RangeEngine, located: Located) -> bytes:
    """All of the weights, as a download brings them."""
    answer = located.files[1].answer
    assert answer is not None
    assert answer.known.size is not None
    end = answer.known.size
    groups: list[list[Span]] = [[(0, 300_000)], [(300_000, end)]]
    sink, arrived = Sink(end), list[int]()
    fetching.download(answer, groups, sink, arrived.append, first=1, timeout=60).done.result(70)
    assert arrived == [0, 1]
    return bytes(sink.data)


def check(fetching: RangeEngine, located: Located, adapter: Path) -> None:
    config, weights = located.files
    assert config.answer is not None
    assert weights.answer is not None
    assert config.answer.start == (adapter / CONFIG).read_bytes()
    saved = (adapter / WEIGHTS).read_bytes()
    assert len(saved) > FIRST_BYTES
    assert weights.answer.start == saved[:FIRST_BYTES]
    assert brought(fetching, located) == saved


# -- nginx ----------------------------------------------------------------------------------------


@on_nginx
@pytest.mark.parametrize("path", ["one/", "moved/one/", "whole/one/", "untagged/one/"])
async def test_a_folder_of_nginx(
    nginx: Nginx, fetching: RangeEngine, locator: WebLocator, adapter: Path, path: str
) -> None:
    """By ranges; after redirects to another port; where ranges are not served; without ETags."""
    located = await locator.locate(AdapterRef(nginx.url(path)))
    assert located.version.startswith(WEAK) is (path == "untagged/one/")
    weights = located.files[1].answer
    assert weights is not None
    assert weights.ranges is (path != "whole/one/")
    assert weights.place.url.origin.port == (nginx.second if "moved" in path else nginx.first)
    check(fetching, located, adapter)
    again = await locator.locate(AdapterRef(nginx.url(path), revision=located.version))
    assert again.version == located.version


@on_nginx
def test_one_version_wherever_it_was_moved_to(run: Run, nginx: Nginx, locator: WebLocator) -> None:
    """The same files, with the same ETags; and the source is what the caller named."""
    here, there = (run(locator.locate(AdapterRef(nginx.url(p)))) for p in ("one/", "moved/one/"))
    assert here.version == there.version
    assert (here.source, there.source) == (nginx.url("one/"), nginx.url("moved/one/"))


@on_nginx
async def test_a_folder_that_asks_for_a_token(
    nginx: Nginx, fetching: RangeEngine, locator: WebLocator, adapter: Path
) -> None:
    private = nginx.url("private/one/")
    for wrong in (None, "another-token"):
        with pytest.raises(AccessDeniedError, match="401"):
            await locator.locate(AdapterRef(private, token=wrong))
    located = await locator.locate(AdapterRef(private, token="the-token"))
    check(fetching, located, adapter)


@on_nginx
async def test_a_token_is_not_sent_to_where_a_redirect_leads(
    nginx: Nginx, fetching: RangeEngine, locator: WebLocator, adapter: Path
) -> None:
    located = await locator.locate(AdapterRef(nginx.url("moved/one/"), token="the-token"))
    check(fetching, located, adapter)
    redirected, served = f" 302 {nginx.first} ", f" {nginx.second} "
    until(lambda: sum(served in line for line in nginx.requests()) > 2)
    told = [line for line in nginx.requests() if "the-token" in line]
    assert len(told) == 2
    assert all(redirected in line for line in told)


@on_nginx
@pytest.mark.parametrize("path", ["one/", "untagged/one/"])
async def test_another_adapter_is_put_there_meanwhile(
    nginx: Nginx, fetching: RangeEngine, locator: WebLocator, path: str
) -> None:
    """By its ETag, or else by its date, it is told from the one that was located."""
    located = await locator.locate(AdapterRef(nginx.url(path)))
    saved = (nginx.files / "one" / WEIGHTS).read_bytes()
    nginx.put(f"one/{WEIGHTS}", saved[::-1])
    with pytest.raises(IntegrityError, match="changed"):
        brought(fetching, located)
    with pytest.raises(AdapterNotFoundError, match="revision"):
        await locator.locate(AdapterRef(nginx.url(path), revision=located.version))
    again = await locator.locate(AdapterRef(nginx.url(path)))
    assert again.version != located.version
    assert brought(fetching, again) == saved[::-1]


@on_nginx
async def test_what_is_not_there(nginx: Nginx, locator: WebLocator) -> None:
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        await locator.locate(AdapterRef(nginx.url("two/")))
    nginx.put(f"two/{CONFIG}", b"{}")
    with pytest.raises(AdapterNotFoundError, match=f"neither {WEIGHTS}"):
        await locator.locate(AdapterRef(nginx.url("two/")))


# -- rclone ---------------------------------------------------------------------------------------


@on_rclone
@pytest.mark.parametrize(("kind", "tagged"), [("http", False), ("webdav", True)])
async def test_a_folder_of_rclone(
    fetching: RangeEngine,
    locator: WebLocator,
    adapter: Path,
    tmp_path: Path,
    kind: str,
    tagged: bool,
) -> None:
    """It serves ranges; by WebDAV with ETags, else with dates alone."""
    with servers.rclone(kind, adapter.parent, tmp_path) as url:
        ref = AdapterRef(f"{url}{adapter.name}/")
        located = await locator.locate(ref)
        assert located.version.startswith(WEAK) is not tagged
        check(fetching, located, adapter)
        assert (await locator.locate(ref)).version == located.version
        with pytest.raises(AdapterNotFoundError, match=CONFIG):
            await locator.locate(AdapterRef(f"{url}nothing/"))


# -- Python ---------------------------------------------------------------------------------------


async def test_a_folder_of_pythons_own_server(
    fetching: RangeEngine, locator: WebLocator, adapter: Path, tmp_path: Path
) -> None:
    """It answers 200 to ranges: then one response is read as the whole file, in HTTP/1.0."""
    with servers.pythons_own(adapter.parent, tmp_path) as url:
        located = await locator.locate(AdapterRef(f"{url}{adapter.name}/"))
        weights = located.files[1].answer
        assert weights is not None
        assert not weights.ranges
        assert located.version.startswith(WEAK)
        check(fetching, located, adapter)
