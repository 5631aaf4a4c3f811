"""Worker extensions that time what is done in the engine's loop. Imported by vLLM's workers."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from lorax_async.engines.vllm.worker import WorkerExtension


class LoopTimes:
    """Adds the seconds of loading, and of activating alone, since the last call of `loop_times`."""

    def loop_times(self) -> dict[str, float]:
        times: dict[str, float] = self.__dict__.setdefault("_loop_times", {})
        result = dict(times)
        times.clear()
        lora = self.model_runner.lora_manager  # type: ignore[attr-defined]
        for name, owner, method in (
            ("load", lora, "add_adapter"),
            ("activate", lora._adapter_manager, "activate_adapter"),
        ):
            if method not in vars(owner):
                setattr(owner, method, _timed(getattr(owner, method), times, name))
        return result


class TimedExtension(WorkerExtension, LoopTimes):
    """The plug-in's, of which its own calls are timed too."""

    def lorax_prepare(self, path: str) -> str | None:
        result: str | None = self._timed(super().lorax_prepare, path)
        return result

    def lorax_prepared(self, path: str) -> tuple[bool, str | None]:
        result: tuple[bool, str | None] = self._timed(super().lorax_prepared, path)
        return result

    def lorax_report(self) -> dict[str, Any]:
        result: dict[str, Any] = self._timed(super().lorax_report)
        return result

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        return _timed(call, self.__dict__.setdefault("_loop_times", {}), "calls")(*args)


def _timed(call: Callable[..., Any], times: dict[str, float], name: str) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        start = perf_counter()
        try:
            return call(*args)
        finally:
            times[name] = times.get(name, 0.0) + perf_counter() - start

    return timed
