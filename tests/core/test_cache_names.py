"""The names in a disk cache are ours, whatever the keys are, and say what they should."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.cache_names import (
    BUDGET_LOCK,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    CacheKey,
    FileRole,
    Owner,
    PartialName,
    is_entry_name,
    is_partial_name,
    partial_name,
    role_of,
    scope_name,
)
from lorax_async.errors import UsageError

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)


@given(TEXT, TEXT)
def test_an_entrys_name_is_64_digits_whatever_its_key_is(source: str, version: str) -> None:
    key = CacheKey(source, version)
    assert re.fullmatch("[0-9a-f]{64}", key.name)
    assert is_entry_name(key.name)
    assert key.name == CacheKey(source, version).name
    assert re.fullmatch(r"scope\.[0-9a-f]{64}", scope_name(source))


@given(TEXT, TEXT, TEXT, TEXT)
def test_two_keys_have_two_names(a: str, b: str, c: str, d: str) -> None:
    assert (CacheKey(a, b).name == CacheKey(c, d).name) == ((a, b) == (c, d))


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), (("a", ""), ("", "a")), (("a\0b", "c"), ("a", "b\0c"))],
)
def test_where_a_text_ends_matters(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert CacheKey(*one).name != CacheKey(*other).name


def test_a_name_is_the_same_in_every_process_and_version() -> None:
    """sha256sum of: 8 bytes of length and the text, twice."""
    assert CacheKey("hub:o/n", "abc").name == (
        "4e47a3b77515f05e4bdb997630eec929da4a5e1271b06e68517af5d9721420cd"
    )


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (CONFIG_FILE, "adapter_config.json"),
        (INDEX_FILE, "adapter_model.safetensors.index.json"),
        (WEIGHTS_FILE, "adapter_model.safetensors"),
        (FileRole("weights", 1), "adapter_model-00001.safetensors"),
        (FileRole("weights", 99_999), "adapter_model-99999.safetensors"),
    ],
)
def test_files_have_the_names_that_tools_know(role: FileRole, name: str) -> None:
    assert role.file_name == name
    assert role_of(name) == role


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "adapter_model-00000.safetensors",
        "adapter_model-1.safetensors",
        "adapter_model-000001.safetensors",
        "adapter_config.json.chunks",
        "../adapter_config.json",
        "adapter_config.json\n",
        "record.json",
        "",
    ],
)
def test_no_other_name_is_an_adapters_file(name: str) -> None:
    assert role_of(name) is None


@pytest.mark.parametrize(("kind", "number"), [("weights", 100_000), ("weights", -1), ("config", 1)])
def test_there_is_no_such_file(kind: str, number: int) -> None:
    with pytest.raises(UsageError, match="no "):
        FileRole(kind, number)  # type: ignore[arg-type]


ENTRY = CacheKey("a", "b").name
OWNER = Owner("0123456789abcdef0123456789abcdef", 4026531836, 2**22, 2**40)


@pytest.mark.parametrize("owner", [None, OWNER])
def test_a_partials_name_says_who_writes_to_it(owner: Owner | None) -> None:
    name = PartialName(ENTRY, owner, "0f" * 8)
    assert partial_name(str(name)) == name
    assert is_partial_name(str(name))
    assert not is_entry_name(str(name))
    assert len(str(name)) < 255


@pytest.mark.parametrize(
    "name",
    [
        ENTRY,
        BUDGET_LOCK,
        f"{ENTRY}.free",
        f"{ENTRY}.free.",
        f"{ENTRY}.other.00",
        f"{ENTRY}.free.00/..",
        f"{ENTRY[1:]}.free.00",
        f"{ENTRY}.ab-1-2.00",
        f"{ENTRY}.ab-1-2-x.00",
        f"{ENTRY}.free.00\n",
    ],
)
def test_no_other_name_is_a_partials(name: str) -> None:
    assert partial_name(name) is None
    assert not is_partial_name(name)
