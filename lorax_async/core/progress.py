"""How far one request is: its prompt, then a token at a time."""

from __future__ import annotations


class Progress:
    """Tokens of one sequence.

    Attributes
    ----------
    position
        Tokens that were computed, and whose keys and values the engine has.
    generated
        Tokens that came out.
    """

    __slots__ = ("_limit", "_prompt", "generated", "position")

    def __init__(self, prompt_tokens: int, max_new_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._limit = max_new_tokens
        self.position = 0
        self.generated = 0

    @property
    def wants(self) -> int:
        """Tokens that could be computed next."""
        return self._prompt + self.generated - self.position

    def advance(self, tokens: int) -> bool:
        """So many were computed; whether the sequence is as long as it may be.

        The last of what it wanted brings the next token.
        """
        self.position += tokens
        if not self.wants:
            self.generated += 1
        return self.generated == self._limit

    def restart(self) -> None:
        """What was computed is lost: it begins again, with the tokens that came out."""
        self.position = 0
