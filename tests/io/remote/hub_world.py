"""A locator that asks a stand-in, and what the tests put there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from fetching import Anywhere
from hub_stand_in import SIGNATURE, HubStandIn

from lorax_async.adapter import AdapterRef
from lorax_async.core.retries import Retries
from lorax_async.errors import LoraxError
from lorax_async.io.http.settings import Rules
from lorax_async.io.remote.hub import HubLocator

REPO = "org/name"
TOKEN = "hf_q5ecre7Token"
CONFIG = b'{"peft_type": "LORA", "r": 4}'
WEIGHTS = bytes(range(256)) * 20
ADAPTER = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
QUICK = Retries(attempts=3, base=0.01, most=0.02, obeyed=1.0)


@contextmanager
def locating(
    hub: HubStandIn | str,
    *,
    rules: Rules | None = None,
    timeout: float = 20.0,
    retries: Retries = QUICK,
) -> Iterator[HubLocator]:
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    with ThreadPoolExecutor(8, "lorax-test") as threads:
        yield HubLocator(
            endpoint=endpoint,
            rules=rules or Anywhere(),
            threads=threads,
            timeout=timeout,
            retries=retries,
        )


def tells_no_secret(*things: object) -> None:
    """Neither a token, nor a signature, nor the path of a signed place."""
    for thing in things:
        cause = getattr(thing, "__cause__", None)
        for text in (str(thing), repr(thing), repr(cause)):
            for secret in (TOKEN, TOKEN[3:], SIGNATURE.partition("=")[2], "/store/"):
                assert secret not in text, text


async def refused(hub: HubStandIn | str, ref: AdapterRef) -> LoraxError:
    with locating(hub) as locator, pytest.raises(LoraxError) as caught:
        await locator.locate(ref)
    error = caught.value
    tells_no_secret(error, *error.args)
    assert error.stage == "resolve"
    assert error.__cause__ is None
    return error
