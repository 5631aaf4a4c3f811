"""Records of entries: what is written is read, and what is no record is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey
from lorax_async.core.cache_record import FileRecord, decoded_record, record_of
from lorax_async.core.file_digest import Digest
from lorax_async.errors import AdapterFormatError

FILES = (
    FileRecord(CONFIG_FILE, 7, 1_700_000_000_123_456_789, Digest("git-sha1", "ab" * 20)),
    FileRecord(WEIGHTS_FILE, 2**40, 0, Digest("transport", "01" * 32)),
)
KEY = CacheKey("hub:o/n", "c0ffee")


def fields() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(record_of(KEY, FILES).encoded())
    return found


def test_a_record_comes_back() -> None:
    record = record_of(KEY, FILES)
    assert decoded_record(record.encoded()) == record
    assert record.nbytes == 2**40 + 7
    assert record.name == KEY.name


def test_a_record_is_json_that_people_can_read() -> None:
    assert fields() == {
        "format": 1,
        "entry": KEY.name,
        "source": "hub:o/n",
        "version": "c0ffee",
        "files": [
            {
                "file": "adapter_config.json",
                "nbytes": 7,
                "mtime_ns": 1_700_000_000_123_456_789,
                "kind": "git-sha1",
                "digest": "ab" * 20,
            },
            {
                "file": "adapter_model.safetensors",
                "nbytes": 2**40,
                "mtime_ns": 0,
                "kind": "transport",
                "digest": "01" * 32,
            },
        ],
    }


@pytest.mark.parametrize("text", ["\ud800", "x" * 5_000, "a\nb\x1b[31m", '"}{'])
def test_any_key_has_a_record(text: str) -> None:
    key = CacheKey(text, text)
    record = decoded_record(record_of(key, FILES).encoded())
    assert record.name == key.name
    assert record.source.isprintable()
    assert len(record.source) <= 1_000


def broken(**changes: object) -> bytes:
    return json.dumps(fields() | changes).encode()


def with_file(**changes: object) -> bytes:
    first, second = fields()["files"]
    return broken(files=[first | changes, second])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        record_of(KEY, FILES).encoded()[:-10],
        broken(format=2),
        broken(entry=5),
        broken(source=None),
        broken(version=[]),
        broken(files=[]),
        broken(files={}),
        broken(files=["adapter_config.json"]),
        with_file(file="../../etc/passwd"),
        with_file(file="adapter_model.safetensors"),
        with_file(file=3),
        with_file(nbytes=-1),
        with_file(nbytes=True),
        with_file(nbytes=1.5),
        with_file(mtime_ns="0"),
        with_file(kind="md5"),
        with_file(digest="ab" * 19),
    ],
)
def test_what_is_no_record_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterFormatError, match="the cache's record"):
        decoded_record(content)
