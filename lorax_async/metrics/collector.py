"""A collector of `prometheus_client` for one loader."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Self

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from lorax_async.io.inbox import running_loop
from lorax_async.loader import AdapterLoader
from lorax_async.metrics.families import Numbers, families_of
from lorax_async.metrics.loop_lag import LoopLag

LAG_PERIOD = 0.25
ANSWER_SECONDS = 1.0


class LoaderCollector(Collector):
    """The numbers of one loader, for a registry of the embedding program.

    Parameters
    ----------
    loader
        Open. This is made on its event loop, and closed there.
    lag_period
        Seconds between two looks at how late the loop is; they end with `close`, or soon after the
        loader's end.
    timeout
        Seconds for which a scrape in another thread waits for the loop. Then it gets the numbers of
        the scrape before.

    `collect` may be called from any thread and never keeps the loop waiting. Once the loader is
    closed it goes on with the last numbers.

    Raises
    ------
    UsageError
        The loader is not open, or belongs to another loop.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        *,
        lag_period: float = LAG_PERIOD,
        timeout: float = ANSWER_SECONDS,
    ) -> None:
        loader.usage()  # raises unless it is open, and here
        self._loader = loader
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._lag = LoopLag(self._loop, lag_period, lambda: loader.closed)
        self._last = self._look()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the looks at the loop; `collect` goes on without. Idempotent; on the loop."""
        self._lag.close()

    def describe(self) -> Iterable[Metric]:
        """The families, for a registry to see whether their names are free. Asks nobody."""
        return families_of(self._last)

    def collect(self) -> Iterable[Metric]:
        """The families with their numbers of now."""
        self._refresh()
        return families_of(self._last)

    def _refresh(self) -> None:
        if running_loop() is self._loop or self._loop.is_closed():
            self._look()
            return
        answer: Future[None] = Future()
        try:
            self._loop.call_soon_threadsafe(self._answer, answer)
        except RuntimeError:  # it was closed now
            return
        done, _ = wait([answer], self._timeout)
        if not done and answer.cancel():  # the loop is busy or has stopped
            return
        answer.result()  # raises what the look has raised

    def _answer(self, answer: Future[None]) -> None:
        """On the loop. Whoever asked may have gone: then nobody needs it."""
        if not answer.set_running_or_notify_cancel():
            return
        try:
            self._look()
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            answer.set_exception(error)
        else:
            answer.set_result(None)

    def _look(self) -> Numbers:
        self._last = Numbers(*self._loader.last_numbers(), self._lag.lags())
        return self._last
