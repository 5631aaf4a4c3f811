"""Answers that stay wrong: one typed error for each caller, and nobody else notices."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_world import Fault, FaultyWorld, assert_at_rest, at, in_turn, loads_right, over
from faults import (
    bomb,
    in_an_hour,
    long_without_length,
    other_etag,
    other_size,
    redirected_for_ever,
    refused_range,
    reset,
    short_without_length,
    status,
    truncated,
    wrong_bytes,
    wrong_range,
)

from common import Run
from lorax_async import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    LoraxError,
)
from lorax_async.config import Checking
from lorax_async.io.cache.upkeep import ls

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

DAY = 86_400.0


@dataclass(frozen=True)
class Case:
    """What is wrong, and what every caller is told."""

    fault: Fault
    kind: type[LoraxError]
    words: str
    retryable: bool = True
    retry_after: tuple[float, float] | None = None
    stage: str = "fetch"
    promises: bool = True
    verify: Checking = "stream"


CASES = {
    # the config
    "config truncated": Case(at("config", truncated), FetchError, "closed the connection"),
    "config short": Case(at("config", short_without_length), IntegrityError, "its source said"),
    "config short, no promise": Case(
        *(at("config", short_without_length), AdapterFormatError, "adapter_config.json"),
        retryable=False,
        stage="verify",
        promises=False,
    ),
    "config long": Case(at("config", long_without_length), IntegrityError, "its source said"),
    "config wrong": Case(at("config", wrong_bytes), IntegrityError, "sha256"),
    "config bomb": Case(at("config", bomb), FetchError, "coded", retryable=False),
    "config 401": Case(at("config", status("401 No")), AccessDeniedError, "401", retryable=False),
    "config 404": Case(at("config", status("404 No")), AdapterNotFoundError, "404", False),
    "config 418": Case(at("config", status("418 No")), FetchError, "418", retryable=False),
    "config 500": Case(at("config", status("500 No")), FetchError, "500"),
    "config 429 a day": Case(
        *(at("config", status("429 No", "Retry-After: 86400")), FetchError, "429"),
        retry_after=(DAY, DAY),
    ),
    "config loop": Case(at("config", redirected_for_ever), FetchError, "redirects", False),
    # the beginning of the weights
    "header short": Case(at("header", short_without_length), IntegrityError, "its source said"),
    "header short, no promise": Case(
        *(at("header", short_without_length), AdapterFormatError, "the file ends"),
        retryable=False,
        stage="verify",
        promises=False,
    ),
    "header bomb": Case(at("header", bomb), FetchError, "coded", retryable=False),
    "header of another size": Case(at("header", other_size), IntegrityError, "its source said"),
    "header wrong range": Case(at("header", wrong_range), IntegrityError, "were asked for"),
    "header 416": Case(at("header", status("416 No")), IntegrityError, "shorter"),
    "header 503 until a date": Case(
        at("header", in_an_hour()), FetchError, "503", retry_after=(3_000, 3_600)
    ),
    "header loop": Case(at("header", redirected_for_ever), FetchError, "redirects", False),
    # the rest of the weights
    "body truncated": Case(at("body", truncated), FetchError, "closed the connection"),
    "body reset": Case(at("body", reset), FetchError, "ECONNRESET"),
    "body wrong": Case(at("body", wrong_bytes), IntegrityError, "sha256", verify="before_use"),
    "body of another ETag": Case(at("body", other_etag), IntegrityError, "changed"),
    "body of another size": Case(at("body", other_size), IntegrityError, "changed"),
    "body wrong range": Case(at("body", wrong_range), IntegrityError, "were asked for"),
    "body 416": Case(at("body", status("416 No")), IntegrityError, "shorter"),
    "body 416 of what it has": Case(at("body", refused_range), FetchError, "refuses a range"),
    "body bomb": Case(at("body", bomb), FetchError, "coded", retryable=False),
    "body 500": Case(at("body", status("500 No")), FetchError, "500"),
    "body 429 in seconds": Case(
        *(at("body", status("429 No", "Retry-After: 3")), FetchError, "429"),
        retry_after=(3, 3),
    ),
    "body 503 until a date": Case(
        at("body", in_an_hour()), FetchError, "503", retry_after=(3_000, 3_600)
    ),
    "body 429 a day": Case(
        *(at("body", status("429 No", "Retry-After: 86400")), FetchError, "429"),
        retry_after=(DAY, DAY),
    ),
    "body loop": Case(at("body", redirected_for_ever), FetchError, "redirects", False),
}


def check(error: object, case: Case) -> None:
    assert isinstance(error, LoraxError)
    assert type(error) is case.kind, error
    assert case.words in error.problem
    assert (error.id, error.stage) == ("bad", case.stage)
    assert error.retryable is case.retryable
    assert error.attempt == 1
    assert error.story
    if case.retry_after is None:
        assert error.retry_after is None
    else:
        least, most = case.retry_after
        assert error.retry_after is not None
        assert least <= error.retry_after <= most


@pytest.mark.parametrize(("run", "name"), in_turn(CASES), indirect=["run"])
def test_what_stays_wrong_is_told_to_each_caller(run: Run, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    with FaultyWorld(tmp_path / "cache", tmp_path, verify=case.verify) as world:
        world.locator.promises = case.promises
        bad, good = world.stock("bad"), world.stock("good", 1)
        world.faults["bad"] = case.fault

        async def body() -> None:
            async with over(world) as loader:
                healthy = asyncio.create_task(loads_right(loader, world, good))
                loading = (loader.load(world.ref("bad")) for _ in range(2))
                first, second = await asyncio.gather(*loading, return_exceptions=True)
                check(first, case)
                check(second, case)
                assert first is not second
                await healthy
                await assert_at_rest(loader, world)
                partials = [listed.is_partial for listed in ls(world.cache)]
                assert partials.count(False) == 1
                if case.kind is IntegrityError:
                    assert not any(partials), "of what may be wrong nothing is kept"
                world.faults.clear()
                await loads_right(loader, world, bad)
                await assert_at_rest(loader, world)

        run(body())
