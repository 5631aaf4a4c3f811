"""What the hub refuses, and what goes wrong on the way to it: one typed error, and no secret."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from answering_server import Asked, Reply
from hub_stand_in import SIGNATURE, HubStandIn
from hub_world import ADAPTER, REPO, TOKEN, locating, refused

from common import Run
from lorax_async.adapter import AdapterRef
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    InvalidAdapterIdError,
    LoraxError,
)

pytestmark = pytest.mark.usefixtures("hub_client", "nothing_left")


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.mark.parametrize("token", [None, "hf_another"])
def test_a_repository_that_this_caller_may_not_see(
    hub: HubStandIn, run: Run, token: str | None
) -> None:
    """Whether it is private or not there at all makes no difference."""
    hub.put("org/private", ADAPTER, private_token=TOKEN)
    errors = [
        refused(run, hub, AdapterRef(name, token=token)) for name in ("org/private", "org/nobody")
    ]
    kind = AccessDeniedError if token is None else AdapterNotFoundError
    said = "check the id, or .* give a token" if token is None else "has no .* that the token may"
    for name, error in zip(("private", "nobody"), errors, strict=True):
        assert type(error) is kind
        assert not error.retryable
        assert f"org/{name}" in error.problem
        with pytest.raises(LoraxError, match=said):
            raise error


@pytest.mark.parametrize("token", [None, "hf_another"])
def test_a_gated_repository(hub: HubStandIn, run: Run, token: str | None) -> None:
    hub.put(REPO, ADAPTER)
    hub.gate(REPO, TOKEN)
    error = refused(run, hub, AdapterRef(REPO, token=token))
    assert type(error) is AccessDeniedError
    assert "gated: accept its conditions there, and give a token" in error.problem
    with locating(hub) as locator:
        assert run(locator.locate(AdapterRef(REPO, token=TOKEN))).files


@pytest.mark.parametrize("revision", ["nix", "f" * 40, "refs/pr/7", "a b/../c"])
def test_a_revision_that_is_not_there(hub: HubStandIn, run: Run, revision: str) -> None:
    hub.put(REPO, ADAPTER)
    error = refused(run, hub, AdapterRef(REPO, revision=revision))
    assert type(error) is AdapterNotFoundError
    assert f"no revision {revision!r}" in error.problem


@pytest.mark.parametrize("name", ["a--b/c", "org/name/more", "org name/x", "../../etc"])
def test_what_the_hub_calls_no_id(hub: HubStandIn, run: Run, name: str) -> None:
    assert type(refused(run, hub, AdapterRef(name))) is InvalidAdapterIdError
    assert not hub.asked


REFUSALS = [
    (Reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "401.*token"),
    (Reply(403, {"X-Error-Message": f"no {TOKEN}, {SIGNATURE}"}), "403.*token"),
    (Reply(403, {"X-Error-Message": "Access to this resource is disabled."}), "403"),
    (Reply(451), "451"),
]


@pytest.mark.parametrize(("reply", "said"), REFUSALS)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_other_refusals(
    hub: HubStandIn, run: Run, reply: Reply, said: str, token: str | None
) -> None:
    hub.behave = lambda asked: reply
    error = refused(run, hub, AdapterRef(REPO, token=token))
    assert type(error) is AccessDeniedError
    assert not error.retryable
    with pytest.raises(AccessDeniedError, match=said):
        raise error
    assert len(hub.asked) == 2, "it is not asked again"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_asked_again(hub: HubStandIn, run: Run, status: int) -> None:
    """Only the file whose answer is missing, as often as is set, and then it is told."""
    commit = hub.put(REPO, ADAPTER)
    left = [status, status]

    def busy(asked: Asked) -> Reply | None:
        return Reply(left.pop()) if "adapter_model" in asked.target and left else None

    hub.behave = busy
    with locating(hub) as locator:
        assert run(locator.locate(AdapterRef(REPO))).version == commit
    assert len(hub.asked_for("HEAD", "adapter_config")) == 1
    assert len(hub.asked_for("HEAD", "adapter_model")) == 3
    left[:] = [status] * 3
    error = refused(run, hub, AdapterRef(REPO))
    assert type(error) is FetchError
    assert error.retryable
    assert f"status {status}" in error.problem


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"Retry-After": "86400"}, 86400.0),
        ({"RateLimit": '"resolvers";r=0;t=250'}, 250.0),
        ({"RateLimit": '"resolvers";r=9;t=250'}, None),
        ({}, None),
    ],
)
def test_how_long_the_hub_wants_to_be_left_alone(
    hub: HubStandIn, run: Run, fields: dict[str, str], seconds: float | None
) -> None:
    """What is longer than a caller would wait is told at once, and nobody waits."""
    hub.behave = lambda asked: Reply(429, fields)
    error = refused(run, hub, AdapterRef(REPO))
    assert error.retry_after == seconds
    assert len(hub.asked) == (2 if seconds else 6)


@pytest.mark.parametrize("status", [400, 416, 418, 501])
def test_answers_that_are_none(hub: HubStandIn, run: Run, status: int) -> None:
    hub.behave = lambda asked: Reply(status)
    error = refused(run, hub, AdapterRef(REPO))
    assert (type(error), error.retryable) == (FetchError, False)


@pytest.mark.parametrize("commit", [None, "", "main", "A" * 40, "../" * 14, "f" * 64])
def test_a_server_that_names_no_commit(hub: HubStandIn, run: Run, commit: str | None) -> None:
    fields = {} if commit is None else {"X-Repo-Commit": commit}
    hub.behave = lambda asked: Reply(200, {**fields, "ETag": '"x"'}, b"{}")
    error = refused(run, hub, AdapterRef(REPO))
    assert (type(error), error.retryable) == (FetchError, False)
    assert "no hub; check the endpoint" in error.problem


def test_an_answer_about_another_commit(hub: HubStandIn, run: Run) -> None:
    asked_for = hub.put(REPO, ADAPTER)
    hub.behave = lambda asked: Reply(200, {"X-Repo-Commit": "e" * 40, "ETag": '"x"'}, b"{}")
    error = refused(run, hub, AdapterRef(REPO, revision=asked_for))
    assert type(error) is IntegrityError
    assert "another commit" in error.problem


@pytest.mark.parametrize(
    "etag", [None, "../../etc/passwd", 'W/"1-2"', "e" * 63, "E" * 64, "x" * 40]
)
@pytest.mark.parametrize("size", ["-1", "nine", ""])
async def test_digests_and_sizes_that_are_none(
    hub: HubStandIn, etag: str | None, size: str
) -> None:
    """They are as good as none: nothing is named by them, nothing checked."""
    fields = {"X-Repo-Commit": "e" * 40, "X-Linked-Size": size}
    if etag is not None:
        fields["X-Linked-Etag"] = etag
    hub.behave = lambda asked: Reply(302, {**fields, "Location": "http://127.0.0.1:9/x"})
    with locating(hub) as locator:
        located = await locator.locate(AdapterRef(REPO))
    assert [(file.nbytes, file.expected) for file in located.files] == [(None, None)] * 2


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "//[bad", "http://a b/", "http:///x"])
async def test_a_place_that_is_no_url(hub: HubStandIn, place: str) -> None:
    """The engine will be led there by the file's own URL, and refuses it."""
    fields = {"X-Repo-Commit": "e" * 40, "Location": place}
    hub.behave = lambda asked: Reply(302, fields)
    with locating(hub) as locator:
        try:
            located = await locator.locate(AdapterRef(REPO))
        except FetchError as error:
            assert not error.retryable
            assert "bad" not in error.problem
        else:
            assert [file.target.found for file in located.files] == [None, None]


def test_redirects_without_end(hub: HubStandIn, run: Run) -> None:
    hub.behave = lambda asked: Reply(307, {"Location": asked.target})
    error = refused(run, hub, AdapterRef(REPO))
    assert (type(error), error.retryable) == (FetchError, False)
    assert len(hub.asked) <= 2 * 20
