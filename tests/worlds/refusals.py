"""Tables of what is refused: by the words of the refusal, the values that meet with it."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest


def refusals(
    call: Callable[[Any], object], kind: type[Exception], cases: Mapping[str, Iterable[Any]]
) -> list[str]:
    """The texts of the errors with which `call` ends for each value; each matches its words."""
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
