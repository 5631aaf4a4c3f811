"""Tables of refused values, by the words of the refusal."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest


def refusals(
    call: Callable[[Any], object], kind: type[Exception], cases: Mapping[str, Iterable[Any]]
) -> list[str]:
    """Return the error texts of `call` for each value; assert that each matches its words."""
    texts = []
    for words, values in cases.items():
        for value in values:
            try:
                result = call(value)
            except kind as error:
                assert re.search(words, str(error)), f"{value!r:.200} is refused with: {error}"
                texts.append(str(error))
            else:
                pytest.fail(f"{value!r:.200} is not refused ({words}): {result!r:.200}")
    return texts
