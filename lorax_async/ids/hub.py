"""Names and revisions on the Hugging Face hub."""

from __future__ import annotations

import re
from typing import NamedTuple

from lorax_async.errors import InvalidAdapterIdError

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_OTHER_KINDS = frozenset({"datasets", "spaces", "kernels", "models", "api"})
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
_REVISION = re.compile(rf"{_WORD}(?:/{_WORD})*")
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]{0,8}")
_LIKE_PULL_REQUEST = re.compile(r"(?:refs/)?pr/", re.IGNORECASE)
_LONGEST_REVISION = 200


class HubId(NamedTuple):
    """A model repository, `org/name`, and what of it was asked for."""

    repo: str
    revision: str | None


def parse_hub_id(text: str) -> HubId:
    """Of `org/name` or `org/name@revision`. Raises `InvalidAdapterIdError`."""
    repo, at, revision = text.partition("@")
    org, slash, name = repo.partition("/")
    if not slash:
        raise InvalidAdapterIdError(
            "it is neither org/name[@revision], which is an adapter on the hub, nor a URL, nor a"
            " path; a local folder is written ./name"
        )
    if not (is_hub_name(org) and is_hub_name(name)) or name.endswith(".git"):
        raise InvalidAdapterIdError(
            "on the hub it is org/name[@revision], each name of 1 to 96 letters, digits, '_', '-'"
            " and '.', with no '-' or '.' at its ends, no '--', no '..', and no '.git' at the end;"
            " a local folder begins with './', '../' or '/', all else is a URL"
        )
    if org in _OTHER_KINDS:
        raise InvalidAdapterIdError(
            f"'{org}/…' is no model repository of the hub; write the organisation and the name"
        )
    return HubId(repo, checked_revision(revision) if at else None)


def is_hub_name(text: str) -> bool:
    """As `huggingface_hub.utils.validate_repo_id` has it, for one of the two."""
    return _NAME.fullmatch(text) is not None and "--" not in text and ".." not in text


def checked_revision(text: str) -> str:
    """A branch, a tag, a commit or `refs/pr/N`. Raises `InvalidAdapterIdError`."""
    words = text.split("/")
    plain = (
        len(text) <= _LONGEST_REVISION
        and _REVISION.fullmatch(text) is not None
        and ".." not in text
        and not any(word.endswith((".", ".lock")) for word in words)
    )
    if not plain or (words[0].lower() == "refs" and not _PULL_REQUEST.fullmatch(text)):
        raise InvalidAdapterIdError(
            "a revision on the hub is a branch or a tag of letters, digits, '_', '-', '.', '+' and"
            " '/', a commit, or refs/pr/N; where a name has other characters, give the commit"
        )
    return text


def names_pull_request(revision: str | None) -> bool:
    """Whether it may lead to what anybody has proposed; git also finds `refs/pr/1` as `pr/1`."""
    return revision is not None and _LIKE_PULL_REQUEST.match(revision) is not None
