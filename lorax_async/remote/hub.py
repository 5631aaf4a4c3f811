"""The Hugging Face hub: the commit that a name means now, and where that commit's files are."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import count

from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    ConfigError,
    IntegrityError,
    InternalError,
    LoraxError,
)
from lorax_async.formats.split_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.http.failures import RetryPolicy
from lorax_async.http.settings import Rules
from lorax_async.http.target import Target
from lorax_async.http.urls import InvalidUrlError, Url, parse_url
from lorax_async.ids.allow import Allow, OriginPlace
from lorax_async.remote.base import LocatedAdapter, RemoteFile
from lorax_async.remote.hub_calls import (
    FileInfo,
    FileQuery,
    MissingFile,
    Outcome,
    checked_token,
    fetch_repository_id,
    has_stored_token,
    is_commit,
    machine_token,
    query_file,
    url_of,
)
from lorax_async.types import AdapterRef

RETRIES = RetryPolicy(attempts=3, base=0.25, most=4.0)

_MAIN = "main"
_PICKLE = "adapter_model.bin"
_BEARER = "Bearer "


@dataclass(frozen=True, slots=True)
class _MachineToken:
    """The token that this machine has, if any."""

    token: str | None = field(repr=False)


class HubLocator:
    """The `Backend` of adapters on the hub: `ref.id` is org/name, a revision whatever git names.

    A `ref` without a token is resolved without one, unless `ref.use_token` or an entry of `allow`
    lends this machine's own (`HF_TOKEN`, `hf auth login`) and huggingface_hub may use that. An
    empty token is a `UsageError`.

    Parameters
    ----------
    endpoint
        The hub's URL.
    rules
        Where the engine may go for files. huggingface_hub asks the endpoint itself, and follows
        redirects to that origin and to the hub's own only; the operator answers for its address.
    allow
        Entries with `use_token` lend this machine's own token to the ids that they cover, if the
        repository that answers is covered too: the hub redirects from ids that were moved.
    threads
        Run huggingface_hub, two calls per adapter at once. A call whose caller was cancelled ends
        by itself.
    timeout
        Seconds for connecting, and for each next byte of an answer.
    retries, draw
        When to query again, and a draw from [0, 1).

    Raises
    ------
    ConfigError
        The endpoint is no URL.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        rules: Rules,
        threads: Executor,
        allow: Sequence[Allow] = (),
        timeout: float = 10.0,
        retries: RetryPolicy = RETRIES,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._endpoint = _checked_endpoint(endpoint)
        self._rules = rules
        self._lending = tuple(entry for entry in allow if entry.use_token)
        self._threads = threads
        self._timeout = timeout
        self._retries = retries
        self._draw = draw
        self._own: _MachineToken | None = None
        """None until the first look-up."""

    async def scope(self, ref: AdapterRef) -> str:
        """See `Backend`. From then on `recalled` knows the machine's token."""
        return self._scope(await self._authority(ref))

    def own_scope(self) -> str | None:
        """Return the scope of this machine's own token; "" if it has none.

        None if it has one that cannot be had, or is not to be sent. Blocks.
        """
        try:
            own = machine_token()
        except LoraxError:
            return None
        return None if own is None and has_stored_token() else self._scope(own)

    def recalled(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """See `Backend`; with the machine's token, None before the first `scope` or `locate`."""
        token = checked_token(ref.token)
        if ref.revision is None or not is_commit(ref.revision):
            return None
        if self._uses_own(ref):
            if self._own is None:
                return None
            token = self._own.token
        return ref.text, ref.revision, self._scope(token)

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        token = await self._authority(ref)
        revision = _MAIN if ref.revision is None else ref.revision
        first = self._query(ref.text, CONFIG_FILE, revision, token)
        config, weights = await self._answers(first, replace(first, name=WEIGHTS_FILE.file_name))
        if isinstance(config, MissingFile):
            raise _lacking(first, f"no {CONFIG_FILE.file_name}: it is no adapter of PEFT")
        pinned = replace(first, revision=config.commit)
        if config.redirected and token is not None and self._is_lent(ref):
            await self._require_covered(pinned)
        role = WEIGHTS_FILE
        if weights.commit != config.commit:  # a branch moved between the two answers
            (weights,) = await self._answers(replace(pinned, name=role.file_name))
        if isinstance(weights, MissingFile):
            role = INDEX_FILE
            weights = await self._index(pinned)
        files = (
            self._file(CONFIG_FILE, first, config),
            self._file(role, replace(first, name=role.file_name), weights),
        )
        return LocatedAdapter(ref.text, config.commit, self._scope(token), files)

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """Return all shards of the weights, numbered from 1: their names say how many there are."""
        if [role.number for role in roles] != list(range(1, len(roles) + 1)):
            raise InternalError("the shards of an adapter are to be asked for all at once")
        said = located.files[0].target.headers.get("Authorization")
        token = None if said is None else said.removeprefix(_BEARER)
        queries = [self._query(located.source, role, located.version, token) for role in roles]
        found = []
        for role, query, info in zip(roles, queries, await self._answers(*queries), strict=True):
            if isinstance(info, MissingFile):
                raise _lacking(query, f"no {query.name}, which its index names")
            found.append(self._file(role, query, info))
        return tuple(found)

    async def _index(self, pinned: FileQuery) -> FileInfo:
        """Return the index of a repository whose weights are not in one file."""
        (index,) = await self._answers(replace(pinned, name=INDEX_FILE.file_name))
        if isinstance(index, FileInfo):
            return index
        (pickle,) = await self._answers(replace(pinned, name=_PICKLE))
        if isinstance(pickle, FileInfo):
            raise _lacking(
                pinned,
                f"its weights as {_PICKLE} only, a pickle, which can run any code and is never"
                " loaded; save them again with safetensors (save_pretrained does by default)",
            )
        raise _lacking(pinned, f"neither {WEIGHTS_FILE.file_name} nor {INDEX_FILE.file_name}")

    async def _authority(self, ref: AdapterRef) -> str | None:
        """Return the token to ask with."""
        given = checked_token(ref.token)
        if not self._uses_own(ref):
            return given
        own = await asyncio.wrap_future(self._threads.submit(machine_token))
        self._own = _MachineToken(own)
        return own

    def _uses_own(self, ref: AdapterRef) -> bool:
        """Return whether this machine's own token is lent to an id; a stranger's gets none."""
        return ref.use_token or self._is_lent(ref)

    def _is_lent(self, ref: AdapterRef) -> bool:
        """Return whether an id gets this machine's own token by an entry alone."""
        return ref.token is None and not ref.use_token and self._lends_to(ref.text)

    def _lends_to(self, repo: str) -> bool:
        reach = OriginPlace("hub", "", None, f"{repo}/")
        return any(entry.covers(reach) for entry in self._lending)

    async def _require_covered(self, pinned: FileQuery) -> None:
        """Raise `AccessDeniedError` if the commit is of a repository that no entry lends to.

        The weights need no check of their own: they are of the same commit.
        """
        for failed in count(1):
            asking = self._threads.submit(fetch_repository_id, pinned)
            found = await asyncio.wrap_future(asking)
            if isinstance(found, str):
                covered = self._lends_to(found)
                break
            await self._wait_to_retry(found, failed)
        if not covered:
            # Its id may be a secret of the operator's.
            raise AccessDeniedError(
                f"the hub has moved {pinned.source!r} to a place to which the token of this machine"
                " is not lent; name the new id, if that is allowed, or let the operator allow it",
                stage="resolve",
            )

    async def _answers(self, *queries: FileQuery) -> list[FileInfo | MissingFile]:
        """Return all answers; query again where the failure may pass."""
        answers: dict[FileQuery, FileInfo | MissingFile] = {}
        for failed in count(1):
            left = [query for query in queries if query not in answers]
            problems = []
            for query, outcome in zip(left, await self._round(left), strict=True):
                if isinstance(outcome, LoraxError):
                    problems.append(outcome)
                else:
                    answers[query] = _of_that_commit(query, outcome)
            if not problems:
                break
            # Report a failure that no retry would mend first.
            worst = min(problems, key=lambda problem: problem.retryable)
            await self._wait_to_retry(worst, failed)
        return [answers[query] for query in queries]

    async def _wait_to_retry(self, problem: LoraxError, failed: int) -> None:
        """Wait before the next attempt after `failed` ones; raise `problem` if there is none."""
        wait = self._retries.wait(failed, self._draw(), problem.retry_after)
        if not problem.retryable or wait is None:
            raise problem
        await asyncio.sleep(wait)

    async def _round(self, queries: Sequence[FileQuery]) -> list[Outcome]:
        asking = [asyncio.wrap_future(self._threads.submit(query_file, query)) for query in queries]
        try:
            await asyncio.wait(asking)
        finally:
            for each in asking:
                each.cancel()
        return [each.result() for each in asking]

    def _query(self, source: str, role: FileRole, revision: str, token: str | None) -> FileQuery:
        hub = (self._endpoint, token, self._rules, self._timeout)
        return FileQuery(source, role.file_name, revision, *hub)

    def _file(self, role: FileRole, asked: FileQuery, info: FileInfo) -> RemoteFile:
        """Return a file whose target is the commit's URL, first tried where the answer led."""
        url = url_of(asked.source, asked.name, info.commit, self._endpoint)
        headers = {} if asked.token is None else {"Authorization": f"{_BEARER}{asked.token}"}
        target = Target(
            url, f"{asked.source}/{asked.name}", headers, self._rules, _found(url, info)
        )
        return RemoteFile(role, target, info.nbytes, info.expected)

    def _scope(self, token: str | None) -> str:
        if token is None:
            return ""
        # An endpoint has no spaces, nor has a token.
        return hashlib.sha256(f"{self._endpoint} {token}".encode()).hexdigest()


def _checked_endpoint(endpoint: str) -> str:
    try:
        found = parse_url(endpoint)
    except InvalidUrlError as error:
        raise ConfigError(f"the hub's endpoint is no URL: {error}") from None
    if "?" in found.target:
        raise ConfigError("the hub's endpoint is a URL without a query")
    return found.text.rstrip("/")


def _of_that_commit(query: FileQuery, info: FileInfo | MissingFile) -> FileInfo | MissingFile:
    """Raise `IntegrityError` for an answer about another commit than the query's."""
    if is_commit(query.revision) and info.commit not in {None, query.revision}:
        raise IntegrityError(
            f"the hub answered about another commit of {query.source!r} than was asked for",
            stage="resolve",
        )
    return info


def _found(url: Url, info: FileInfo) -> Url | None:
    """Return where the bytes of this very commit are, if a redirect led there.

    A redirect to a name of the hub, as after a renaming, may lead to something else tomorrow.
    """
    found = info.location
    if found is None or found == url:
        return None
    moving = found.origin == url.origin or "/resolve/" in found.target
    return None if moving and info.commit not in found.target else found


def _lacking(query: FileQuery, what: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"{query.source!r} at {query.revision!r} has {what}")
