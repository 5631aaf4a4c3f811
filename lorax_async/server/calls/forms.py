"""The JSON of answers, whole and in pieces, as OpenAI has it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lorax_async.server.generation import Finish

DONE = b"data: [DONE]\n\n"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens went in and came out."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence, as far as it came."""

    text: str
    finish: Finish | None


def as_event(data: Json) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request of /v1/completions.

    `with_usage`: the pieces end with one that has the usage, and none before has any.
    """

    model: str
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    whole_object: ClassVar[str] = "text_completion"
    piece_object: ClassVar[str] = "text_completion"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Json:
        told = [self._choice(n, choice.text, choice.finish) for n, choice in enumerate(choices)]
        return self._envelope(self.whole_object, told) | {"usage": usage.as_json()}

    def beginning(self, index: int) -> Json | None:
        """What comes before the first text of a sequence, if anything does."""
        del index
        return None

    def piece(self, index: int, text: str) -> Json:
        return self._piece([self._choice(index, text, None)])

    def end(self, index: int, finish: Finish) -> Json:
        return self._piece([self._choice(index, "", finish)])

    def usage(self, usage: Usage) -> Json:
        return self._piece([]) | {"usage": usage.as_json()}

    def _choice(self, index: int, text: str, finish: Finish | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def _piece(self, choices: list[Json]) -> Json:
        none_yet = {"usage": None} if self.with_usage else {}
        return self._envelope(self.piece_object, choices) | none_yet

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True)
class ChatCompletion(Completion):
    """The answer to one request of /v1/chat/completions."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    whole_object: ClassVar[str] = "chat.completion"
    piece_object: ClassVar[str] = "chat.completion.chunk"

    def beginning(self, index: int) -> Json | None:
        return self._piece([_delta(index, {"role": "assistant", "content": ""}, None)])

    def piece(self, index: int, text: str) -> Json:
        return self._piece([_delta(index, {"content": text}, None)])

    def end(self, index: int, finish: Finish) -> Json:
        return self._piece([_delta(index, {}, finish)])

    def _choice(self, index: int, text: str, finish: Finish | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}


def _delta(index: int, delta: Json, finish: Finish | None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
