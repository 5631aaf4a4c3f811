"""What a client says, as token ids. Everything here blocks, for as long as a text is long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer

from lorax_async.errors import shorten
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.requests import Body, ChatBody, CompletionBody


class ChatTokenizer(Protocol):
    """What is used of a fast tokenizer of transformers."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    def apply_chat_template(
        self, conversation: Any, /, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


class Prompts:
    """Turns prompts and conversations into token ids. In any thread, and in several."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._chat = tokenizer
        # A copy, for it must cut and pad nothing, and the caller's may be told otherwise any time.
        self.tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._vocabulary = self.tokenizer.get_vocab_size(with_added_tokens=True)

    def read(self, body: Body) -> list[tuple[int, ...]]:
        """The token ids of each prompt. Raises `Refusal`."""
        if isinstance(body, ChatBody):
            return [self._of_chat(body)]
        assert isinstance(body, CompletionBody)
        found = [self._of_prompt(prompt) for prompt in body.prompts]
        if not found or not all(found):
            raise Refusal(400, "A prompt is empty", param="prompt", code="invalid_value")
        return found

    def _of_prompt(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._encoded(prompt)
        self._require_known(prompt)
        return tuple(prompt)

    def _of_chat(self, body: ChatBody) -> tuple[int, ...]:
        messages = [message.as_template() for message in body.messages]
        try:
            text = self._chat.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:
            said = shorten(str(error), 300)
            raise Refusal(
                400,
                f"The model's chat template refuses these messages: {said}",
                param="messages",
                code="invalid_value",
            ) from None
        # The template has written what stands before and between.
        return self._encoded(text, add_special_tokens=False)

    def _encoded(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """In a batch of one, for which it gives the interpreter to others: it may take seconds."""
        (found,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(found.ids)

    def _require_known(self, tokens: Sequence[int]) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise Refusal(
                400,
                f"A token id of the prompt is outside 0 … {self._vocabulary - 1}",
                param="prompt",
                code="invalid_value",
            )
