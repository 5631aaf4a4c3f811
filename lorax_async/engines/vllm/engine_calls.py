"""The calls of the plug-in to vLLM's engine, and through it to all of its workers."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from lorax_async.engines.vllm.notices import BuildEnded, Notice, receive_notices
from lorax_async.errors import FetchError, FetchTimeoutError, UnsupportedAdapterError
from lorax_async.lru import remember

FIRST_QUESTION, NEXT_QUESTION = 1.0, 2.0
"""Seconds without a notice until the workers are asked whether weights are built, and asked again.
An answer waits for the steps that are in flight."""

MAX_BUILDS = 4096
"""Builds whose notices are remembered."""

_logger = logging.getLogger("vllm.lorax_async")  # vLLM writes what its children log


class EngineCalls:
    """vLLM's `EngineClient`, as far as the plug-in needs it.

    `extended` is whether the workers build weights for us; if not, vLLM loads adapters itself.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self.extended = False
        self._builds: OrderedDict[str, asyncio.Future[str | None]] = OrderedDict()
        """The error of each build, by its ticket: its notice may come before the ticket does."""

    async def setup(self, host_bytes: int, added: Sequence[int]) -> None:
        """Extend the workers, or say once why they cannot be; see `WorkerExtension.lorax_setup`."""
        try:
            reasons = await self.call("lorax_setup", host_bytes, added)
        except Exception as error:  # noqa: BLE001 - vLLM's, of any class
            reasons = [f"start vLLM with --worker-extension-cls {EXTENSION} ({error})"]
        reason = next((reason for reason in reasons if reason is not None), None)
        self.extended = reason is None
        if reason is not None:
            _logger.warning(
                "adapters are fetched and checked beside vLLM's engine, but their weights are"
                " built inside its loop: %s",
                reason,
            )

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `WorkerExtension`; return the result of each worker."""
        results: list[Any] = await self._client.collective_rpc(method, args=args)
        return results

    async def listen(self, host: str, on_loss: Callable[[str, str], None]) -> asyncio.BaseTransport:
        """Let the workers send notices to address `host`, until the transport is closed.

        `on_loss(path, reason)` is called for an adapter that a worker lost.
        """

        def handle(notice: Notice) -> None:
            if isinstance(notice, BuildEnded):
                self._end_build(notice)
            else:
                on_loss(*notice)

        transport, address = await receive_notices(host, handle)
        try:
            await self.call("lorax_notify", address)
        except BaseException:
            transport.close()
            raise
        return transport

    async def build(self, path: str, timeout: float) -> None:
        """Build the weights in `path` in every worker, unless they are built already.

        Raise `UnsupportedAdapterError` if vLLM cannot load it.
        """
        if not self.extended:
            return
        tickets = await self.call("lorax_prepare", path)
        builds = [self._find_build(ticket) for ticket in tickets if ticket is not None]
        try:
            async with asyncio.timeout(timeout):
                errors = await self._wait_for(builds, path)
        except TimeoutError:
            raise FetchTimeoutError(f"vLLM did not build it within {timeout:g} s") from None
        for error in errors:
            if error is not None:
                raise UnsupportedAdapterError(f"vLLM cannot load it: {error}")

    async def _wait_for(
        self, builds: Sequence[asyncio.Future[str | None]], path: str
    ) -> list[str | None]:
        """Return the errors of builds when all have ended."""
        pause = FIRST_QUESTION
        while builds and (await asyncio.wait(builds, timeout=pause))[1]:
            results = await self.call("lorax_prepared", path)  # a notice may be lost
            if all(done for done, _ in results):
                return [error for _, error in results]
            pause = NEXT_QUESTION
        return [build.result() for build in builds]

    def _find_build(self, ticket: str) -> asyncio.Future[str | None]:
        build = self._builds.get(ticket)
        if build is None:
            build = asyncio.get_running_loop().create_future()
            remember(self._builds, ticket, build, MAX_BUILDS)
        return build

    def _end_build(self, notice: BuildEnded) -> None:
        build = self._find_build(notice.ticket)
        if not build.done():
            build.set_result(notice.error)

    async def forget(self, path: str, *, keep_copy: bool = False) -> None:
        """Let the workers close the adapter's files, and drop their weights unless `keep_copy`."""
        if self.extended:
            await self.call("lorax_forget", path, keep_copy)

    async def add(self, request: Any) -> None:
        """Give an adapter to vLLM's engine. Raise `UnsupportedAdapterError` if that fails."""
        try:
            await self._client.add_lora(request)
        except Exception as error:
            raise UnsupportedAdapterError(
                f"vLLM cannot load it: {error}", id=request.lora_name
            ) from error

    async def remove(self, number: int) -> None:
        """Take an adapter out of its slot and out of vLLM's cache."""
        await self._client.remove_lora(number)

    async def report(self) -> dict[str, Any]:
        """Return what every worker holds, with the counts and failures of all of them."""
        if not self.extended:
            return {"device": (), "cached": (), "built": {}, "lost": {}, "counts": {}}
        first, *others = await self.call("lorax_report")
        for other in others:
            for name in ("device", "cached"):
                first[name] = [number for number in first[name] if number in other[name]]
            first["built"] = {p: n for p, n in first["built"].items() if p in other["built"]}
            first["lost"] |= other["lost"]
            first["counts"] = {
                name: n + other["counts"][name] for name, n in first["counts"].items()
            }
        result: dict[str, Any] = first
        return result

    def uses(self, path: str) -> bool:
        """Return whether a request that has not ended uses the adapter in `path`."""
        return bool(self._requests(path))

    async def fail(self, path: str, problem: str) -> None:
        """End the requests that use the adapter in `path` with status 503."""
        from vllm.exceptions import GracefulHTTPError  # noqa: PLC0415

        states = self._requests(path)
        for state in states:
            error = FetchError(problem, id=state.lora_request.lora_name)
            state.queue.put(GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE))
        await self._client.abort([state.request_id for state in states], internal=True)

    def _requests(self, path: str) -> list[Any]:
        states = self._client.output_processor.request_states.values()
        return [each for each in states if getattr(each.lora_request, "lora_path", None) == path]


EXTENSION = "lorax_async.engines.vllm.worker.WorkerExtension"
