"""Digests in the fields of responses: RFC 9530's own examples, S3's kinds of checksums, nonsense."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.file_digest import Digest
from lorax_async.core.sent_digest import sent_sha256

# RFC 9530, B.1: {"hello": "world"} with its line feed.
HELLO = b'{"hello": "world"}\n'
EXAMPLE = "RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg="
SHA512 = "YMAam51Jz/jOATT6/zvHrLVgOYTGFy1d6GJiOHTohq4yP+pgk4vf2aCsyRZOtw8MjkM7iw7yZ/WkppmM44T3qg=="
TOLD = Digest("sha256", "44aff4ab2d7c3250525675a08f0cfa9591168cffe51791c5f5bbc417c15a6c38")


def test_the_example_is_what_it_says() -> None:
    assert hashlib.sha256(HELLO).hexdigest() == TOLD.value


@pytest.mark.parametrize(
    "field",
    [
        f"sha-256=:{EXAMPLE}:",
        f"sha-256=:{EXAMPLE}:, sha-512=:{SHA512}:",
        f"sha-512=:{SHA512}:,sha-256=:{EXAMPLE}:",
        f"sha-512=:{SHA512}:\t ,\tsha-256=:{EXAMPLE}:",
        f'unixsum=1, a, b=?0, c=-1.5, d=tok/en:x, e="a, \\" :b:", sha-256=:{EXAMPLE}:',
        f'sha-256=:{EXAMPLE}:;note="x"; *more',
        f"sha-256=:AAAA:, sha-256=:{EXAMPLE}:",
    ],
)
def test_a_representations_digest_is_told(field: str) -> None:
    assert sent_sha256({"repr-digest": field}) == TOLD
    assert sent_sha256({"repr-digest": field, "content-range": "bytes 0-9/19"}) == TOLD


@pytest.mark.parametrize(
    "field",
    [
        "",
        ",",
        "sha-256",
        f"sha-512=:{SHA512}:",
        f"SHA-256=:{EXAMPLE}:",
        f"sha-256={EXAMPLE}",
        f'sha-256="{EXAMPLE}"',
        f"sha-256=:{EXAMPLE}",
        f"sha-256=:{EXAMPLE[:-1]}:",
        f"sha-256=:{EXAMPLE[:-2]}h=:",  # bits behind the last byte
        f"sha-256=:{SHA512}:",
        "sha-256=:AAAA:",
        "sha-256=::",
        f"sha-256=:{EXAMPLE}:,",
        f"sha-256=:{EXAMPLE}: sha-512=:{SHA512}:",
        f"sha-256 = :{EXAMPLE}:",
        f"sha-256=:{EXAMPLE}:, sha-256=:AAAA:",  # the last one counts
        f"sha-256=:{EXAMPLE}:, x=(1 2)",
        f"sha-256=:{EXAMPLE}:, \xe9",
        f" sha-256=:{EXAMPLE}:",
        f"sha-256=:{TOLD.value}:",
    ],
)
def test_what_is_malformed_tells_nothing(field: str) -> None:
    assert sent_sha256({"repr-digest": field}) is None


def test_the_digest_of_a_part_is_not_that_of_the_file() -> None:
    assert sent_sha256({"content-digest": f"sha-256=:{EXAMPLE}:"}) is None
    assert sent_sha256({"digest": f"sha-256={EXAMPLE}"}) is None, "RFC 3230 is obsolete"


PART = {"content-range": "bytes 0-9/19"}


@pytest.mark.parametrize(
    ("value", "more", "told"),
    [
        (EXAMPLE, {}, True),
        (EXAMPLE, {"x-amz-checksum-type": "FULL_OBJECT"}, True),
        (EXAMPLE, PART | {"x-amz-checksum-type": "FULL_OBJECT"}, True),
        (EXAMPLE, PART, False),  # it may be that of one part of an upload
        (EXAMPLE, {"x-amz-checksum-type": "COMPOSITE"}, False),
        (EXAMPLE, {"x-amz-checksum-type": "something new"}, False),
        (f"{EXAMPLE}-3", {}, False),
        (f"{EXAMPLE}-3", {"x-amz-checksum-type": "FULL_OBJECT"}, False),
        ("not base64!", {}, False),
        ("\xe9", {}, False),
    ],
)
def test_an_objects_checksum_is_told_if_it_is_of_all(
    value: str, more: dict[str, str], told: bool
) -> None:
    fields = {"x-amz-checksum-sha256": value} | more
    assert sent_sha256(fields) == (TOLD if told else None)


def test_the_representations_digest_comes_first() -> None:
    other = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    fields = {"repr-digest": f"sha-256=:{EXAMPLE}:", "x-amz-checksum-sha256": other}
    assert sent_sha256(fields) == TOLD
    fields["repr-digest"] = "nonsense("
    assert sent_sha256(fields) == Digest("sha256", hashlib.sha256(b"other").hexdigest())


@given(st.text(alphabet=st.characters(max_codepoint=0xFF), max_size=60))
def test_no_text_is_a_fault(text: str) -> None:
    """Forty-three characters of base64 do not come about by chance."""
    assert sent_sha256({"repr-digest": text, "x-amz-checksum-sha256": text}) is None


def test_long_nonsense_is_read_in_one_pass() -> None:
    for part in ("a=:", "a;a", 'a="', "a, ", "a=b;c=d "):
        assert sent_sha256({"repr-digest": part * 20_000}) is None
