"""The beginning of an adapter that lies elsewhere: enough to say what it is. Nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorax_async.commands.measure import run_on_uvloop
from lorax_async.config import LoaderConfig
from lorax_async.identity import AdapterRef
from lorax_async.io.remote.elsewhere import Elsewhere, elsewhere_of
from lorax_async.io.sources.local_folder import CONFIG, WEIGHTS


@dataclass(frozen=True, slots=True)
class Looked:
    """Config and header of an adapter.

    `nbytes` is the size of the one file that its weights are, or stand for; `file_bytes` that of
    its files.
    """

    config: bytes
    prefix: bytes
    nbytes: int
    file_bytes: int

    @contextmanager
    def as_folder(self) -> Iterator[Path]:
        """A folder as of a local adapter, but that the weights behind their header are a hole."""
        with TemporaryDirectory(prefix="lorax-async-") as name:
            folder = Path(name)
            (folder / CONFIG).write_bytes(self.config)
            with (folder / WEIGHTS).open("wb") as file:
                file.write(self.prefix)
                file.truncate(self.nbytes)
            yield folder


def look(ref: AdapterRef, settings: Mapping[str, Any]) -> Looked:
    """Ask the source of `ref` for its beginning. Blocks; raises what a load would."""
    with TemporaryDirectory(prefix="lorax-async-") as name:
        config = LoaderConfig(**{**settings, "cache_dir": Path(name) / "cache"})
        with elsewhere_of(config) as elsewhere:
            return run_on_uvloop(_look(elsewhere, ref))


async def _look(elsewhere: Elsewhere, ref: AdapterRef) -> Looked:
    begun = await elsewhere.beginning(await elsewhere.resolve(ref))
    file_bytes = sum(part.nbytes for part in begun.parts)
    return Looked(begun.config[1], begun.prefix, begun.nbytes, file_bytes)
