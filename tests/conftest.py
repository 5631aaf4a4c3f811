"""Fixtures for all tests."""

import asyncio
import gc
import random
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from event_loops import LOOPS, Run
from leaks import mapped_files, open_files, open_sockets, our_threads
from tools import INSTALLED_BY, tool


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak")
    group.addoption("--soak-seconds", type=float, default=120.0, help="on each device")
    group.addoption("--pictures", type=Path, help="where pictures of the page are to be put")
    group.addoption("--each-loop", action="store_true", help="all on asyncio and on uvloop")
    group.addoption("--soak-seed", type=int, default=random.randrange(1 << 32))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give a run a temporary folder that no other run shares: each removes what it finds old."""
    if config.option.basetemp is None:  # xdist gives its workers folders in that of the run
        folder = config.option.basetemp = tempfile.mkdtemp(prefix="pytest-")
        config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a program which this machine has not; pytest lists them at the end."""
    for item in items:
        for mark in item.iter_markers("needs"):
            program = mark.args[0]
            if tool(program) is None:
                how = INSTALLED_BY.get(program, "`make servers` installs servers")
                reason = f"{program} is not installed or not permitted here; {how}"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests of coroutines on asyncio's loop; on uvloop's too, where the kind of loop matters."""
    each = metafunc.config.getoption("each_loop")
    each = each or metafunc.definition.get_closest_marker("each_loop") is not None
    chosen = list(vars(metafunc.module))  # a file with a fixture of its own
    for mark in metafunc.definition.iter_markers("parametrize"):
        chosen += [mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0]
    for fixture in ("anyio_backend", "run"):
        if fixture in metafunc.fixturenames and fixture not in chosen:
            metafunc.parametrize(fixture, LOOPS if each else ["asyncio"], indirect=True)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """The loop of a test that is a coroutine."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a coroutine to its end, for tests that are none."""
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield runner.run


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test if it leaves a file open or a thread of ours running."""
    # What is older than the test is not looked at again: with torch and transformers loaded, a
    # collection would take some tenths of a second.
    gc.freeze()
    files = open_files()
    yield
    gc.collect()
    gc.unfreeze()
    assert open_files() <= files
    assert not our_threads()
    assert not mapped_files()


@pytest.fixture
def late() -> Iterator[None]:
    """The device "late", whose streams run later than they were asked to."""
    from late_device.world import loaded  # (slow)

    yield from loaded()


@pytest.fixture
def no_socket_left() -> Iterator[None]:
    """Fails the test if it leaves a socket open."""
    before = open_sockets()
    yield
    assert open_sockets() <= before


@pytest.fixture
def hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """huggingface_hub as where nobody logged in, asking nobody by itself; its cache's folder."""
    from huggingface_hub import close_session, constants  # (slow)

    folder = tmp_path / "hub"
    settings = {
        "HF_HUB_CACHE": str(folder),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    close_session()
