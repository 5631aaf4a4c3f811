"""Files of an adapter on the hub: from the standard hub cache, or fetched into it. Blocks.

huggingface_hub fetches them, as it does for LoRAX: from its endpoint (`HF_ENDPOINT`), unless it was
told to ask nobody (`HF_HUB_OFFLINE`). What is in the cache is taken without asking, and what the
cache says of a branch holds for every file, so that config and weights are of one commit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from lorax_async.config import Limits
from lorax_async.core.split_index import INDEX, parse_index
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    InvalidAdapterIdError,
    LoraxError,
)
from lorax_async.ids.hub import HubId
from lorax_async.io.http.urls import Url
from lorax_async.io.remote.hub_cache import StandardHubCache, standard_folder
from lorax_async.io.remote.hub_calls import (
    FileQuery,
    MissingFile,
    checked_token,
    machine_token,
    problem_of,
    query_file,
    url_of,
)
from lorax_async.io.remote.rules import AllowRules
from lorax_async.io.sources.checked_open import code_of, translated
from lorax_async.io.sources.local_folder import CONFIG, WEIGHTS

_MAIN = "main"
_SECONDS = 10.0
"""For connecting, and for each next byte of an answer."""


def cached_file(id: HubId, name: str) -> str | None:
    """Where the standard hub cache has a file, if it has it. No network request.

    Raises
    ------
    InvalidAdapterIdError
        The hub has no such ids.
    AccessDeniedError, FetchError
        The cache cannot be read, or what it says of the revision is no text.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (slow)
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        path = try_to_load_from_cache(id.repo, name, revision=id.revision)
    except HFValidationError as error:
        raise InvalidAdapterIdError(f"the hub has no such ids ({error})") from error
    except OSError as error:
        raise translated(error, "the hub cache") from error
    except UnicodeDecodeError as error:
        raise FetchError(
            "the hub cache is damaged: what it says of this revision is no text; remove the"
            " repository from it, and load the adapter again"
        ) from error
    return path if isinstance(path, str) else None


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of one adapter; a `token` of None is this machine's own, if it has one.

    Raises, with what `cached_file` does:

    UsageError
        The token can be none.
    AdapterNotFoundError
        The hub has no such adapter, revision or file, or none that the token may see.
    AccessDeniedError, FetchError
        The hub refuses or cannot be asked, or what it sends cannot be stored.
    AdapterFormatError
        A file is over the limits, or all weights together are.
    """

    id: HubId
    token: str | None = field(repr=False)
    limits: Limits

    def __post_init__(self) -> None:
        checked_token(self.token)

    def with_config(self) -> str:
        """The folder of the hub cache that has the config."""
        return os.path.dirname(self._found(CONFIG, self.limits.max_config_bytes))

    def with_weights(self) -> str:
        """The folder of the hub cache that has the config and the weights, also if in several."""
        index, room = self._index(), self.limits.max_adapter_bytes
        if index is not None:
            for name in self._names_in(index):
                room = max(0, room - _size_of(self._found(name, room), name))
        return self.with_config()

    def _index(self) -> str | None:
        """None if the weights are in one file, which then is here."""
        one, index = (cached_file(self.id, name) for name in (WEIGHTS, INDEX))
        if one is not None or index is not None:  # it was one or the other when they were fetched
            return None if one is not None else index
        if self._fetched(WEIGHTS, self.limits.max_adapter_bytes) is not None:
            return None
        return self._found(INDEX, self.limits.max_header_bytes, WEIGHTS)

    def _names_in(self, index: str) -> tuple[str, ...]:
        try:
            with open(index, "rb") as file:
                content = file.read(self.limits.max_header_bytes + 1)
        except OSError as error:
            raise translated(error, INDEX) from error
        return parse_index(content, self.limits).file_names

    def _found(self, name: str, max_bytes: int, wanted: str | None = None) -> str:
        """What it is wanted for is `wanted`, if that is not the file itself."""
        path = cached_file(self.id, name) or self._fetched(name, max_bytes)
        if path is None:
            repo, at = self.id.repo, self.id.revision or _MAIN
            raise AdapterNotFoundError(
                f"{repo!r} on the hub has no {wanted or name} at {at!r}; check the id (a folder is"
                f" a pathlib.Path, or './{repo}')"
            )
        return path

    def _fetched(self, name: str, max_bytes: int) -> str | None:
        """None if the hub has no such file."""
        revision = self._commit() or self.id.revision or _MAIN
        url = url_of(self.id.repo, name, revision, None)
        question = FileQuery(
            *(self.id.repo, name, revision, None),
            token=self.token or machine_token(),
            rules=AllowRules(named=[url.origin]),  # the environment's word is the operator's
            timeout=_SECONDS,
        )
        told = query_file(question)
        if isinstance(told, LoraxError):
            raise told
        if isinstance(told, MissingFile):
            return None
        if told.nbytes is not None and told.nbytes > max_bytes:
            raise AdapterFormatError(
                f"{name} has {told.nbytes:,} bytes, over the {max_bytes:,} that may come"
            )
        return _downloaded(question, url)

    def _commit(self) -> str | None:
        """Which one the cache takes the revision for."""
        hub = StandardHubCache(standard_folder(), lambda: None)
        return hub.commit_of(self.id.repo, self.id.revision or _MAIN)


def _size_of(path: str, name: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise translated(error, name) from error


def _downloaded(question: FileQuery, url: Url) -> str:
    """Where it then is in the standard hub cache."""
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return hf_hub_download(
            question.source,
            question.name,
            revision=question.revision,
            token=question.token or False,
            etag_timeout=question.timeout,
            tqdm_class=_silent(),
        )
    except LocalEntryNotFoundError as error:  # it asks once more, and that failed
        cause = error.__cause__
        raise problem_of(cause if isinstance(cause, Exception) else error, question, url) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, RuntimeError) as error:
        raise problem_of(error, question, url).located(stage="fetch") from None
    except OSError as error:
        if error.errno is None:
            raise FetchError(f"{url} sent fewer or more bytes than it had promised") from None
        raise FetchError(
            f"{question.name} cannot be stored in the hub cache ({code_of(error)}); see to its"
            " folder (HF_HUB_CACHE) and to its disk",
            retryable=False,
        ) from error


def _silent() -> type[Any]:
    """Nobody looks at a server's terminal."""
    # Documented, and not declared: that module imports it when it is used.
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # noqa: PLC0415 (slow)

    class Silent(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings["disable"] = True
            super().__init__(*args, **settings)  # type: ignore[no-untyped-call]

    return Silent
