"""The JSON of answers, as pydantic models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseModel(BaseModel):
    """A JSON object that the server sends."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_serialization_defaults_required=True,  # they are sent, too
    )


class ErrorDetails(ResponseModel):
    message: str
    type: str
    param: str | None
    """The parameter at fault."""
    code: str | int | None


class ErrorResponse(ResponseModel):
    """An error in OpenAI's form."""

    error: ErrorDetails


class ModelCard(ResponseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lorax-async"
    parent: str | None
    """The base of an adapter."""
    max_model_len: int


class ModelList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenUsage(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    """Without the token that ends an answer."""
    total_tokens: int


class AnswerChoice(ResponseModel):
    index: int
    logprobs: None
    finish_reason: Literal["stop", "length"] | None


class TextChoice(AnswerChoice):
    text: str


class AnswerMessage(ResponseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class MessageChoice(AnswerChoice):
    message: AnswerMessage


class CompletionResponse(ResponseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage


class ChatResponse(ResponseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[MessageChoice]
    usage: TokenUsage


class TokenizeResponse(ResponseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: None = None


class DetokenizeResponse(ResponseModel):
    prompt: str


class VersionResponse(ResponseModel):
    version: str


class AdapterRow(ResponseModel):
    """Where one adapter is; and its slot, layers and bytes."""

    model_config = ConfigDict(extra="allow")

    id: str
    names: list[str]
    tier: Literal["disk", "host", "device"]
    state: str
    leases: int
    pins: int
    story: list[dict[str, Any]]
    """Its last events."""


class AdapterRows(ResponseModel):
    object: Literal["list"]
    data: list[AdapterRow]
