"""Local folders: who may name them, what may lie in them, files that change, are hashed or held."""

import asyncio
import ctypes
import errno
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
from event_loops import Run
from leaks import descriptors
from local_world import (
    CONFIG_NAME,
    FILES,
    LIMITS,
    WEIGHTS_NAME,
    LocalWorld,
    cut,
    maps_below,
    nothing_left_open,
    refusal,
    replace,
    touch,
)
from page_cache import cached_pages, drop_pages
from source_conformance import held, mapped
from source_inputs import CONFIG, groups_of, header_bytes, read, tensors, weights

from lorax_async import AdapterKey, AdapterRef, LocalRoot, Verification, errors, files
from lorax_async.concurrency import FetchControl
from lorax_async.files import FileReader, identity_of, open_same
from lorax_async.sources import local
from lorax_async.sources.local import LocalSource

Patch = pytest.MonkeyPatch
COMMIT, BLOB = "c" * 40, "b" * 64


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


async def test_every_spelling_of_a_folder_gives_one_key(world: LocalWorld) -> None:
    folder = world.fill(world.roots[1] / "o rg" / "ü")
    (world.roots[0] / "link").symlink_to(folder)
    ids: list[str | Path] = [folder, Path(os.path.relpath(folder)), str(folder), f"{folder}/"]
    ids += [f"{folder}/../ü", "./o rg/ü", "./link", folder.as_uri()]
    ids += [f"{start}{folder.as_uri()[7:]}" for start in ("FILE:", "file://localhost")]
    refs = [AdapterRef(folder, source="local", token="t"), AdapterRef("o rg/ü", source="local")]
    keys = {await world.source.resolve(ref) for ref in (*refs, *map(AdapterRef, ids))}
    assert [key.location for key in keys] == [str(folder)]
    world.fill(world.roots[0] / "o rg" / "ü")
    key = await world.source.resolve(AdapterRef("./o rg/ü"))
    assert key.location == str(world.roots[0] / "o rg" / "ü"), "the first root that has it"


async def test_a_root_may_be_a_link_that_is_moved(tmp_path: Path, world: LocalWorld) -> None:
    for version in ("v1", "v2"):
        world.fill(tmp_path / version / "one")
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "v1")
    with ThreadPoolExecutor(1) as threads:
        source = LocalSource(roots=[current], limits=LIMITS, threads=threads)
        for version in ("v1", "v2"):
            current.unlink()
            current.symlink_to(tmp_path / version)
            key = await source.resolve(AdapterRef(f"{current}/one"))
            assert key.location == str(tmp_path / version / "one")


NO_FOLDERS = ["org/name", "name", "s3://buc/k", "hf://org/name", "https://h/x", "~/x"]
NO_FOLDERS += ["gs://buc/k", "az://con/k", "", "./a\0b", "./\ud800", "file://host/a"]


@pytest.mark.parametrize(
    "ref",
    [
        *[AdapterRef(id) for id in NO_FOLDERS],
        AdapterRef(Path("a\0b")),
        AdapterRef("org/name", source="hub"),
        AdapterRef("/a/b", source="s3"),
        AdapterRef(Path("/a/b"), source="hub"),
        AdapterRef("s3://b/k", source="local"),
        AdapterRef("./one", revision="main"),
        AdapterRef(Path("one"), revision="main"),
    ],
)
def test_what_is_no_id_of_a_folder_is_refused(world: LocalWorld, ref: AdapterRef) -> None:
    """What names another place says that this source has folders only."""
    error = refusal(world, ref, errors.InvalidAdapterIdError)
    if re.match(r"org/|(s3|gs|az)://...?/|https:", str(ref.id)) and not ref.source:
        assert re.search(r"only local folders.*local_roots", error.problem)
    assert ("revision" in error.problem) or not ref.revision


def test_outside_of_the_roots_nothing_is_told(world: LocalWorld) -> None:
    secret = world.fill(world.outside / "secret")
    (world.roots[0] / "out").symlink_to(secret)
    (world.roots[0] / "dangling").symlink_to(world.outside / "nothing")
    (world.roots[0] / "loop").symlink_to("../outside/loop")
    (world.outside / "loop").symlink_to("loop")
    (secret / "empty").mkdir()
    ids = [
        *(f"{world.outside}/{end}" for end in ("secret", "nothing", "secret/empty", "loop", "")),
        *(f"{world.outside}/{end}" for end in (f"secret/{CONFIG_NAME}", "a" * 300)),
        *("./out", "./out/empty", "./out/nothing", "./dangling", "./loop", "./../outside/secret"),
        *("../outside/nothing", f"{world.roots[0]}2", "/", "/proc/self/cwd", "/dev/null"),
    ]
    words = ("local_roots", "pathlib.Path")
    refusals = [refusal(world, id, errors.AccessDeniedError, *words) for id in ids]
    assert len({str(error) for error in refusals}) == 1
    assert {error.__cause__ or error.__context__ for error in refusals} == {None}


def test_inside_a_root_a_missing_folder_is_not_found(world: LocalWorld) -> None:
    for id in ("./nothing", "./a/b", "./" + "a" * 300):
        refusal(world, id, errors.AdapterNotFoundError)


@pytest.mark.parametrize("trusted", [True, False])
def test_an_unreadable_link(world: LocalWorld, monkeypatch: Patch, trusted: bool) -> None:
    """As /proc/1/root, which no path leads through: not even where it leads may be asked."""
    place = "/proc/1/root"
    refused = PermissionError(errno.EACCES, "Permission denied", place)

    def no_link(*_: object, **__: object) -> NoReturn:
        raise refused

    monkeypatch.setattr(os.path, "realpath", no_link)
    monkeypatch.setattr(local, "locate", no_link)
    words = "give it permission" if trusted else "local_roots only"
    refusal(world, Path(place) if trusted else place, errors.AccessDeniedError, words)


@pytest.mark.parametrize("name", FILES)
def test_links_stay_in_the_folder(world: LocalWorld, run: Run, name: str) -> None:
    other, folder = world.fill(world.roots[0] / "other"), world.fill(world.roots[0] / "one")
    (folder / "sub").mkdir()
    (folder / name).rename(folder / "sub" / "w")
    (folder / name).symlink_to("sub/w")
    run(world.source.resolve(AdapterRef("./one")))
    texts = set()
    for target in (other / WEIGHTS_NAME, other / "nothing", other, "/dev/null", name):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        texts.add(str(refusal(world, "./one", errors.AccessDeniedError)))
    assert len(texts) == 1
    (folder / name).unlink()
    (folder / name).symlink_to(other / name)
    key = run(world.source.resolve(AdapterRef(folder)))
    assert (other / name).stat().st_ino in {file.inode for file in key.files}


@pytest.mark.parametrize("sub", ["", "deep/er"])
@pytest.mark.parametrize(
    ("snapshot", "blob", "allowed"),
    [
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--n/blobs/{BLOB}", True),
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--n/blobs/{BLOB[:40]}", True),
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--x/blobs/{BLOB}", False),
        (f"models--o--n/snapshots/{COMMIT}", "models--o--n/blobs/secret", False),
        (f"models--o--n/snapshots/{COMMIT}", f"models--o--n/blobs/x/{BLOB}", False),
        ("models--o--n/snapshots/main", f"models--o--n/blobs/{BLOB}", False),
        (f"o--n/snapshots/{COMMIT}", f"o--n/blobs/{BLOB}", False),
    ],
)
def test_the_hub_cache_keeps_its_links(
    world: LocalWorld, sub: str, snapshot: str, blob: str, allowed: bool
) -> None:
    folder, target = world.fill(world.roots[0] / snapshot / sub), world.roots[0] / blob
    target.parent.mkdir(parents=True)
    (folder / WEIGHTS_NAME).rename(target)
    (folder / WEIGHTS_NAME).symlink_to(os.path.relpath(target, folder))
    if allowed:
        key = asyncio.run(world.source.resolve(AdapterRef(str(folder))))
        assert key.files[1].inode == target.stat().st_ino
    else:
        refusal(world, str(folder), errors.AccessDeniedError)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, chdir(path.parent):
        listener.bind(path.name)  # which has at most 107 bytes


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


ODD: list[tuple[Callable[[Path], None], str]] = [
    (os.mkfifo, "FIFO"),
    (Path.mkdir, "folder"),
    (unix_socket, "socket"),
    (lambda path: path.symlink_to("/dev/zero"), "device"),
    (lambda path: path.symlink_to("/dev/ptmx"), "device"),
    (huge, "1,099,511,627,776"),
    (Path.touch, "empty"),
]


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize(("make", "word"), ODD)
def test_irregular_file(
    world: LocalWorld, name: str, make: Callable[[Path], None], word: str
) -> None:
    path = world.fill(world.roots[0] / "one") / name
    path.unlink()
    make(path)
    refusal(world, path.parent, errors.AdapterFormatError, name, word)


@pytest.mark.parametrize(
    ("present", "kind", "words"),
    [
        ([], errors.AdapterNotFoundError, [CONFIG_NAME, WEIGHTS_NAME]),
        ([CONFIG_NAME], errors.AdapterNotFoundError, [WEIGHTS_NAME]),
        ([WEIGHTS_NAME], errors.AdapterNotFoundError, [CONFIG_NAME]),
        (
            [CONFIG_NAME, "adapter_model.bin"],
            errors.AdapterFormatError,
            ["pickle", "re-save", "lorax-async convert"],
        ),
        (
            [CONFIG_NAME, "adapter_model.safetensors.index.json", "adapter_model.bin"],
            errors.UnsupportedAdapterError,
            ["adapter_model.safetensors.index.json", '"Weights in several files" of docs/sources'],
        ),
        (
            [CONFIG_NAME, "adapters.safetensors"],
            errors.UnsupportedAdapterError,
            ["MLX", "transpose"],
        ),
        (
            [CONFIG_NAME, "pytorch_lora_weights.safetensors"],
            errors.UnsupportedAdapterError,
            ["diffusers", "image models"],
        ),
    ],
)
def test_missing_files(world: LocalWorld, present: list[str], kind: type, words: list[str]) -> None:
    (folder := world.roots[0] / "one").mkdir()
    for name in present:
        (folder / name).write_bytes(b"{}")
    error = refusal(world, "./one", kind, *words)
    assert not any(name in error.problem for name in present[:1])


async def test_limits_are_the_last_size_that_passes(world: LocalWorld) -> None:
    path = world.fill(world.roots[0] / "one")
    config = CONFIG.ljust(LIMITS.max_config_bytes)
    (path / CONFIG_NAME).write_bytes(config)
    file = await world.source.open(await world.source.resolve(AdapterRef(path)), FetchControl())
    file.reader.close()
    assert file.config == config
    (path / CONFIG_NAME).write_bytes(config + b" ")
    with pytest.raises(errors.AdapterFormatError):
        await world.source.resolve(AdapterRef(path))
    for size, legal in ((130_000, True), (1_000_000, True), (1_100_000, False)):
        content = weights(1, {"note": "x" * size})
        assert (header_bytes(content) <= LIMITS.max_header_bytes) is legal
        key = await world.source.resolve(world.put("one", CONFIG, content))
        if legal:
            file = await world.source.open(key, FetchControl())
            file.reader.close()
            assert content.startswith(file.prefix)
            assert len(file.prefix) >= header_bytes(content)
        else:
            with pytest.raises(errors.AdapterFormatError, match="limit"):
                await world.source.open(key, FetchControl())


def become_nobody() -> None:
    """This thread alone, and for files alone; root could read everything."""
    ctypes.CDLL(None).setfsuid(65_534)


@pytest.mark.parametrize("denied", ["", CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("step", ["resolve", "open"])
async def test_what_the_process_may_not_read(denied: str, step: str) -> None:
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(2, initializer=become_nobody) as threads,
    ):
        Path(name).chmod(0o755)
        world = LocalWorld(Path(name).resolve(), threads)
        folder = world.fill(world.roots[0] / "one")
        (folder / WEIGHTS_NAME).chmod(0o644)
        key = await world.source.resolve(AdapterRef(folder))
        (folder / denied).chmod(0o000 if denied else 0o600)
        if step == "open":  # a new mode is another version of a file
            with pytest.raises(errors.IntegrityError if denied else errors.AccessDeniedError):
                await world.source.open(key, FetchControl())
        for id in (folder, "./one") if step == "resolve" else ():
            with pytest.raises(errors.AccessDeniedError, match="permission"):
                await world.source.resolve(AdapterRef(id))


def retarget(link: Path, target: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


async def test_a_link_that_swings_never_lets_a_secret_out(world: LocalWorld) -> None:
    folder = world.fill(world.roots[0] / "one")
    secret = world.outside / "secret"
    secret.write_bytes(b"the secret of another tenant")
    (folder / CONFIG_NAME).rename(folder / "mine.json")
    retarget(folder / CONFIG_NAME, folder / "mine.json")
    stop, outcomes = threading.Event(), set[object]()

    def swing() -> None:
        while not stop.is_set():
            for target in (secret, folder / "mine.json"):
                retarget(folder / CONFIG_NAME, target)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(swing)
        try:
            for turn in range(20_000):
                if turn > 300 and len(outcomes) > 1:
                    break
                try:
                    key = await world.source.resolve(AdapterRef("./one"))
                    file = await world.source.open(key, FetchControl())
                except (errors.AccessDeniedError, errors.IntegrityError) as error:
                    outcomes.add(type(error))
                else:
                    outcomes.add(file.config)
                    file.reader.close()
        finally:
            stop.set()
    assert {CONFIG, errors.AccessDeniedError} <= outcomes
    assert outcomes <= {CONFIG, errors.AccessDeniedError, errors.IntegrityError}


def uses(world: LocalWorld, key: AdapterKey) -> list[Coroutine[Any, Any, Any]]:
    """Open it, read a byte of it, and hold it."""

    def first_byte() -> bytes:
        with closing(world.source.reopen(key)) as reader:
            return read(reader, 0, 1)

    opening = world.source.open(key, FetchControl())
    return [opening, asyncio.to_thread(first_byte), held(world.source, key, holdable=world.holds)]


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
async def test_a_fifo_that_takes_the_files_place(world: LocalWorld, name: str) -> None:
    path = world.fill(world.roots[0] / "one") / name
    key = await world.source.resolve(AdapterRef("./one"))
    path.unlink()
    os.mkfifo(path)
    for _ in range(2):
        for step in uses(world, key):
            with pytest.raises(errors.IntegrityError, match=name):
                await step
        path.unlink(missing_ok=True)


def reader_of(path: Path, blocks: int = 1) -> FileReader:
    path.write_bytes(bytes(range(256)) * 16 * blocks)
    identity = identity_of(path.stat())
    reader = FileReader(lambda: open_same(str(path), identity), identity, "file")
    read(reader, 0, 0)  # the first read opens
    return reader


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[FileReader]:
    before = descriptors()
    with closing(reader_of(tmp_path / "file")) as reader:
        yield reader
    assert descriptors() == before


def test_short_reads_are_continued(reader: FileReader, monkeypatch: Patch) -> None:
    """Of rows, no byte between them is asked for."""
    real, asked = os.preadv, set[int]()

    def stingy(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Eleven bytes a call, over as many buffers as that fills."""
        asked.update(range(offset, offset + sum(buffer.nbytes for buffer in buffers)))
        left, some = 11, []
        for buffer in buffers:
            some.append(buffer.cast("B")[:left])
            left -= some[-1].nbytes
        return real(fd, some, offset)

    monkeypatch.setattr(os, "preadv", stingy)
    whole = memoryview(bytearray(200))
    pieces = [whole[:3], whole[3:3], whole[3:50], whole[50:200].cast("B", (15, 10))]
    reader.read_into(pieces, 7)
    assert bytes(whole) == (bytes(range(256)) * 2)[7:207]
    asked.clear()
    content = bytearray(5 * 30)
    reader.read_into([memoryview(content)], 7, 5, 100)
    wanted = [n for start in range(7, 507, 100) for n in range(start, start + 30)]
    assert list(content) == [n % 256 for n in wanted]
    assert asked == set(wanted)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, errors.FetchError), (errno.EACCES, errors.AccessDeniedError)]
)
def test_system_errors(reader: FileReader, monkeypatch: Patch, number: int, kind: type) -> None:
    def broken(*_: object) -> int:
        raise OSError(number, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    rows = memoryview(bytearray(2))
    for reading in (lambda: read(reader, 0, 1), lambda: reader.read_into([rows], 0, 2, 9)):
        with pytest.raises(errors.FetchError, match=errno.errorcode[number]) as caught:
            reading()
        assert type(caught.value) is kind
        assert isinstance(caught.value.__cause__, OSError)


def test_a_descriptor_outlives_its_read(reader: FileReader, monkeypatch: Patch) -> None:
    entered, go, real = threading.Event(), threading.Event(), os.preadv

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        entered.set()
        assert go.wait(10)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    before = descriptors()
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read, reader, 3, 9)
        assert entered.wait(10)
        reader.close()
        assert descriptors() == before
        go.set()
        assert reading.result() == bytes(range(3, 9))
    assert len(descriptors()) == len(before) - 1
    with pytest.raises(errors.FetchError):
        read(reader, 3, 9)


def test_a_file_is_in_memory_if_no_part_of_it_must_be_waited_for(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    with closing(reader_of(tmp_path / "file", 300)) as reader:
        plain, missing = os.preadv, reader.nbytes - 1

        def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
            if flags == os.RWF_NOWAIT and offset == missing:
                raise BlockingIOError
            return plain(fd, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)
        assert not reader.is_cached()
        missing = -1
        assert reader.is_cached()


@pytest.mark.parametrize("blocks", [1, 300])
def test_whether_a_file_is_in_memory(tmp_path: Path, blocks: int) -> None:
    """As mincore(2) says."""
    path = tmp_path / "file"
    with closing(reader_of(path, blocks)) as reader:
        assert reader.is_cached()
        drop_pages(path)
        assert not cached_pages(path)
        # A fast disk brings what is looked at before the look ends.
        assert not reader.is_cached() or cached_pages(path)
    with closing(FileReader(lambda: os.open("/dev/null", os.O_RDONLY), reader.identity, "x")) as no:
        assert not no.is_cached(), "what the kernel cannot tell"


def test_a_forgotten_reader_is_closed_and_warns(tmp_path: Path) -> None:
    before = descriptors()
    reader = reader_of(tmp_path / "file")
    with pytest.warns(ResourceWarning, match="file was never closed"):
        del reader
    assert descriptors() == before


@pytest.fixture
def folder(world: LocalWorld) -> Path:
    return world.fill(world.roots[0] / "one")


async def test_one_file_of_weights_comes_before_an_index(world: LocalWorld, folder: Path) -> None:
    (folder / f"{WEIGHTS_NAME}.index.json").write_bytes(b"{}")
    key = await world.source.resolve(AdapterRef(folder))
    assert [file.inode for file in key.files] == [
        (folder / name).stat().st_ino for name in (CONFIG_NAME, WEIGHTS_NAME)
    ]


async def test_many_first_reads(world: LocalWorld, folder: Path, monkeypatch: Patch) -> None:
    """A read ends before its file is closed; what was never read is never opened."""
    key, calls = await world.source.resolve(AdapterRef(folder)), list[str]()

    def counted(path: str, identity: Any) -> int:
        calls.append(Path(path).name)
        threading.Event().wait(0.02)  # others come meanwhile
        return open_same(path, identity)

    monkeypatch.setattr(local, "open_same", counted)
    unread = world.source.reopen(key)
    unread.close()
    assert calls == []
    reader = world.source.reopen(key)
    with ThreadPoolExecutor(8) as threads:
        parts = [threads.submit(read, reader, 0, 900) for _ in range(8)]
        assert len({part.result() for part in parts}) == 1
    assert calls == [WEIGHTS_NAME]
    preadv = os.preadv

    def closing(fd: int, buffers: Any, offset: int) -> int:
        reader.close()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", closing)
    assert safetensors.torch.load(read(reader, 0, reader.nbytes)).keys() == tensors(1).keys()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [touch, cut, replace])
async def test_another_version_of_any_file_is_another_adapter(
    world: LocalWorld, folder: Path, name: str, change: Callable[[Path], None]
) -> None:
    key = await world.source.resolve(AdapterRef(folder))
    change(folder / name)
    for use in uses(world, key):
        with pytest.raises(errors.IntegrityError, match=f"{name}.*again"):
            await use
    assert await world.source.resolve(AdapterRef(folder)) != key


CONTENT = weights(1, {"note": "x" * 3000})


@pytest.fixture
def hashes(tmp_path: Path, monkeypatch: Patch) -> Iterator[LocalWorld]:
    """In pieces."""
    monkeypatch.setattr(files, "HASH_STEP_BYTES", 1000)
    with nothing_left_open(tmp_path, hashes=True) as world:
        yield world


async def key_of(world: LocalWorld, name: str = "one") -> AdapterKey:
    return await world.source.resolve(world.put(name, CONFIG, CONTENT))


async def hashed(
    world: LocalWorld, key: AdapterKey, control: FetchControl | None = None
) -> Verification:
    file, control = await world.source.open(key, FetchControl()), control or FetchControl()
    with closing(file.reader):
        return await world.source.fetch_groups(file, groups_of(CONTENT), lambda *_: None, control)


def before_reads(monkeypatch: Patch, act: Callable[[int], None]) -> list[None]:
    """Call `act` with the number of each read of a file; return a list as long as their number."""
    reads, read_into = list[None](), FileReader.read_into

    def acting(reader: FileReader, *what: Any) -> None:
        act(len(reads))
        reads.append(None)
        read_into(reader, *what)

    monkeypatch.setattr(FileReader, "read_into", acting)
    return reads


@pytest.mark.parametrize("call", ["fetch_groups", "digest"])
@pytest.mark.parametrize("piece", [0, 2])
async def test_changes_while_hashed(
    hashes: LocalWorld, monkeypatch: Patch, call: str, piece: int
) -> None:
    """Also by other bytes of the same length, put in their place."""
    key, first = (
        await key_of(hashes),
        1 if call == "fetch_groups" else 0,
    )  # opening reads the header

    def change(number: int) -> None:
        if number == first + piece:
            with (hashes.roots[0] / "one" / WEIGHTS_NAME).open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")

    before_reads(monkeypatch, change)
    with pytest.raises(errors.IntegrityError, match="changed or replaced meanwhile"):
        await (hashed(hashes, key) if call == "fetch_groups" else hashes.source.digest(key))


async def test_a_digest_stays_the_same(hashes: LocalWorld, monkeypatch: Patch) -> None:
    """A disk that forgets changes no time of change; here every look at the file is the first."""
    key = await key_of(hashes)
    first = await hashed(hashes, key)
    assert await hashed(hashes, key) == first
    read_into = FileReader.read_into

    def forgotten(reader: FileReader, buffers: Sequence[memoryview], offset: int) -> None:
        read_into(reader, buffers, offset)
        if offset:
            buffers[-1][-1] ^= 1

    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_into", forgotten)
        for call in (hashed(hashes, key), hashes.source.digest(key)):
            with pytest.raises(errors.IntegrityError, match="other bytes than before"):
                await call
    newer = await key_of(hashes)
    assert newer != key
    assert await hashed(hashes, newer) == first
    monkeypatch.setattr(local, "MAX_DIGESTS", 1)  # what is not remembered is not compared
    for name in ("two", "three"):
        await hashes.source.digest(await key_of(hashes, name))
    monkeypatch.setattr(FileReader, "read_into", forgotten)
    assert await hashed(hashes, newer) != first


async def test_hashing_is_cancelled(hashes: LocalWorld, monkeypatch: Patch) -> None:
    control, key = FetchControl(), await key_of(hashes)
    reads = before_reads(monkeypatch, lambda number: control.cancel() if number == 2 else None)
    with pytest.raises(errors.FetchError, match="no caller waits"):
        await hashed(hashes, key, control)
    assert len(reads) == 3


async def test_hashing_shares_threads(hashes: LocalWorld, monkeypatch: Patch) -> None:
    """However large the file is: its pieces queue behind what was asked for meanwhile."""
    monkeypatch.setattr(files, "HASH_STEP_BYTES", 16)
    key, others = await key_of(hashes), 0
    hashing = asyncio.ensure_future(hashed(hashes, key))
    while not hashing.done():
        await hashes.source.resolve(AdapterRef("./one"))
        others += 1
    assert (await hashing).kind == "transport"
    assert others > 10  # half a dozen, if one step hashed it all


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path, immutable=True) as world:
        yield world


async def is_held(source: LocalSource, id: str | Path, base: Path) -> bool:
    key = await source.resolve(AdapterRef(id))
    file = await source.open(key, FetchControl())
    file.reader.close()
    with mapped(await held(source, key, holdable=file.holdable)) as pages:
        assert bool(pages) is file.holdable
        assert len(maps_below(base)) == file.holdable
    assert maps_below(base) == []
    return file.holdable


async def test_only_what_lies_in_an_immutable_root_is_held(tmp_path: Path) -> None:
    with nothing_left_open(tmp_path) as world, ThreadPoolExecutor(1) as threads:
        first, second = world.roots
        roots = (first, LocalRoot(second, immutable=True))
        source = LocalSource(roots=roots, limits=LIMITS, threads=threads)
        for folder in (first / "one", second / "a" / "two", world.outside / "three", second):
            world.fill(folder)
        beside = world.fill(second.with_name(f"{second.name}2") / "four")
        (second / "out").symlink_to(world.outside / "three")
        (world.outside / "in").symlink_to(second / "a" / "two")
        for id in (second / "a" / "two", "./a/two", world.outside / "in", second):
            assert await is_held(source, id, tmp_path)
        for id in ("./one", first / "one", world.outside / "three", beside, second / "out"):
            assert not await is_held(source, id, tmp_path)


@pytest.mark.parametrize(("immutable", "held"), [("", True), ("snapshots", False)])
async def test_of_a_hub_cache_the_blob_counts(tmp_path: Path, immutable: str, held: bool) -> None:
    with nothing_left_open(tmp_path) as world, ThreadPoolExecutor(1) as threads:
        repository = world.roots[0] / "models--o--n"
        folder = world.fill(repository / "snapshots" / ("c" * 40))
        blob = repository / "blobs" / ("b" * 64)
        blob.parent.mkdir()
        (folder / WEIGHTS_NAME).rename(blob)
        (folder / WEIGHTS_NAME).symlink_to(os.path.relpath(blob, folder))
        roots = (world.roots[0], LocalRoot(repository / immutable, immutable=True))
        source = LocalSource(roots=roots, limits=LIMITS, threads=threads)
        for id in (str(folder), folder):
            assert await is_held(source, id, tmp_path) is held


async def test_a_file_outside_of_the_root_is_not_held(host: LocalWorld) -> None:
    folder, other = host.fill(host.roots[0] / "one"), host.fill(host.outside / "two")
    (folder / WEIGHTS_NAME).unlink()
    (folder / WEIGHTS_NAME).symlink_to(other / WEIGHTS_NAME)
    assert not await is_held(host.source, folder, host.outside.parent)
