"""The bodies of requests, as OpenAI has them.

What would change the answer, and is not implemented, is refused unless its value changes nothing.
Unknown names are refused, as OpenAI refuses them: a word misspelled is not a word ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from lorax_async.errors import shorten
from lorax_async.server.calls.errors import Refusal

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
"""All text is searched for them."""

MAX_SEED = 2**63 - 1

IGNORED = frozenset({
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
"""They say something about the request, and nothing about the answer."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that are not implemented, with their values, beside null, that change nothing."""

NEUTRAL_IN_MESSAGES: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""An answer of ours, sent back as part of a conversation, has some of them."""

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

Item = TypeVar("Item")
Listed = Annotated[list[Item], Field(fail_fast=True)]
"""The first thing that is wrong is told; to find all that is takes seconds of the loop's time."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]

_FORMS = {
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": f"must be one text, or up to {MAX_STOPS}, of up to {MAX_STOP_CHARACTERS} characters",
    "content": "must be a text, or a list of parts of type text",
}


class StreamOptions(BaseModel):
    model_config = _STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted and not done, as OpenAI lets its clients choose."""


class Body(BaseModel):
    """What both kinds of requests have."""

    model_config = _STRICT
    default_max_tokens: ClassVar[int | None]

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """As vLLM has it: go on to `max_tokens`, whatever the model says. For measurements."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """At most so many; None is as many as there is room for."""
        return self.max_tokens or self.default_max_tokens


class CompletionBody(Body):
    """Of /v1/completions."""

    default_max_tokens = 16

    prompt: str | Listed[str] | Listed[int] | Listed[Listed[int]]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One for each prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(BaseModel):
    model_config = _STRICT

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Listed[TextPart]
    name: str | None = None

    def as_template(self) -> dict[str, str]:
        """As chat templates take it. They know "developer" by its older name."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content} | named


class ChatBody(Body):
    """Of /v1/chat/completions."""

    default_max_tokens = None

    messages: Annotated[Listed[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class LoadBody(BaseModel):
    """Of /v1/load_lora_adapter, as vLLM has it."""

    model_config = _STRICT

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadBody(BaseModel):
    """Of /v1/unload_lora_adapter."""

    model_config = _STRICT

    lora_name: str = ""
    lora_int_id: int | None = None
    """vLLM's number of an adapter; nothing here has one."""


T = TypeVar("T", bound=BaseModel)


def parsed(kind: type[T], content: bytes) -> T:
    """A body of that kind. Raises `Refusal` with status 400."""
    try:
        found = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refusal(400, "The body must be a JSON object", code="invalid_json")
    if issubclass(kind, Body):
        _drop(found, NEUTRAL, "")
        for number, message in enumerate(_listed(found.get("messages"))):
            _drop(message, NEUTRAL_IN_MESSAGES, f"messages.{number}.")
        found = {name: value for name, value in found.items() if name not in IGNORED}
    try:
        body = kind.model_validate(found)
    except ValidationError as error:
        raise _refusal_of(error) from None
    if isinstance(body, Body) and body.stream_options is not None and not body.stream:
        raise Refusal(
            400, "stream_options is for requests with stream=true", param="stream_options"
        )
    return body


def _listed(messages: object) -> list[dict[str, Any]]:
    """What of `messages` is an object; the rest is refused with all else that is none."""
    found = messages if isinstance(messages, list) else []
    return [message if isinstance(message, dict) else {} for message in found]


def _drop(found: dict[str, Any], neutral: Mapping[str, tuple[object, ...]], where: str) -> None:
    """Take out what changes nothing. Raises `Refusal` for what would."""
    for name in neutral.keys() & found.keys():
        value = found.pop(name)
        if value is not None and not any(_same(value, other) for other in neutral[name]):
            raise Refusal(
                400,
                f"{where}{name} is not implemented here; leave it out",
                param=f"{where}{name}",
                code="unsupported_parameter",
            )


def _same(value: object, other: object) -> bool:
    """To Python, 0 is False."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _refusal_of(error: ValidationError) -> Refusal:
    """Of the first thing that is wrong, in OpenAI's words where they have any."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = [shorten(str(part), 100) for part in first["loc"]]
    # Where several forms are possible, pydantic goes on with the one that it tried.
    formed = next((n for n, part in enumerate(path) if part in _FORMS), None)
    if first["type"] == "extra_forbidden":
        name = ".".join(path)
        return Refusal(
            400,
            f"Unrecognized request argument supplied: {name}",
            param=name,
            code="unknown_parameter",
        )
    if first["type"] == "missing" and (formed is None or formed == len(path) - 1):
        name = ".".join(path)
        return Refusal(
            400,
            f"Missing required parameter: {name}",
            param=name,
            code="missing_required_parameter",
        )
    if formed is not None:
        name, text = ".".join(path[: formed + 1]), _FORMS[path[formed]]
    else:
        name, text = ".".join(path), f"is refused: {first['msg'].lower()}"
    return Refusal(400, f"{name} {text}", param=name, code="invalid_value")
