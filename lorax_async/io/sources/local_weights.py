"""A local adapter's weights, in one file or in several. Blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lorax_async.adapter import AdapterKey, FileIdentity
from lorax_async.config import Limits
from lorax_async.core.header import Header, header_size, parse_header
from lorax_async.core.split_file import Head, plan_split
from lorax_async.core.split_index import INDEX, split_name
from lorax_async.errors import AdapterFormatError
from lorax_async.io.ports import Reader
from lorax_async.io.sources.checked_open import FileReader, changed, open_same, require_same
from lorax_async.io.sources.local_folder import CONFIG, WEIGHTS, find_adapter, read_index
from lorax_async.io.sources.local_hold import close_all
from lorax_async.io.sources.local_ids import Place
from lorax_async.io.sources.split_reader import SplitFiles, SplitReader

PREFIX_BYTES = 128 << 10
"""Read at once from the beginning of the weights: the header of nearly every adapter."""


class Weights(NamedTuple):
    """Weights that are open: their beginning with the whole header, and all of them.

    `readers` are the files, which `reader` owns.
    """

    prefix: bytes
    reader: Reader
    readers: tuple[FileReader, ...]


def is_split(key: AdapterKey) -> bool:
    """Whether the weights are in several files; then an index stands between config and them."""
    return len(key.files) > 2


def weight_files(key: AdapterKey) -> tuple[FileIdentity, ...]:
    """Those that hold the tensors."""
    return key.files[2 if is_split(key) else 1 :]


def open_weights(key: AdapterKey, limits: Limits) -> Weights:
    """Open the files and check that they are those of the key; nothing stays open on an error."""
    readers = readers_of(key, known=False)
    try:
        if not is_split(key):
            return Weights(read_prefix(readers[0], limits), readers[0], readers)
        files = _put_together(key, readers, limits)
    except BaseException:
        close_all(readers)
        raise
    return Weights(files.plan.prefix, SplitReader(files), readers)


def reopened(key: AdapterKey, limits: Limits) -> Reader:
    """The weights of an adapter whose config will not be read again; opened by the first read.

    Of several files that reads the headers again. Quick.
    """
    if not is_split(key):
        return readers_of(key, known=True)[0]

    def opener() -> SplitFiles:
        readers = readers_of(key, known=True)
        try:
            return _put_together(key, readers, limits)
        except BaseException:
            close_all(readers)
            raise

    return SplitReader(None, opener)


def readers_of(key: AdapterKey, *, known: bool) -> tuple[FileReader, ...]:
    """Of each file that holds tensors. Quick: opened by the first read.

    With `known`, that checks the files beside them too, for they will not be read again.
    """
    files = weight_files(key)
    names = [WEIGHTS]
    if is_split(key):
        names = [split_name(number, len(files)) for number in range(1, len(files) + 1)]
    beside = tuple(zip((CONFIG, INDEX), key.files[: -len(files)], strict=False)) if known else ()
    return tuple(
        FileReader(partial(_open, key.location, name, identity, beside), identity, name)
        for name, identity in zip(names, files, strict=True)
    )


def _open(
    folder: str,
    name: str,
    identity: FileIdentity,
    beside: Sequence[tuple[str, FileIdentity]],
) -> int:
    for other, known in beside:
        require_same(os.path.join(folder, other), known)
    return open_same(os.path.join(folder, name), identity)


def _put_together(key: AdapterKey, readers: tuple[FileReader, ...], limits: Limits) -> SplitFiles:
    index = read_index(key.location, key.files[1], limits)
    if index.count != len(readers):
        raise changed(INDEX)
    return SplitFiles(plan_split(index, _heads(readers, limits), limits), readers)


def _heads(readers: Sequence[FileReader], limits: Limits) -> Iterator[Head]:
    for reader in readers:
        try:
            prefix = read_prefix(reader, limits)
        except AdapterFormatError as error:
            raise error.prefixed(f"{reader.name}: ") from None
        yield Head(prefix, reader.nbytes)


def read_prefix(reader: Reader, limits: Limits) -> bytes:
    """The beginning of the file, with its whole header."""
    prefix = bytearray(min(PREFIX_BYTES, reader.nbytes))
    reader.read_into([memoryview(prefix)], 0)
    needed = header_size(memoryview(prefix), reader.nbytes, limits)
    more = needed - len(prefix)
    if more > 0:
        rest = bytearray(more)
        reader.read_into([memoryview(rest)], len(prefix))
        prefix += rest
    return bytes(prefix[:needed])


def read_header(folder: Path, limits: Limits) -> tuple[Header, int]:
    """The header of the weights in a folder that the program itself names, and the files' size.

    Raises what a load of the adapter would.
    """
    key = find_adapter(Place((os.fspath(folder),), trusted=True), (), limits)
    weights = open_weights(key, limits)
    try:
        header = parse_header(weights.prefix, weights.reader.nbytes, limits)
    finally:
        weights.reader.close()
    return header, sum(file.size for file in weight_files(key))
