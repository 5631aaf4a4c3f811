"""When a request is made again, and when a source is left alone for good."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_SECONDS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and after how many seconds.

    Attributes
    ----------
    attempts
        Requests for one piece, the first included, that may fail without bringing much.
    base, most
        The first wait is up to `base`, each next one up to twice as long, and none above `most`.
    obeyed
        The longest wait that a source may ask for; what is longer ends the download at once.
    """

    attempts: int = 5
    base: float = 0.25
    most: float = 8.0
    obeyed: float = 30.0

    def wait(self, failed: int, draw: float, retry_after: float | None = None) -> float | None:
        """Seconds until the next attempt after `failed` ones; None if there shall be none.

        `draw` is drawn evenly from [0, 1): callers that failed together do not come back together.
        """
        if failed >= self.attempts or (retry_after or 0.0) > self.obeyed:
            return None
        longest = min(self.most, self.base * 2.0 ** min(failed - 1, 60))
        if retry_after is None:
            return draw * longest
        return retry_after + draw * min(longest, 1.0)


def retry_after_of(text: str, now: float) -> float | None:
    """Seconds that a `Retry-After` field means, at the time `now` since the epoch.

    None for what is neither seconds nor a date.
    """
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
