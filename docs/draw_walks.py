"""List the files that a call executes, for the walks of architecture.md, by sys.setprofile.

python docs/draw_walks.py            # print them
python docs/draw_walks.py --write    # put them into architecture.md, between its marks
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill
from types import FrameType
from typing import Any

import lorax_async
from lorax_async import AdapterLoader, AdapterScheduler, Allow, LoaderConfig, Request
from lorax_async.engines.smollm2 import smollm2_layout

PACKAGE = Path(lorax_async.__file__).parent
ADAPTERS = PACKAGE.parent / "examples" / "adapters"
NAME = "pirate"
PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- walks: listed by docs/draw_walks.py -->", "<!-- end of walks -->"


class Walk:
    """The files of the package that any thread executes, in the order of their first calls.

    It begins with the first call of a function named `begin` and ends with one named `end`.
    """

    def __init__(self, begin: str, end: str) -> None:
        self.files: dict[str, None] = {}
        self._begin = begin
        self._end = end
        self._walking = False

    def __enter__(self) -> Walk:
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        self._walking = False

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{PACKAGE}/"):
            return
        self._walking |= code.co_qualname == self._begin
        if self._walking:
            self.files[str(Path(code.co_filename).relative_to(PACKAGE))] = None
        if code.co_qualname == self._end:
            self._walking, self._begin = False, ""


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing: a client may leave when it has what it wants."""


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def web_folder() -> Iterator[tuple[str, Allow]]:
    """Serve the demo's adapters on loopback."""
    handler = partial(QuietHandler, directory=str(ADAPTERS))
    with QuietServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = server.server_port
            yield f"http://127.0.0.1:{port}/{NAME}/", Allow("http", "127.0.0.1", port)
        finally:
            server.shutdown()
            thread.join()


async def load(walk: Walk, id: str | Path, *allow: Allow) -> None:
    with TemporaryDirectory(prefix="lorax-async-") as cache, walk:
        config = LoaderConfig(device_bytes="32MiB", cache_dir=cache, hub_cache="off", allow=allow)
        async with AdapterLoader(smollm2_layout(), config) as loader, loader.load(id):
            pass


async def batch(walk: Walk) -> None:
    """Serve one request, whose adapter is on the device: the loop decides alone."""
    config = LoaderConfig(device_bytes="32MiB", hub_cache="off")
    loading = AdapterLoader(smollm2_layout(), config)
    async with (
        loading as loader,
        loader.load(ADAPTERS / NAME),
        AdapterScheduler(loader) as scheduler,
    ):
        with walk:
            scheduler.submit(Request(ADAPTERS / NAME, 1, 1))
            scheduler.complete(await scheduler.next_batch(64, 8))


CHECKED = "Lifecycle.header_checked"


def walked(begin: str, end: str, play: Callable[[Walk], Awaitable[None]]) -> list[str]:
    walk = Walk(begin, end)

    async def run() -> None:
        await play(walk)

    asyncio.run(run())
    return list(walk.files)


def walks() -> dict[str, list[str]]:
    """Return the files of each walk."""
    with web_folder() as (url, allow):
        return {
            "From `load` of a local folder to its checked header": walked(
                "AdapterLoader.load", CHECKED, lambda walk: load(walk, ADAPTERS / NAME)
            ),
            "From `load` of a folder behind a URL to its checked header": walked(
                "AdapterLoader.load", CHECKED, lambda walk: load(walk, url, allow)
            ),
            "From a request for a resident adapter to its batch": walked(
                "AdapterScheduler.submit", "AdapterScheduler.complete", batch
            ),
        }


def drawn() -> str:
    """Return the list of walks as Markdown."""
    return "\n\n".join(
        f"{name}, {len(files)} files:\n\n"
        + fill(" ".join(f"`{file}`" for file in files), 120, break_on_hyphens=False)
        for name, files in walks().items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into architecture.md")
    text = drawn()
    if parser.parse_args().write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    else:
        sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
