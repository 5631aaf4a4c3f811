"""Local folders: who may name them, what may lie in them, and files that change or are hashed."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
from local_world import (
    CONFIG_NAME,
    FILES,
    LIMITS,
    WEIGHTS_NAME,
    LocalWorld,
    descriptors,
    nothing_left_open,
    put_split,
    refusal,
)
from source_inputs import CONFIG, groups_of, header_bytes, read, tensors, weights

from common import Run
from lorax_async import errors, files
from lorax_async.concurrency import FetchControl
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.files import FileReader, identity_of, open_same
from lorax_async.sources import local, local_folder
from lorax_async.sources.local import LocalSource
from lorax_async.types import AdapterKey, AdapterRef, Verification
from split_files import INDEX

Patch = pytest.MonkeyPatch

COMMIT, BLOB = "c" * 40, "b" * 64

SECRET = b"the secret of another tenant"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


async def test_every_spelling_of_a_folder_gives_one_key(world: LocalWorld) -> None:
    folder = world.fill(world.roots[1] / "o rg" / "ü")
    (world.roots[0] / "link").symlink_to(folder)
    spellings: list[AdapterRef] = [
        AdapterRef(folder),
        AdapterRef(Path(os.path.relpath(folder))),
        AdapterRef(folder, source="local", token="t"),
        AdapterRef(str(folder)),
        AdapterRef(f"{folder}/"),
        AdapterRef(f"{folder}/../ü"),
        AdapterRef("./o rg/ü"),
        AdapterRef("./link"),
        AdapterRef("o rg/ü", source="local"),
        AdapterRef(folder.as_uri()),
        AdapterRef("FILE:" + folder.as_uri()[7:]),
        AdapterRef("file://localhost" + folder.as_uri()[7:]),
    ]

    keys = {await world.source.resolve(ref) for ref in spellings}
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
    error = refusal(world, ref)
    assert type(error) is errors.InvalidAdapterIdError
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
    refusals = [refusal(world, id) for id in ids]
    assert {type(error) for error in refusals} == {errors.AccessDeniedError}
    (text,) = {str(error) for error in refusals}
    assert "local_roots" in text
    assert "pathlib.Path" in text
    assert {error.__cause__ or error.__context__ for error in refusals} == {None}


@pytest.mark.parametrize("id", ["./nothing", "./a/b", "./" + "a" * 300])
def test_inside_a_root_a_missing_folder_is_not_found(world: LocalWorld, id: str) -> None:
    assert type(refusal(world, id)) is errors.AdapterNotFoundError


@pytest.mark.parametrize("trusted", [True, False])
def test_an_unreadable_link(world: LocalWorld, monkeypatch: Patch, trusted: bool) -> None:
    """As /proc/1/root, which no path leads through: not even where it leads may be asked."""
    place = "/proc/1/root"
    refused = PermissionError(errno.EACCES, "Permission denied", place)

    def no_link(*_: object, **__: object) -> NoReturn:
        raise refused

    monkeypatch.setattr(os.path, "realpath", no_link)
    monkeypatch.setattr(local_folder, "located", no_link)
    error = refusal(world, Path(place) if trusted else place)
    assert type(error) is errors.AccessDeniedError
    assert ("give it permission" if trusted else "local_roots only") in str(error)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, INDEX, FILES[3]])
def test_links_stay_in_the_folder(world: LocalWorld, run: Run, name: str) -> None:
    fill = world.fill if name == WEIGHTS_NAME else put_split
    other, folder = fill(world.roots[0] / "other"), fill(world.roots[0] / "one")
    (folder / "sub").mkdir()
    (folder / name).rename(folder / "sub" / "w")
    (folder / name).symlink_to("sub/w")
    run(world.source.resolve(AdapterRef("./one")))
    texts = set()
    for target in (other / WEIGHTS_NAME, other / "nothing", other, "/dev/null", name):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        error = refusal(world, "./one")
        assert type(error) is errors.AccessDeniedError
        texts.add(str(error))
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
        assert type(refusal(world, str(folder))) is errors.AccessDeniedError


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name has at most 107 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


ODD: list[tuple[Callable[[Path], None], str]] = [
    (fifo, "FIFO"),
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
    error = refusal(world, path.parent)
    assert type(error) is errors.AdapterFormatError
    assert name in error.problem
    assert word in error.problem


@pytest.mark.parametrize(
    ("present", "kind", "words"),
    [
        ([], errors.AdapterNotFoundError, [CONFIG_NAME, WEIGHTS_NAME]),
        ([CONFIG_NAME], errors.AdapterNotFoundError, [WEIGHTS_NAME]),
        ([WEIGHTS_NAME], errors.AdapterNotFoundError, [CONFIG_NAME]),
        ([CONFIG_NAME, "adapter_model.bin"], errors.AdapterFormatError, ["pickle", "re-save"]),
        (
            [CONFIG_NAME, f"{WEIGHTS_NAME}.index.json"],
            errors.AdapterFormatError,
            ["index.json", "names no tensors"],
        ),
    ],
)
def test_missing_files(world: LocalWorld, present: list[str], kind: type, words: list[str]) -> None:
    for name in present:
        (world.folder("one") / name).write_bytes(b"{}")
    world.folder("one")
    error = refusal(world, "./one")
    assert type(error) is kind
    assert all(word in error.problem for word in words)
    assert not any(name in error.problem for name in present[:1])


async def test_limits_are_the_last_size_that_passes(world: LocalWorld) -> None:
    path = world.fill(world.roots[0] / "one")
    config = CONFIG.ljust(LIMITS.max_config_bytes)
    (path / CONFIG_NAME).write_bytes(config)
    file = await world.source.open(await world.source.resolve(AdapterRef(path)), FetchControl())
    assert file.config == config
    file.reader.close()
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
def test_what_the_process_may_not_read(denied: str, step: str) -> None:
    async def main(base: Path) -> None:
        source = LocalSource(roots=[base], limits=LIMITS, threads=threads)
        key = await source.resolve(AdapterRef(base / "one"))
        mode = 0o000 if denied else 0o600
        (base / "one" / denied).chmod(mode)
        if step == "resolve":
            for id in (base / "one", "./one"):
                with pytest.raises(errors.AccessDeniedError, match="permission"):
                    await source.resolve(AdapterRef(id))
        else:
            # A new mode is another version of a file.
            with pytest.raises(errors.IntegrityError if denied else errors.AccessDeniedError):
                await source.open(key, FetchControl())

    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(2, initializer=become_nobody) as threads,
    ):
        base = Path(name).resolve()
        (base / "one").mkdir()
        (base / "one" / CONFIG_NAME).write_bytes(CONFIG)
        safetensors.torch.save_file(tensors(1), base / "one" / WEIGHTS_NAME)
        (base / "one" / WEIGHTS_NAME).chmod(0o644)
        base.chmod(0o755)
        asyncio.run(main(base))


def retarget(link: Path, target: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


def test_a_link_that_swings_never_lets_a_secret_out(world: LocalWorld) -> None:
    folder = world.fill(world.roots[0] / "one")
    secret = world.outside / "secret"
    secret.write_bytes(SECRET)
    (folder / CONFIG_NAME).rename(folder / "mine.json")
    retarget(folder / CONFIG_NAME, folder / "mine.json")
    stop, outcomes = threading.Event(), set[object]()

    def swing() -> None:
        while not stop.is_set():
            for target in (secret, folder / "mine.json"):
                retarget(folder / CONFIG_NAME, target)

    async def main() -> None:
        for turn in range(20_000):
            if turn > 300 and len(outcomes) > 1:
                break
            try:
                file = await world.source.open(
                    await world.source.resolve(AdapterRef("./one")), FetchControl()
                )
            except (errors.AccessDeniedError, errors.IntegrityError) as error:
                outcomes.add(type(error))
            else:
                outcomes.add(file.config)
                file.reader.close()

    thread = threading.Thread(target=swing)
    thread.start()
    try:
        asyncio.run(main())
    finally:
        stop.set()
        thread.join()
    assert CONFIG in outcomes
    assert errors.AccessDeniedError in outcomes
    assert outcomes <= {CONFIG, errors.AccessDeniedError, errors.IntegrityError}


def reads_reopened(world: LocalWorld) -> Callable[[AdapterKey], Coroutine[Any, Any, None]]:
    async def step(key: AdapterKey) -> None:
        reader = world.source.reopen(key)
        try:
            reader.read_into([memoryview(bytearray(8))], 0)
        finally:
            reader.close()

    return step


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
async def test_a_fifo_that_takes_the_files_place(world: LocalWorld, name: str) -> None:
    path = world.fill(world.roots[0] / "one") / name
    key = await world.source.resolve(AdapterRef("./one"))
    path.unlink()
    steps = (lambda: world.source.open(key, FetchControl()), lambda: reads_reopened(world)(key))
    for there in (True, False):
        if there:
            os.mkfifo(path)
        for step in (*steps, lambda: world.source.populate(key)):
            with pytest.raises(errors.IntegrityError, match=name):
                await step()
        path.unlink(missing_ok=True)


async def test_a_config_changes_meanwhile(world: LocalWorld, monkeypatch: Patch) -> None:
    path, real = world.fill(world.roots[0] / "one") / CONFIG_NAME, os.fstat
    looks: list[int] = []

    def edited(fd: int) -> os.stat_result:
        """The last look at the file is after the edit."""
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            looks.append(fd)
            if len(looks) == 2:
                path.write_bytes(CONFIG.replace(b"8", b"9"))
        return real(fd)

    key = await world.source.resolve(AdapterRef("./one"))
    monkeypatch.setattr(os, "fstat", edited)
    with pytest.raises(errors.IntegrityError, match=r"adapter_config\.json.*again"):
        await world.source.open(key, FetchControl())
    assert len(looks) >= 2


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[FileReader]:
    before = descriptors()
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    identity = identity_of(path.stat())
    reader = FileReader(lambda: open_same(str(path), identity), identity, "file")
    read(reader, 0, 0)  # the first read opens
    yield reader
    reader.close()
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
    reader.read_rows(memoryview(content), 7, 5, 100)
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
    for reading in (lambda: read(reader, 0, 1), lambda: reader.read_rows(rows, 0, 2, 9)):
        with pytest.raises(errors.FetchError, match=errno.errorcode[number]) as caught:
            reading()
        assert type(caught.value) is kind
        assert isinstance(caught.value.__cause__, OSError)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def touch(path: Path) -> None:
    os.utime(path)


def rewrite(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [truncate, touch, rewrite, grow, Path.unlink])
def test_a_changed_file(reader: FileReader, tmp_path: Path, change: Callable[[Path], None]) -> None:
    read(reader, 0, 10)
    threading.Event().wait(0.02)  # the clock of files may tick that slowly
    change(tmp_path / "file")
    with pytest.raises(errors.IntegrityError, match="again"):
        read(reader, 50, 150)


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


def test_a_forgotten_reader_is_closed_and_warns(tmp_path: Path) -> None:
    before = descriptors()
    (tmp_path / "file").write_bytes(b"x")
    identity = identity_of((tmp_path / "file").stat())
    reader = FileReader(lambda: open_same(str(tmp_path / "file"), identity), identity, "file")
    read(reader, 0, 0)
    with pytest.warns(ResourceWarning, match="unclosed reader of file"):
        del reader
    assert descriptors() == before


CONTENT = weights(1, {"note": "x" * 3000})


class HashingWorld(LocalWorld):
    def __init__(self, base: Path, threads: ThreadPoolExecutor) -> None:
        super().__init__(base, threads)
        self.source = LocalSource(roots=self.roots, limits=LIMITS, threads=threads, hashes=True)

    @property
    def path(self) -> Path:
        return self.roots[0] / "one" / WEIGHTS_NAME

    async def key(self) -> AdapterKey:
        return await self.source.resolve(self.put("one", CONFIG, CONTENT))

    async def bring(
        self, key: AdapterKey, seen: list[int] | None = None, control: FetchControl | None = None
    ) -> Verification:
        file = await self.source.open(key, FetchControl())
        arrived: Callable[[int], None] = ([] if seen is None else seen).append
        try:
            return await self.source.bring(
                file, groups_of(CONTENT), arrived, control or FetchControl()
            )
        finally:
            file.reader.close()


@pytest.fixture
def hashes(tmp_path: Path) -> Iterator[HashingWorld]:
    with nothing_left_open(tmp_path), ThreadPoolExecutor(2) as threads:
        (tmp_path / "more").mkdir()
        yield HashingWorld(tmp_path / "more", threads)


class Reading:
    """Reads of any file; `before` is called with the number of each."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.count = 0
        self._before = before
        self._read = FileReader.read_into

    def __get__(self, reader: Any, _: Any) -> Callable[..., None]:
        def read_into(buffers: Any, offset: int) -> None:
            self._before(self.count)
            self.count += 1
            self._read(reader, buffers, offset)

        return read_into


@pytest.fixture
def small_pieces(monkeypatch: Patch) -> None:
    monkeypatch.setattr(files, "HASH_STEP_BYTES", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("call", ["bring", "digest"])
@pytest.mark.parametrize("piece", [0, 2])
async def test_changes_while_hashed(
    hashes: HashingWorld, monkeypatch: Patch, call: str, piece: int
) -> None:
    """Also by other bytes of the same length, put in their place."""

    def change(number: int) -> None:
        if number == first + piece:
            with hashes.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")

    first = 1 if call == "bring" else 0  # opening reads the header
    reading = Reading(change)
    key = await hashes.key()
    monkeypatch.setattr(FileReader, "read_into", reading)
    with pytest.raises(IntegrityError, match="changed or replaced meanwhile"):
        await (hashes.bring(key) if call == "bring" else hashes.source.digest(key))


async def test_a_digest_stays_the_same(hashes: HashingWorld, monkeypatch: Patch) -> None:
    """A disk that forgets changes no time of change; here every look at the file is the first."""
    key = await hashes.key()
    first = await hashes.bring(key)
    assert await hashes.bring(key) == first
    read_into = FileReader.read_into

    def forgotten(reader: FileReader, buffers: Sequence[memoryview], offset: int) -> None:
        read_into(reader, buffers, offset)
        if offset:
            buffers[-1][-1] ^= 1

    monkeypatch.setattr(files, "HASH_STEP_BYTES", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_into", forgotten)
        for call in (hashes.bring(key), hashes.source.digest(key)):
            with pytest.raises(IntegrityError, match="other bytes than before"):
                await call
    newer = await hashes.key()
    assert newer != key
    assert await hashes.bring(newer) == first
    monkeypatch.setattr(local, "MAX_DIGESTS", 1)  # what is not remembered is not compared
    for name in ("two", "three"):
        await hashes.source.digest(await hashes.source.resolve(hashes.put(name, CONFIG, CONTENT)))
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_into", forgotten)
        assert await hashes.bring(newer) != first


@pytest.mark.usefixtures("small_pieces")
async def test_hashing_is_cancelled(hashes: HashingWorld, monkeypatch: Patch) -> None:
    control = FetchControl()
    reading = Reading(lambda number: control.end() if number == 2 else None)
    key = await hashes.key()
    monkeypatch.setattr(FileReader, "read_into", reading)
    with pytest.raises(FetchError, match="no caller waits"):
        await hashes.bring(key, control=control)
    assert reading.count == 3


async def test_hashing_shares_threads(hashes: HashingWorld, monkeypatch: Patch) -> None:
    """However large the file is: its pieces queue behind what was asked for meanwhile."""
    monkeypatch.setattr(files, "HASH_STEP_BYTES", 64)
    key, others = await hashes.key(), 0
    hashed = asyncio.ensure_future(hashes.bring(key))
    while not hashed.done():
        await hashes.source.resolve(AdapterRef("./one"))
        others += 1
    assert (await hashed).kind == "transport"
    assert others > 10
