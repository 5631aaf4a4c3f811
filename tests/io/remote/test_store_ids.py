"""Which folder an id of an object store means, and what is none."""

from __future__ import annotations

import pytest

from lorax_async.adapter import AdapterRef
from lorax_async.errors import InvalidAdapterIdError, UsageError
from lorax_async.io.remote.store_ids import Folder, digest_of, folder_of, is_version, version_of


@pytest.mark.parametrize(
    ("ref", "folder"),
    [
        (AdapterRef("s3://my-bucket/a/b/"), Folder("s3", "my-bucket", "a/b/")),
        (AdapterRef("s3://my-bucket/a/b"), Folder("s3", "my-bucket", "a/b/")),
        (AdapterRef("gs://my_bucket.example.com/a"), Folder("gs", "my_bucket.example.com", "a/")),
        (AdapterRef("az://container"), Folder("az", "container", "")),
        (AdapterRef("az://container/"), Folder("az", "container", "")),
        (AdapterRef("my-bucket/a", source="s3"), Folder("s3", "my-bucket", "a/")),
    ],
)
def test_an_id_means_a_folder(ref: AdapterRef, folder: Folder) -> None:
    assert folder_of(ref) == folder
    assert folder_of(AdapterRef(str(folder))) == folder, "its text is an id of the same"


@pytest.mark.parametrize(
    "id",
    [
        *("org/name", "http://host/a", "s3:/bucket/a", "s3://", "s3:///a", "://a"),
        *("s3://ab/a", "s3://-bucket/a", "s3://bucket-/a", "s3://b..t/a", "s3://user@bucket/a"),
        *("s3://bucket:80/a", "s3://bücket/a", "s3://buck%65t/a", f"s3://{'b' * 223}/a"),
        *("s3://bucket//", "s3://bucket//a", "s3://bucket/a//b", "s3://bucket/a//"),
        *("s3://bucket/../a", "s3://bucket/a/..", "s3://bucket/./a", "s3://bucket/a/."),
        *("s3://bucket/a\n", "s3://bucket\n/a", "s3://bucket/a\0", "s3://bucket/\ud800"),
        *("s3://bucket/a\u202eb", f"s3://bucket/{'ä' * 451}"),
    ],
)
def test_what_names_no_folder(id: str) -> None:
    with pytest.raises(InvalidAdapterIdError):
        folder_of(AdapterRef(id))


def test_a_token_is_nothing_to_a_store() -> None:
    with pytest.raises(UsageError, match="credentials of the environment") as caught:
        folder_of(AdapterRef("s3://bucket/a/", token="the-token"))
    assert "the-token" not in str(caught.value)


def test_versions_are_told_from_etags_and_version_ids() -> None:
    assert is_version(version_of("etags", ["a"]))
    assert is_version(f"{version_of('versions', ['a'])}-{digest_of(['b'])}")
    for other in (
        "",
        "main",
        "900150983cd24fb0d6963f7d28e17f72",
        '"etags"',
        "etags-",
        "1700000000",
    ):
        assert not is_version(other)


def test_other_words_are_another_version() -> None:
    several = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["ab", "c", ""]]
    assert len({version_of("etags", words) for words in several}) == len(several)
