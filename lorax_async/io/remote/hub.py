"""The Hugging Face hub: which commit a name means now, and where that commit's files lie."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import count

from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.core.hub_names import hub_file_name, is_commit
from lorax_async.core.retries import Retries
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    ConfigError,
    IntegrityError,
    InternalError,
    LoraxError,
)
from lorax_async.io.http.settings import Rules
from lorax_async.io.http.target import Target
from lorax_async.io.http.urls import InvalidUrlError, Url, parse_url
from lorax_async.io.remote.hub_calls import (
    Absent,
    Outcome,
    Question,
    Told,
    ask,
    checked_token,
    endpoint_in_use,
    fetch_repository_id,
    has_stored_token,
    machine_token,
    url_of,
)
from lorax_async.io.remote.ports import Located, RemoteFile
from lorax_async.settings.allow import Allow, Reach

RETRIES = Retries(attempts=3, base=0.25, most=4.0)

_MAIN = "main"
_PICKLE = "adapter_model.bin"
_BEARER = "Bearer "


@dataclass(frozen=True, slots=True)
class _Own:
    """The token that this machine has, if any."""

    token: str | None = field(repr=False)


class HubLocator:
    """The `Locator` of adapters on the hub: `ref.id` is org/name, a revision whatever git names.

    A `ref` without a token is asked for without one, unless `ref.use_token` or an entry of `allow`
    says otherwise: then with this machine's own (`HF_TOKEN`, or what `hf auth login` left), unless
    huggingface_hub is told not to. An empty one is a `UsageError`.

    Parameters
    ----------
    endpoint
        The hub's URL, in place of huggingface_hub's (`HF_ENDPOINT`, https://huggingface.co).
    rules
        Where the engine may go for files. The endpoint itself is asked by huggingface_hub, which
        follows redirects to that origin and to the hub's own only; what address it has is the
        operator's business.
    allow
        Entries with `use_token` lend this machine's own token to the ids that they cover, as long
        as the repository that answers is covered too: the hub redirects from ids that were moved.
    threads
        Where huggingface_hub is called, two calls per adapter at once. A call whose caller was
        cancelled ends by itself.
    timeout
        Seconds for connecting, and for each next byte of an answer.
    retries, draw
        When a question is put again, and a draw from [0, 1).

    Raises
    ------
    ConfigError
        The endpoint is no URL.
    """

    def __init__(
        self,
        *,
        endpoint: str | None,
        rules: Rules,
        threads: Executor,
        allow: Sequence[Allow] = (),
        timeout: float = 10.0,
        retries: Retries = RETRIES,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._endpoint = _checked_endpoint(endpoint)
        self._rules = rules
        self._lending = tuple(entry for entry in allow if entry.use_token)
        self._threads = threads
        self._timeout = timeout
        self._retries = retries
        self._draw = draw
        self._place: str | None = None
        self._own: _Own | None = None
        """Both are None until somebody looked."""

    async def scope(self, ref: AdapterRef) -> str:
        """As of `Locator`. From then on `recalled` knows it."""
        return self._scope(await self._authority(ref))

    def own_scope(self) -> str | None:
        """Return the scope of this machine's own token; "" if it has none.

        None if it has one that cannot be had, or is not to be sent. Blocks.
        """
        try:
            self._place, own = endpoint_in_use(self._endpoint), machine_token()
        except LoraxError:
            return None
        return None if own is None and has_stored_token() else self._scope(own)

    def recalled(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """As of `Locator`; None for all before the first `scope` or `locate`."""
        token = checked_token(ref.token)
        if self._place is None or ref.revision is None or not is_commit(ref.revision):
            return None
        if self._uses_own(ref):
            if self._own is None:
                return None
            token = self._own.token
        return ref.text, ref.revision, self._scope(token)

    async def locate(self, ref: AdapterRef) -> Located:
        token = await self._authority(ref)
        first = Question(
            ref.text,
            CONFIG_FILE.file_name,
            _MAIN if ref.revision is None else ref.revision,
            self._endpoint,
            token,
            self._rules,
            self._timeout,
        )
        config, weights = await self._told(first, replace(first, name=WEIGHTS_FILE.file_name))
        if isinstance(config, Absent):
            raise _lacking(first, f"no {CONFIG_FILE.file_name}: it is no adapter of PEFT")
        pinned = replace(first, revision=config.commit)
        if config.redirected and token is not None and self._is_lent(ref):
            await self._require_covered(pinned)
        role = WEIGHTS_FILE
        if weights.commit != config.commit:  # a branch moved between the two answers
            (weights,) = await self._told(replace(pinned, name=role.file_name))
        if isinstance(weights, Absent):
            role = INDEX_FILE
            weights = await self._index(pinned)
        files = (
            self._file(CONFIG_FILE, first, config),
            self._file(role, replace(first, name=role.file_name), weights),
        )
        return Located(ref.text, config.commit, self._scope(token), files)

    async def shards(self, located: Located, roles: Sequence[FileRole]) -> tuple[RemoteFile, ...]:
        """All shards of the weights, numbered from 1: the hub's names say how many there are."""
        if [role.number for role in roles] != list(range(1, len(roles) + 1)):
            raise InternalError("the shards of an adapter are to be asked for all at once")
        said = located.files[0].target.headers.get("Authorization")
        questions = [
            Question(
                located.source,
                hub_file_name(role, len(roles)),
                located.version,
                self._endpoint,
                None if said is None else said.removeprefix(_BEARER),
                self._rules,
                self._timeout,
            )
            for role in roles
        ]
        found = []
        for role, question, told in zip(
            roles, questions, await self._told(*questions), strict=True
        ):
            if isinstance(told, Absent):
                raise _lacking(question, f"no {question.name}, which its index names")
            found.append(self._file(role, question, told))
        return tuple(found)

    async def _index(self, pinned: Question) -> Told:
        """Of a repository that has no weights in one file."""
        (index,) = await self._told(replace(pinned, name=INDEX_FILE.file_name))
        if isinstance(index, Told):
            return index
        (pickle,) = await self._told(replace(pinned, name=_PICKLE))
        if isinstance(pickle, Told):
            raise _lacking(
                pinned,
                f"its weights as {_PICKLE} only, a pickle, which can run any code and is never"
                " loaded; save them again with safetensors (save_pretrained does by default)",
            )
        raise _lacking(pinned, f"neither {WEIGHTS_FILE.file_name} nor {INDEX_FILE.file_name}")

    async def _authority(self, ref: AdapterRef) -> str | None:
        """The token to ask with."""
        given, uses_own = checked_token(ref.token), self._uses_own(ref)
        looking = self._threads.submit(_look, self._endpoint, own=uses_own)
        place, own = await asyncio.wrap_future(looking)
        self._place = place
        if own is None:
            return given
        self._own = own
        return own.token

    def _uses_own(self, ref: AdapterRef) -> bool:
        """Return whether this machine's own token is lent to an id; a stranger's gets none."""
        return ref.use_token or self._is_lent(ref)

    def _is_lent(self, ref: AdapterRef) -> bool:
        """Return whether an id gets this machine's own token by an entry alone."""
        return ref.token is None and not ref.use_token and self._lends_to(ref.text)

    def _lends_to(self, repo: str) -> bool:
        reach = Reach("hub", "", None, f"{repo}/")
        return any(entry.covers(reach) for entry in self._lending)

    async def _require_covered(self, pinned: Question) -> None:
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

    async def _told(self, *questions: Question) -> list[Told | Absent]:
        """The answers, when there are all; what may pass is asked again."""
        answers: dict[Question, Told | Absent] = {}
        for failed in count(1):
            left = [question for question in questions if question not in answers]
            problems = []
            for question, outcome in zip(left, await self._round(left), strict=True):
                if isinstance(outcome, LoraxError):
                    problems.append(outcome)
                else:
                    answers[question] = _of_that_commit(question, outcome)
            if not problems:
                break
            # What no other attempt would mend is the one to tell.
            worst = min(problems, key=lambda problem: problem.retryable)
            await self._wait_to_retry(worst, failed)
        return [answers[question] for question in questions]

    async def _wait_to_retry(self, problem: LoraxError, failed: int) -> None:
        """Wait before the next attempt after `failed` ones; raise `problem` if there is none."""
        wait = self._retries.wait(failed, self._draw(), problem.retry_after)
        if not problem.retryable or wait is None:
            raise problem
        await asyncio.sleep(wait)

    async def _round(self, questions: Sequence[Question]) -> list[Outcome]:
        asking = [
            asyncio.wrap_future(self._threads.submit(ask, question)) for question in questions
        ]
        try:
            await asyncio.wait(asking)
        finally:
            for each in asking:
                each.cancel()
        return [each.result() for each in asking]

    def _file(self, role: FileRole, asked: Question, told: Told) -> RemoteFile:
        """It is asked for at the commit, and first where the hub's answer led to."""
        url = url_of(asked.source, asked.name, told.commit, self._endpoint)
        headers = {} if asked.token is None else {"Authorization": f"{_BEARER}{asked.token}"}
        target = Target(
            url, f"{asked.source}/{asked.name}", headers, self._rules, _found(url, told)
        )
        return RemoteFile(role, target, told.nbytes, told.expected)

    def _scope(self, token: str | None) -> str:
        if token is None:
            return ""
        # An endpoint has no spaces, nor has a token.
        return hashlib.sha256(f"{self._place} {token}".encode()).hexdigest()


def _checked_endpoint(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    try:
        found = parse_url(endpoint)
    except InvalidUrlError as error:
        raise ConfigError(f"the hub's endpoint is no URL: {error}") from None
    if "?" in found.target:
        raise ConfigError("the hub's endpoint is a URL without a query")
    return found.text.rstrip("/")


def _look(endpoint: str | None, *, own: bool) -> tuple[str, _Own | None]:
    """The endpoint, and this machine's own token where it is wanted. Blocks."""
    return endpoint_in_use(endpoint), _Own(machine_token()) if own else None


def _of_that_commit(question: Question, told: Told | Absent) -> Told | Absent:
    """Raises `IntegrityError` for an answer about another commit than was asked about."""
    if is_commit(question.revision) and told.commit not in {None, question.revision}:
        raise IntegrityError(
            f"the hub answered about another commit of {question.source!r} than was asked for",
            stage="resolve",
        )
    return told


def _found(url: Url, told: Told) -> Url | None:
    """Where the bytes of that very commit lie, if it is elsewhere.

    A redirect to a name of the hub, as after a renaming, may lead to something else tomorrow.
    """
    found = told.location
    if found is None or found == url:
        return None
    moving = found.origin == url.origin or "/resolve/" in found.target
    return None if moving and told.commit not in found.target else found


def _lacking(question: Question, what: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"{question.source!r} at {question.revision!r} has {what}")
