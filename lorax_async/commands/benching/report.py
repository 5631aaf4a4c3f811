"""What answers come to: percentiles, throughput and errors, by warm and cold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

from lorax_async.commands.benching.open_loop import Played
from lorax_async.commands.benching.streaming_client import Answer

PERCENTILES = (50, 90, 99)


def percentile(sorted_values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of all do not exceed (nearest rank)."""
    return sorted_values[max(0, ceil(len(sorted_values) * percent / 100) - 1)]


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Milliseconds; None where there is nothing."""
    ordered = sorted(value * 1e3 for value in values)
    if not ordered:
        return None
    return {f"p{p}": percentile(ordered, p) for p in PERCENTILES} | {"max": ordered[-1]}


def summary(played: Played) -> dict[str, Any]:
    """All numbers, ready for JSON. Rates are over the whole time, to the end of the last answer."""
    seconds = played.seconds
    return {
        "seconds": seconds,
        "most_at_once": played.most_at_once,
        "late_ms": spread(each.late for each in played.answers if each.late is not None),
        "all": _of(played.answers, seconds),
        "warm": _of([each for each in played.answers if not each.cold], seconds),
        "cold": _of([each for each in played.answers if each.cold], seconds),
    }


def _of(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Times are those of answers that came to their end; throughput is of everything that came."""
    whole = [each for each in answers if each.error is None]
    tokens = sum(each.made for each in answers)
    prompts = [each.prompt_tokens for each in whole if each.prompt_tokens is not None]
    return {
        "requests": len(answers),
        "whole": len(whole),
        "errors": dict(Counter(each.error for each in answers if each.error is not None)),
        "ttft_ms": spread(each.first for each in whole if each.first is not None),
        "between_chunks_ms": spread(gap for each in whole for gap in each.gaps),
        "per_token_ms": spread(each.per_token for each in whole if each.per_token is not None),
        "chunks": sum(len(each.chunks) for each in answers),
        "tokens": tokens,
        "prompt_tokens_mean": sum(prompts) / len(prompts) if prompts else None,
        "requests_per_second": len(whole) / seconds if seconds else 0.0,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }
