"""The bodies of requests in OpenAI's form: read, parse and check them within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import Request
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from tokenizers import Tokenizer

from lorax_async.errors import shorten
from lorax_async.server.engine import LEAST_PENALTY, MOST_PENALTY
from lorax_async.server.responses import Refusal, invalid_parameter
from lorax_async.types import AdapterKey

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
"""A limit, because every generated text is searched for stop strings."""

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1

MAX_PROMPTS = 2048
MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_MEMBERS = 64
"""Bodies are validated on the event loop. These limits, and lists that fail at their first fault,
bound the time that a hostile body can take."""

IGNORED = frozenset({
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
"""Parameters that describe the request and do not affect the answer."""

AllowedValues = Mapping[str, tuple[object, ...]]

NEUTRAL: AllowedValues = {
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
"""Parameters that are not implemented, with the values, beside null, that change nothing."""

NEUTRAL_IN_MESSAGES: AllowedValues = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""The server's own answers have some of these, and return as parts of conversations."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]

_EXPECTED = {
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists;"
    f" of up to {MAX_PROMPTS} prompts",
    "stop": f"must be one text, or up to {MAX_STOPS}, of up to {MAX_STOP_CHARACTERS} characters",
    "content": "must be a text, or a list of parts of type text",
}


def _with_dropped(
    neutral: AllowedValues, ignored: frozenset[str] = frozenset()
) -> Callable[[dict[str, Any]], None]:
    """Return a function that adds the parameters that `parse_body` drops to a JSON schema."""

    def add(schema: dict[str, Any]) -> None:
        for name, values in neutral.items():
            described = {"enum": [*values, None], "description": "Not implemented."}
            schema["properties"][name] = described
        for name in sorted(ignored):
            schema["properties"][name] = {"description": "Ignored."}
        if "stream_options" in schema["properties"]:
            _require_stream(schema)

    return add


class StrictModel(BaseModel):
    """A JSON object with at most `MAX_MEMBERS` members, all of them known."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # descriptions of the schema, which clients read
    )

    @model_validator(mode="before")
    @classmethod
    def _limit_members(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_MEMBERS:
            raise ValueError(f"it has more than {MAX_MEMBERS} members")
        return value


def _require_stream(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that `stream_options` needs `stream`, as `parse_body` requires."""
    given = {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]}
    schema["if"] = given
    schema["then"] = {"properties": {"stream": {"const": True}}, "required": ["stream"]}


class StreamOptions(StrictModel):
    """Needs `stream`."""

    include_usage: bool | None = None
    """Send the usage of the whole answer in a last event."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`, send the usage so far in every event, as vLLM does."""
    include_obfuscation: bool | None = None
    """Accepted and ignored; OpenAI leaves it to clients."""


class GenerationBody(StrictModel):
    """The parameters of both kinds of completions."""

    model_config = ConfigDict(json_schema_extra=_with_dropped(NEUTRAL, IGNORED))

    default_max_tokens: ClassVar[int | None]

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """As in vLLM; 0 and -1 are all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """As in vLLM."""
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=MOST_PENALTY)] | None = None
    """As in vLLM."""
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """Generate up to `max_tokens` and ignore the end token, as in vLLM; for measurements."""

    @property
    def wanted_tokens(self) -> int | None:
        """The maximum number of new tokens; None is as many as fit."""
        return self.max_tokens or self.default_max_tokens


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    default_max_tokens = 16

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    )

    @property
    def prompts(self) -> list[Any]:
        """The text or token ids of each prompt."""
        prompt = self.prompt
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        return [prompt] if one else list(prompt)


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    model_config = ConfigDict(json_schema_extra=_with_dropped(NEUTRAL_IN_MESSAGES))

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)]
    name: str | None = None

    def as_template(self) -> dict[str, str]:
        """Return the message for chat templates, which use the older name of "developer"."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content} | name


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    default_max_tokens = None

    messages: Annotated[
        list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TokenizeBody(StrictModel):
    """The body of /tokenize, as in vLLM: a prompt, or a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
        | None
    ) = None
    add_special_tokens: bool | None = None
    """None: for prompts; the template of conversations writes them."""

    @model_validator(mode="after")
    def _require_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("it has either prompt or messages")
        return self


class DetokenizeBody(StrictModel):
    """The body of /detokenize, as in vLLM."""

    model: str | None = None
    tokens: TokenIds


def _require_texts(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that texts are required: the calls refuse "", in vLLM's words."""
    texts = [name for name, each in schema["properties"].items() if each.get("type") == "string"]
    schema["required"] = texts
    for name in texts:
        text = schema["properties"][name]
        del text["default"]
        text["minLength"] = 1


class LoadBody(StrictModel):
    """The body of /v1/load_lora_adapter, as in vLLM."""

    model_config = ConfigDict(json_schema_extra=_require_texts)

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class NameBody(StrictModel):
    """The body of /v1/pin_lora_adapter and /v1/unpin_lora_adapter."""

    model_config = ConfigDict(json_schema_extra=_require_texts)

    lora_name: str = ""


class UnloadBody(NameBody):
    """The body of /v1/unload_lora_adapter."""

    lora_int_id: int | None = None
    """vLLM's number of an adapter; ignored."""


T = TypeVar("T", bound=BaseModel)


async def read_body(kind: type[T], request: Request, limit: int, seconds: float) -> T:
    """Read and parse a body of up to `limit` bytes. Raise `Refusal`, or `ClientDisconnect`.

    It must be announced as JSON: a page of another origin can send other types without a
    preflight request.
    """
    fields = request.headers.getlist("content-type")
    if {field.partition(";")[0].strip().lower() for field in fields} != {"application/json"}:
        message = "The body must have the Content-Type application/json"
        raise Refusal(415, message, code="unsupported_media_type", close=True)
    message = f"The body is larger than {limit} bytes"
    too_large = Refusal(413, message, code="request_too_large", close=True)
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds), aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                if len(body) + len(chunk) > limit:
                    raise too_large
                body += chunk
    except TimeoutError:
        message = f"The body did not arrive within {seconds:g} s"
        raise Refusal(408, message, code="timeout", close=True) from None
    return parse_body(kind, bytes(body))


def parse_body(kind: type[T], content: bytes) -> T:
    """Parse a body of that kind. Raise `Refusal` (400)."""
    try:
        members = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(members, dict):
        raise Refusal(400, "The body must be a JSON object", code="invalid_json")
    if issubclass(kind, GenerationBody):
        _drop_neutral(members, NEUTRAL, "")
        members = {name: value for name, value in members.items() if name not in IGNORED}
    messages = members.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and number < MAX_MESSAGES:
            _drop_neutral(message, NEUTRAL_IN_MESSAGES, f"messages.{number}.")
    try:
        body = kind.model_validate(members)
    except ValidationError as error:
        raise _validation_refusal(error, kind) from None
    if isinstance(body, GenerationBody) and body.stream_options is not None and not body.stream:
        raise invalid_parameter("stream_options requires stream=true", "stream_options")
    return body


def _drop_neutral(members: dict[str, Any], neutral: AllowedValues, prefix: str) -> None:
    """Remove unimplemented parameters with neutral values. Raise `Refusal` for other values."""
    for name in neutral.keys() & members.keys():
        value = members.pop(name)
        # In Python, 0 equals False.
        matches = (
            value == other and isinstance(value, bool) == isinstance(other, bool)
            for other in neutral[name]
        )
        if value is not None and not any(matches):
            message = f"{prefix}{name} is not implemented; omit it"
            raise invalid_parameter(message, prefix + name, "unsupported_parameter")


def _validation_refusal(error: ValidationError, kind: type[BaseModel]) -> Refusal:
    """Return the response for the first fault, in OpenAI's words if it has any."""
    expected = _EXPECTED if kind is CompletionBody else {**_EXPECTED, "prompt": "must be a text"}
    first = error.errors(include_url=False, include_input=False)[0]
    path = [shorten(str(part), 100) for part in first["loc"]]
    # In a union, pydantic appends the alternative that it tried.
    union = next((n for n, part in enumerate(path) if part in expected), None)
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {name}"
        return invalid_parameter(message, name, "unknown_parameter")
    if first["type"] == "missing" and union in {None, len(path) - 1}:
        message = f"Missing required parameter: {name}"
        return invalid_parameter(message, name, "missing_required_parameter")
    if union is not None:
        name = ".".join(path[: union + 1])
        return invalid_parameter(f"{name} {expected[path[union]]}", name)
    fault = first["msg"].removeprefix("Value error, ").lower()
    return invalid_parameter(f"{name or 'the body'} is invalid: {fault}", name or None)


class PromptEncoder:
    """Turn prompts and conversations into token ids. Thread-safe; long texts block for long.

    `tokenizer` is a fast one of transformers: the base's, or that of `vocabulary_of`, an adapter
    with a vocabulary of its own. `stop_tokens` end an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: frozenset[int] = frozenset(),
        vocabulary_of: AdapterKey | None = None,
    ) -> None:
        self.stop_tokens = stop_tokens
        self.vocabulary_of = vocabulary_of
        self._chat = tokenizer
        # A copy: it must not truncate or pad, and the caller's may be reconfigured at any time.
        self.tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocabulary: int = self.tokenizer.get_vocab_size(with_added_tokens=True)
        """Token ids in requests are below it."""
        self.takes_empty_text = bool(self._encode(""))
        """Whether "" is a prompt, because the tokenizer begins every text with a token."""

    def read(self, body: GenerationBody) -> list[tuple[int, ...]]:
        """Return the token ids of each prompt. Raise `Refusal`."""
        if isinstance(body, ChatBody):
            # The template writes the special tokens.
            text = self._apply_template(body.messages)
            return [self._encode(text, add_special_tokens=False)]
        assert isinstance(body, CompletionBody)
        prompts = []
        for prompt in body.prompts:
            ids = self._encode(prompt) if isinstance(prompt, str) else tuple(prompt)
            if not ids:
                raise invalid_parameter("A prompt is empty", "prompt")
            self._require_known(ids, "prompt")
            prompts.append(ids)
        if not prompts:
            raise invalid_parameter("A prompt is empty", "prompt")
        return prompts

    def tokenize(self, body: TokenizeBody) -> tuple[int, ...]:
        """Return the token ids of a prompt or a conversation. Raise `Refusal`."""
        is_prompt = body.prompt is not None
        special = is_prompt if body.add_special_tokens is None else body.add_special_tokens
        text = body.prompt if body.prompt is not None else self._apply_template(body.messages or ())
        return self._encode(text, add_special_tokens=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special ones included. Raise `Refusal`."""
        self._require_known(tokens, "tokens")
        # Only the batch call releases the GIL.
        (text,) = self.tokenizer.decode_batch([list(tokens)], skip_special_tokens=False)
        return text

    def _require_known(self, ids: Sequence[int], param: str) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            message = f"A token id of the {param} is outside 0 … {self.vocabulary - 1}"
            raise invalid_parameter(message, param)

    def _apply_template(self, conversation: Sequence[ChatMessage]) -> str:
        messages = [message.as_template() for message in conversation]
        try:
            text: str = self._chat.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:
            message = "The model's chat template rejects these messages: "
            raise invalid_parameter(message + shorten(str(error), 300), "messages") from None
        return text

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        # Only the batch call releases the GIL, and a long text takes seconds.
        (encoding,) = self.tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return tuple(encoding.ids)
