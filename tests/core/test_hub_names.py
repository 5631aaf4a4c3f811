"""The hub's names, worked out by hand and by huggingface_hub."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.core.hub_names import (
    adapter_files,
    blob_name,
    digest_of_blob,
    digest_of_etag,
    hub_file_name,
    is_commit,
    is_revision,
    repo_folder,
)

SHA1, SHA256 = "0123456789" * 4, "0123456789abcdef" * 4
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def shard(number: int, count: int) -> str:
    return f"adapter_model-{number:05d}-of-{count:05d}.safetensors"


NO_REPOSITORIES = [
    *("name", "a/b/c", "a--b/c", "a/b--c", "a..b/c", "../c", "a/..", "/c", "a/", "a/.c", "a/-c"),
    *("", "a b/c", "a/b\n", "a/\0", "é/b", f"a/{'b' * 97}", "s3://a/b"),
]


def test_folders_are_named_as_the_library_names_them() -> None:
    for source in ("org/name", "a/b.c-d_e", "O_1/x"):
        assert repo_folder(source) == repo_folder_name(repo_id=source, repo_type="model")
    assert [source for source in NO_REPOSITORIES if repo_folder(source) is not None] == []


def test_commits_and_revisions() -> None:
    assert is_commit(SHA1)
    assert constants.REGEX_COMMIT_OID.fullmatch(SHA1)
    assert not any(map(is_commit, (SHA1[:-1], SHA1.upper() + "A", SHA256, "", f"{SHA1}\n")))
    assert all(map(is_revision, ("main", "v1.0", "refs/pr/1", "a/b", "..a", "a..", SHA1)))
    bad = ("", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "a/.", "a b", "a\0", "a\n", "a\\b")
    assert not any(map(is_revision, (*bad, "a" * 256, "a/" * 600 + "a")))


def test_what_etags_and_blobs_say() -> None:
    assert digest_of_etag(SHA256) == Digest("sha256", SHA256)
    assert digest_of_etag(SHA1) == Digest("git-sha1", SHA1)
    for text in (None, "", SHA1[:-1], SHA256.upper(), f"{SHA256}0", "../x", f"transport-{SHA256}"):
        assert digest_of_etag(text) is None
    kinds = [Digest("sha256", SHA256), Digest("git-sha1", SHA1), Digest("transport", SHA256)]
    assert [blob_name(each) for each in kinds] == [SHA256, SHA1, f"transport-{SHA256}"]
    assert [digest_of_blob(blob_name(each)) for each in kinds] == kinds
    for name in (f"transport-{SHA1}", "transport-", f"other-{SHA256}", f"{SHA1}.incomplete"):
        assert digest_of_blob(name) is None


def test_files_of_an_adapter() -> None:
    one = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}
    several = {
        CONFIG_FILE: CONFIG,
        INDEX_FILE: INDEX,
        FileRole("weights", 1): shard(1, 2),
        FileRole("weights", 2): shard(2, 2),
    }
    assert adapter_files(["README.md", WEIGHTS, CONFIG]) == one
    found = adapter_files(sorted(several.values(), reverse=True))
    assert list(found.items()) == list(several.items())
    assert {role: hub_file_name(role, 2) for role in several} == several
    assert adapter_files([*one.values(), *several.values()]) == one


NO_ADAPTERS = [
    *([], [CONFIG], [WEIGHTS], [CONFIG, INDEX], [CONFIG, shard(1, 1)], [INDEX, shard(1, 1)]),
    [CONFIG, INDEX, shard(1, 2)],
    [CONFIG, INDEX, shard(1, 2), shard(3, 2)],
    [CONFIG, INDEX, shard(1, 2), shard(2, 2), shard(1, 1)],
    [CONFIG, INDEX, shard(1, 2), shard(2, 2), shard(1, 3)],
]


def test_files_that_are_no_whole_adapter() -> None:
    assert [names for names in NO_ADAPTERS if adapter_files(names)] == []
