"""The standard hub cache: what other tools have stored is read, and nothing is written there."""

import os
import shutil
import stat
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import hub_cache as by_hand
import pytest
from disk_cache_world import content_of, put
from hub_stand_in import ADAPTER, REPO, WEIGHTS, HubStandIn, git_sha1, is_large
from huggingface_hub import constants, snapshot_download
from source_inputs import read
from web_folder import CONFIG, INDEX
from web_folder import WEIGHTS as NAME

from lorax_async import AdapterRef, FetchError, IntegrityError, InternalError
from lorax_async.cache.base import CacheEntry, CacheKey
from lorax_async.cache.disk_cache import DiskCache, DiskDownload
from lorax_async.formats.digests import Digest
from lorax_async.formats.peft_names import WEIGHTS_FILE
from lorax_async.lifecycle.policies import policy
from lorax_async.remote.hub import StandardHubCache, digest_of_etag, is_commit
from lorax_async.remote.opening import question_of

pytestmark = pytest.mark.usefixtures("nothing_left")

COMMIT = "c0ffee" + 34 * "0"
KEY = CacheKey(REPO, COMMIT)


def opened(folder: Path, own: str = "") -> StandardHubCache:
    return StandardHubCache(folder, lambda: own)


def digest_of(name: str, content: bytes) -> Digest:
    """As the hub names it."""
    if is_large(name):
        return Digest("sha256", sha256(content).hexdigest())
    return Digest("git-sha1", git_sha1(content))


def contents(entry: CacheEntry | None) -> dict[str, bytes]:
    assert entry is not None
    return {file.name: content_of(entry, file.name) for file in entry.record.files}


def tree(folder: Path) -> dict[str, tuple[str, object]]:
    """Everything in there: link targets, contents and modes."""
    found: dict[str, tuple[str, object]] = {}
    for path in sorted(folder.rglob("*")):
        mode, name = oct(stat.S_IMODE(path.lstat().st_mode)), str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        else:
            found[name] = (mode, None if path.is_dir() else path.read_bytes())
    return found


SHA1, SHA256 = "0123456789" * 4, "0123456789abcdef" * 4


def test_commits_and_digests() -> None:
    assert is_commit(SHA1)
    assert constants.REGEX_COMMIT_OID.fullmatch(SHA1)
    assert not any(map(is_commit, (SHA1[:-1], SHA1.upper() + "A", SHA256, "", f"{SHA1}\n")))
    assert digest_of_etag(SHA256) == Digest("sha256", SHA256)
    assert digest_of_etag(SHA1) == Digest("git-sha1", SHA1)
    for text in (None, "", SHA1[:-1], SHA256.upper(), f"{SHA256}0", "../x", f"{SHA1}.incomplete"):
        assert digest_of_etag(text) is None


def test_what_huggingface_hub_stored_is_found(hub_client: Path) -> None:
    with HubStandIn() as hub:
        commit = hub.put(REPO, {**ADAPTER, INDEX: b"{}", "README.md": b"not for us"})
        snapshot = snapshot_download(REPO, cache_dir=hub_client, endpoint=hub.endpoint)
    before, key = tree(hub_client), CacheKey(REPO, commit)
    cache = opened(hub_client)
    for check in (False, True):
        entry = cache.open(key, check=check)
        assert contents(entry) == ADAPTER
        assert entry is not None
        found = {file.name: file.digest for file in entry.record.files}
        assert found == {name: digest_of(name, content) for name, content in ADAPTER.items()}
        assert (entry.record.source, entry.record.version) == (REPO, commit)
        assert entry.folder == snapshot
        assert not entry.mappable, "others may change it"
        with pytest.raises(InternalError, match=r"index\.json"):
            entry.reader(INDEX)
        entry.close()
    assert tree(hub_client) == before


def test_where_there_is_nothing(tmp_path: Path, hub_client: Path) -> None:
    assert opened(tmp_path / "no folder").open(KEY) is None
    assert opened(tmp_path / "no folder").commit_of(REPO, "main") is None
    assert not (tmp_path / "no folder").exists()
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    for source, version in (
        *(("s3://bucket/name", COMMIT), (REPO, "main"), (REPO, COMMIT.upper())),
        *(("../name", COMMIT), ("org/name/..", COMMIT), ("a--b/c", COMMIT), ("org/na\0me", COMMIT)),
    ):
        assert opened(tmp_path).open(CacheKey(source, version)) is None


def test_altered_bytes_are_noticed_and_remembered(tmp_path: Path) -> None:
    """Who asked for a check is not given them again; once they are right, they are."""
    blob = (by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT) / NAME).resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"x")
    cache = opened(tmp_path)
    assert cache.open(KEY) is not None, "nobody looked"
    assert cache.open(KEY, check=True) is None
    assert cache.open(KEY) is None
    blob.unlink()
    blob.write_bytes(WEIGHTS)
    assert contents(cache.open(KEY)) == ADAPTER


def test_which_commit_a_revision_was(tmp_path: Path) -> None:
    known = ("main", "refs/pr/1", "v1.0", "feature/x")
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT, refs=known)
    refs = tmp_path / "models--org--name" / "refs"
    for name, content in (
        *(("odd", b"../../../etc"), ("long", COMMIT.encode() + b"0"), ("bytes", b"\xff" * 40)),
        *(("absent", b"d" * 40), ("name", b"main")),
    ):
        (refs / name).write_bytes(content)
    (tmp_path / "models--org--name" / "outside").write_text(COMMIT)
    (tmp_path / "models--org--name" / "snapshots" / "branch").symlink_to(COMMIT)
    cache = opened(tmp_path)
    assert [cache.commit_of(REPO, each) for each in (*known, COMMIT)] == [COMMIT] * 5
    for revision in (
        *("odd", "long", "bytes", "absent", "name", "nix", "refs", "refs/pr", "main/x", "branch"),
        *("../outside", "refs/../../outside", "", "/", "a//b", ".", "x\0", "a\\b", "a" * 300),
        "a/" * 600 + "a",
    ):
        assert cache.commit_of(REPO, revision) is None
    for source in ("../models--org--name", "org/na\nme", "name"):
        assert cache.commit_of(source, "main") is None


def test_what_other_tools_stored_is_for_this_machines_token(tmp_path: Path) -> None:
    """This machine, on whose authority other tools stored it; others when their source says so."""
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT)
    os.utime(tmp_path / "models--org--name/blobs" / sha256(WEIGHTS).hexdigest(), (9, 9))
    config = (tmp_path / f"models--org--name/snapshots/{COMMIT}/{CONFIG}").resolve()
    os.utime(config, (time.time() - 1_000,) * 2)
    cache = opened(tmp_path, "own")
    entry = cache.open(KEY)
    assert entry is not None
    age = entry.last_access("own")
    assert age is not None
    assert 999 < age < 2_000
    assert (entry.last_access(""), entry.last_access("other")) == (None, None)
    entry.record_access("other")
    again = cache.open(KEY)
    assert again is not None
    age = again.last_access("other")
    assert age is not None
    assert 0 <= age < 60
    assert again.last_access("") is None
    anew = opened(tmp_path, "own").open(KEY)
    assert anew is not None
    assert anew.last_access("other") is None, "nothing is noted in there"


@pytest.mark.parametrize("broken", ["os.open", "os.listdir"])
def test_an_unreadable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Files that this process may not read are as good as absent; a broken disk is an error."""
    by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT, refs=("main",))
    cache, code = opened(tmp_path), 13
    name = broken.removeprefix("os.")
    works = getattr(os, name)

    def fail(path: str, *args: object, **kwargs: object) -> object:
        if "snapshots" in str(path):
            raise OSError(code, "no")
        return works(path, *args, **kwargs)

    assert cache.open(KEY) is not None
    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        assert cache.open(KEY) is None
        code = 5
        with pytest.raises(FetchError, match=r"hub cache cannot be read \(EIO\)"):
            cache.open(KEY)
        if name == "listdir":
            with pytest.raises(FetchError, match=r"hub cache cannot be read \(EIO\)"):
                cache.commit_of(REPO, "main")


def _linked(target: str) -> Callable[[Path], None]:
    def spoil(snapshot: Path) -> None:
        (snapshot / NAME).unlink()
        (snapshot / NAME).symlink_to(target)

    return spoil


def _blob(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(snapshot: Path) -> None:
        blob = (snapshot / NAME).resolve()
        blob.unlink()
        make(blob)

    return spoil


def _moved(part: str) -> Callable[[Path], None]:
    """A folder of the repository is a link out of the cache, where all links lead to blobs."""

    def spoil(snapshot: Path) -> None:
        repo = snapshot.parent.parent
        outside = repo.parent.parent / "outside"
        shutil.copytree(repo, outside, symlinks=True)
        shutil.rmtree(repo / part)
        (repo / part).symlink_to(outside / part)

    return spoil


SPOILT = {
    "no config": lambda at: (at / CONFIG).unlink(),
    "an index in place of the weights": lambda at: (at / NAME).rename(at / INDEX),
    "no blob": lambda at: (at / NAME).resolve().unlink(),
    "a file in place of a link": lambda at: (at / NAME).unlink() or (at / NAME).write_bytes(b"x"),
    "a link to a file outside": _linked("../../../secret"),
    "an absolute link": _linked("/etc/passwd"),
    "a link out through the blobs": _linked("../../blobs/../../secret"),
    "an absolute link to the name of a blob": _linked(f"/blobs/{sha256(WEIGHTS).hexdigest()}"),
    "a link to another repository": _linked(
        f"../../../models--org--b/blobs/{sha256(WEIGHTS).hexdigest()}"
    ),
    "a blob without a digest": _linked("../../blobs/adapter_model.safetensors-and-more-of-it-1234"),
    "a link to a link outside": _blob(lambda blob: blob.symlink_to("../../secret")),
    "a link to an absolute link": _blob(lambda blob: blob.symlink_to("/etc/passwd")),
    "a link to a blob of another repository": _blob(
        lambda blob: blob.symlink_to(f"../../models--org--b/blobs/{sha256(WEIGHTS).hexdigest()}")
    ),
    "a shared blob under another's letters": _blob(
        lambda blob: blob.symlink_to(f"../../blobs/ab/{'c' * 64}")
    ),
    "a FIFO, which would wait for ever": _blob(os.mkfifo),
    "a folder": _blob(Path.mkdir),
    "a link to itself": _blob(lambda blob: blob.symlink_to(blob.name)),
    **{f"its {part} outside": _moved(part) for part in ("blobs", "snapshots")},
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_is_not_whole_or_leads_elsewhere_is_not_there(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """It is as good as not there: it will be fetched from the hub."""
    folder = tmp_path / "hub"
    snapshot = by_hand.put(folder, REPO, ADAPTER, commit=COMMIT)
    by_hand.put(folder, "org/b", {NAME: WEIGHTS}, commit=COMMIT)
    for secret in (tmp_path / "secret", folder / "secret"):
        secret.write_bytes(WEIGHTS)
    shared = folder / "blobs" / "ab" / ("c" * 64)
    shared.parent.mkdir(parents=True)
    shared.write_bytes(WEIGHTS)
    cache = opened(folder)
    assert cache.open(KEY) is not None
    spoil(snapshot)
    assert cache.open(KEY) is None


def test_a_blob_that_repositories_share(tmp_path: Path) -> None:
    """As huggingface_hub keeps files of the hub's newer storage."""
    blob = (by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT) / NAME).resolve()
    shared = tmp_path / "blobs" / "ab" / f"ab{'c' * 62}"
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{shared.name}")
    other = CacheKey("org/other", COMMIT)
    wrong = (
        by_hand.put(tmp_path, other.source, {**ADAPTER, NAME: WEIGHTS[:-1]}, commit=COMMIT) / NAME
    ).resolve()
    wrong.unlink()
    wrong.symlink_to(f"../../blobs/ab/{shared.name}")  # has not the digest that this name promises
    time.sleep(0.03)
    cache = opened(tmp_path)
    entry = cache.open(KEY, check=True)
    assert contents(entry) == ADAPTER
    assert entry is not None
    assert entry.record.files[1].digest == digest_of(NAME, WEIGHTS)
    assert entry.is_verified
    unchecked = cache.open(other)
    assert unchecked is not None
    assert not unchecked.is_verified
    assert cache.open(other, check=True) is None
    assert cache.open(KEY) is not None


def test_the_repository_may_lie_elsewhere(tmp_path: Path) -> None:
    by_hand.put(tmp_path / "other disk", REPO, ADAPTER, commit=COMMIT)
    (tmp_path / "hub").mkdir()
    link = tmp_path / "hub" / "models--org--name"
    link.symlink_to(tmp_path / "other disk" / link.name)
    assert contents(opened(tmp_path / "hub").open(KEY)) == ADAPTER


@pytest.mark.parametrize("replaced", [False, True])
def test_what_is_removed_or_replaced_while_it_is_used(tmp_path: Path, replaced: bool) -> None:
    blob = (by_hand.put(tmp_path, REPO, ADAPTER, commit=COMMIT) / NAME).resolve()
    cache = opened(tmp_path)
    entry = cache.open(KEY)
    assert entry is not None
    early, late = entry.reader(WEIGHTS_FILE), entry.reader(WEIGHTS_FILE)
    assert read(early, 0, 5) == WEIGHTS[:5]
    shutil.rmtree(tmp_path / "models--org--name") if not replaced else blob.unlink()
    assert cache.open(KEY) is None
    if replaced:
        blob.write_bytes(WEIGHTS)
    with pytest.raises(IntegrityError, match=f"{NAME} was changed or replaced"):
        read(late, 0, 5)
    late.close()
    early.close()


def stored(cache: DiskCache, key: CacheKey) -> CacheEntry:
    download = cache.try_begin(key, "")
    assert isinstance(download, DiskDownload), "there is an entry already"
    try:
        for name, content in ADAPTER.items():
            file = download.file(name, len(content), digest_of(name, content))
            put(file, content, file.missing())
        return download.publish()
    finally:
        download.close()


def test_downloads_go_to_our_own_cache(tmp_path: Path, hub_client: Path) -> None:
    by_hand.put(hub_client, REPO, ADAPTER, commit=COMMIT, refs=("main", "refs/pr/1"))
    before, other = tree(hub_client), CacheKey(REPO, "d" * 40)
    cache = DiskCache(tmp_path / "disk", 1 << 30, policy("lru"), opened(hub_client))
    tried = cache.try_begin(KEY, "somebody")
    for found in (cache.open(KEY), tried):
        assert isinstance(found, CacheEntry)
        assert contents(found) == ADAPTER
        found.close()
    assert cache.budget.used() == 0
    entry = stored(cache, other)
    assert entry.mappable
    entry.close()
    assert cache.budget.used() == sum(map(len, ADAPTER.values()))

    def last(ref: AdapterRef) -> tuple[str, str] | None:
        return cache.last_version(question_of(ref))

    for revision in (None, "refs/pr/1", COMMIT):
        assert last(AdapterRef(REPO, "hub", revision)) == (REPO, COMMIT)
    for ref in (
        *(AdapterRef(REPO, "hub", "v1.0"), AdapterRef(REPO, "s3")),
        *(AdapterRef("../../etc", "hub"), AdapterRef("org/na\nme", "hub")),
    ):
        assert last(ref) is None
    cache.note_version(question_of(AdapterRef(REPO, "hub")), REPO, other.version)
    assert last(AdapterRef(REPO, "hub")) == (REPO, other.version), "our own answer is first"
    cache.invalidate(other)
    assert cache.open(other) is None
    cache.invalidate(KEY)
    assert tree(hub_client) == before


def test_wrong_bytes_in_the_hub_cache_are_fetched_again(tmp_path: Path, hub_client: Path) -> None:
    blob = (by_hand.put(hub_client, REPO, ADAPTER, commit=COMMIT) / NAME).resolve()
    blob.write_bytes(WEIGHTS[::-1])
    cache = DiskCache(tmp_path / "disk", 1 << 30, policy("lru"), opened(hub_client))
    assert cache.open(KEY, check=True) is None
    stored(cache, KEY).close()
    entry = cache.open(KEY, check=True)
    assert contents(entry) == ADAPTER
    assert entry is not None
    entry.close()
    assert blob.read_bytes() == WEIGHTS[::-1], "it is never written"
