"""From token ids to the text that a client sees: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT = 8
"""Tokens of the prompt that a decoder sees first: some drop the space at the very beginning."""

_INVALID_PREFIX = "Invalid prefix encountered"
"""How DecodeStream begins to say that what it was fed no longer begins with what it had given."""


class Detokenizer:
    """Turns one sequence's tokens into text as they come, without its special tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in prompt[-CONTEXT:]:
            self.feed(token)

    def feed(self, token: int) -> str:
        """What the token adds; "" while a character is not whole."""
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
        # Bytes that are no text. What was held of them is lost, what follows is not.
        self._stream = DecodeStream(skip_special_tokens=True)
        return self._stream.step(self._tokenizer, token) or ""


class StopStrings:
    """Lets text through up to the stop string that is complete first, and nothing of it.

    What may yet become one is held back. The outcome does not depend on how the text is cut.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False
        """Whether a stop string came; nothing is let through any more."""

    def feed(self, text: str) -> str:
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            self.hit = True
            _, keep = min(found)
            out, self._held = self._held[:keep], ""
            return out
        return self._let_go(len(self._held) - self._beginning())

    def end(self) -> str:
        """No more text comes: what was held back is none."""
        return self._let_go(len(self._held))

    def _let_go(self, length: int) -> str:
        out, self._held = self._held[:length], self._held[length:]
        return out

    def _beginning(self) -> int:
        """How much of the end may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
