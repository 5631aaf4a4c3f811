"""What clients may call: an OpenAPI 3.1 document of the routes, and a page made from it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from lorax_async.server.request_bodies import (
    MAX_PROMPTS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadBody,
    NameBody,
    StrictModel,
    TokenizeBody,
    UnloadBody,
)

Json = dict[str, Any]
Access = Literal["anyone", "client", "viewer", "operator"]
"""Who may call: with an API key if the server has any, or with the admin token. A wrong key of a
viewer is refused even if none is needed."""

ABOUT = """\
OpenAI's API with one base model and any number of LoRA adapters: a request's model is the base's \
name or an adapter's. Parameters that the server does not implement are refused, unless their \
value changes nothing."""

MAX_NUMBER = 10**18 - 1
"""Of a cold request, in a query."""

TEMPLATE = Path(__file__).parent / "page" / "docs.html"

EVENTS, TEXT = "text/event-stream", "text/plain"

# -- answers --------------------------------------------------------------------------------------


class ResponseModel(BaseModel):
    """A JSON object that the server sends; for its schema only."""

    model_config = ConfigDict(use_attribute_docstrings=True)


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
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """The base of an adapter."""
    max_model_len: int


class ModelList(ResponseModel):
    object: Literal["list"]
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
    token_strs: None


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


# -- calls ----------------------------------------------------------------------------------------

STATUSES: Mapping[int, str] = {
    400: "The request is malformed, too long for the model, or has a parameter that is refused",
    401: "No right key",
    403: "The source refuses the adapter",
    404: "It does not exist",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body's Content-Type is not application/json",
    422: "The adapter is refused: damaged, of a kind that is not applied, or for another base",
    429: "No room; Retry-After says when to try again",
    502: "The source failed, or sent other bytes than it promised",
    503: "The server is closing",
    504: "The source took too long",
}
"""Of errors, all of which have an `ErrorResponse`."""

OF_BODIES = (400, 408, 413, 415, 503)
OF_LOADS = (403, 404, 422, 429, 502, 504)
NO_OPERATOR = "The server has no admin token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call: who makes it, with what, and what it gets."""

    summary: str
    access: Access = "anyone"
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Texts of the path, and numbers of the query, with their descriptions."""
    body: type[StrictModel] | None = None
    example: Json | None = None
    """A body."""
    answer: type[ResponseModel] | str | None
    """A JSON object, or a media type; None is an empty response."""
    streams: bool = False
    """Whether the answer may be events."""
    errors: tuple[int, ...] = ()

    @property
    def method(self) -> str:
        return "get" if self.body is None else "post"


ICE = "What is ice?"
_NAMED = {"lora_name": "sql"}
_LOADED = _NAMED | {"lora_path": "my-org/sql-adapter"}

OPERATIONS: Mapping[str, Operation] = {
    "/v1/chat/completions": Operation(
        summary="Answer a conversation",
        access="client",
        body=ChatBody,
        example={"model": "NAME", "messages": [{"role": "user", "content": ICE}], "max_tokens": 32},
        answer=ChatResponse,
        streams=True,
        errors=OF_BODIES + OF_LOADS,
    ),
    "/v1/completions": Operation(
        summary="Continue prompts",
        access="client",
        body=CompletionBody,
        example={"model": "NAME", "prompt": ICE, "max_tokens": 32, "temperature": 0},
        answer=CompletionResponse,
        streams=True,
        errors=OF_BODIES + OF_LOADS,
    ),
    "/v1/models": Operation(
        summary="List the base and the adapters that have names", access="client", answer=ModelList
    ),
    "/v1/models/{name}": Operation(
        summary="Describe one model",
        access="client",
        parameters={"name": "Its name, in which a slash may stand as it is"},
        answer=ModelCard,
        errors=(404,),
    ),
    "/tokenize": Operation(
        summary="Return the token ids of a prompt or a conversation",
        access="client",
        body=TokenizeBody,
        example={"prompt": ICE},
        answer=TokenizeResponse,
        errors=OF_BODIES,
    ),
    "/detokenize": Operation(
        summary="Return the text of token ids",
        access="client",
        body=DetokenizeBody,
        example={"tokens": [1, 2, 3]},
        answer=DetokenizeResponse,
        errors=OF_BODIES,
    ),
    "/v1/load_lora_adapter": Operation(
        summary="Load an adapter and give it a name",
        access="operator",
        body=LoadBody,
        example=_LOADED,
        answer=TEXT,
        errors=OF_BODIES + OF_LOADS,
    ),
    "/v1/pin_lora_adapter": Operation(
        summary="Load an adapter that has a name, and keep it on the device",
        access="operator",
        body=NameBody,
        example=_NAMED,
        answer=TEXT,
        errors=OF_BODIES + OF_LOADS,
    ),
    "/v1/unpin_lora_adapter": Operation(
        summary="Let a pinned adapter be evicted again",
        access="operator",
        body=NameBody,
        example=_NAMED,
        answer=TEXT,
        errors=(*OF_BODIES, 404),
    ),
    "/v1/unload_lora_adapter": Operation(
        summary="Take a name from its adapter; requests that use the adapter keep it",
        access="operator",
        body=UnloadBody,
        example=_NAMED,
        answer=TEXT,
        errors=(*OF_BODIES, 404),
    ),
    "/v1/adapters": Operation(
        summary="List where each adapter is, and its last events",
        access="operator",
        answer=AdapterRows,
    ),
    "/health": Operation(summary="Say whether requests are taken", answer=None, errors=(503,)),
    "/ping": Operation(summary="The same as /health", answer=None, errors=(503,)),
    "/version": Operation(summary="Return the version of lorax-async", answer=VersionResponse),
    "/metrics": Operation(summary="Return numbers in Prometheus' text format", answer=TEXT),
    "/page/events": Operation(
        summary="Send what the page shows, as it changes",
        access="viewer",
        answer=EVENTS,
        errors=(429, 503),
    ),
    "/page/trace.json": Operation(
        summary="Return the trace of a cold request, in Chrome's format",
        access="viewer",
        parameters={"number": "That of one of the last ones; without it, of the last one"},
        answer="application/json",
        errors=(400, 404),
    ),
}
"""By path, in the order of the page."""

# -- the document ---------------------------------------------------------------------------------

_SCHEMA = "#/components/schemas/{model}"
_IN_PATH: Json = {"in": "path", "required": True, "schema": {"type": "string"}}
_IN_QUERY: Json = {
    "in": "query",
    "schema": {"type": "integer", "minimum": 0, "maximum": MAX_NUMBER},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentedLimits:
    """The keys and limits of one server, as far as its document tells them."""

    needs_key: bool
    """Whether clients need an API key."""
    has_operator: bool
    """Whether there is an admin token."""
    vocabulary: int
    """Token ids are below it."""
    takes_empty_text: bool
    """Whether "" is a prompt: some tokenizers begin every text with a token."""
    max_choices: int
    max_prompt_tokens: int
    max_length: int


@cache
def create_document(limits: DocumentedLimits) -> Json:
    """Return the document, without `servers`. Do not change it. It names no model or adapter."""
    schemas = [operation.body for operation in OPERATIONS.values() if operation.body is not None]
    answers = [each.answer for each in OPERATIONS.values() if isinstance(each.answer, type)]
    models: list[type[BaseModel]] = [*schemas, *answers, ErrorResponse]
    _, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], ref_template=_SCHEMA
    )
    _limit_bodies(definitions["$defs"], limits)
    bearer = {"type": "http", "scheme": "bearer"}
    schemes = {
        "apiKey": bearer | {"description": "a key of --api-key or LORAX_API_KEY"},
        "adminToken": bearer | {"description": "the value of LORAX_ADMIN_TOKEN"},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lorax-async",
            "version": importlib.metadata.version("lorax-async"),
            "description": ABOUT,
        },
        "paths": {
            path: {operation.method: _describe(path, operation, limits)}
            for path, operation in OPERATIONS.items()
        },
        "components": {"schemas": definitions["$defs"], "securitySchemes": schemes},
    }


def _limit_bodies(schemas: Json, limits: DocumentedLimits) -> None:
    """Add the limits that requests have by the server, not by their form."""
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocabulary - 1}
    tokens = {"type": "array", "items": token}
    schemas["DetokenizeBody"]["properties"]["tokens"] |= tokens
    text = {"type": "string"} | ({} if limits.takes_empty_text else {"minLength": 1})
    one = tokens | {"minItems": 1, "maxItems": limits.max_prompt_tokens}
    several = {"type": "array", "minItems": 1, "maxItems": min(MAX_PROMPTS, limits.max_choices)}
    prompt = [text, several | {"items": text}, one, several | {"items": one}]
    schemas["CompletionBody"]["properties"]["prompt"]["anyOf"] = prompt
    for name in ("CompletionBody", "ChatBody"):
        members = schemas[name]["properties"]
        for member, most in (("n", limits.max_choices), ("max_tokens", limits.max_length - 1)):
            number, null = members[member]["anyOf"]
            members[member]["anyOf"] = [number | {"maximum": most}, null]


def _describe(path: str, operation: Operation, limits: DocumentedLimits) -> Json:
    """Return an Operation Object."""
    described: Json = {
        "operationId": path.strip("/").replace("/", "_").translate({ord(c): None for c in "{}"}),
        "summary": operation.summary,
        "security": _security(operation.access, limits),
        "responses": _responses(operation, limits),
    }
    if operation.parameters:
        described["parameters"] = [
            {"name": name, "description": text} | (_IN_PATH if f"{{{name}}}" in path else _IN_QUERY)
            for name, text in operation.parameters.items()
        ]
    if operation.body is not None:
        content = {"schema": _reference(operation.body), "example": operation.example}
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    return described


def _responses(operation: Operation, limits: DocumentedLimits) -> Json:
    """Return the responses by status. Without an admin token, the operator's calls have one."""
    access, statuses = operation.access, dict.fromkeys(operation.errors, "")
    if access == "operator" and not limits.has_operator:
        return {"403": _failure(403, NO_OPERATOR)}
    if access == "operator" or (access != "anyone" and limits.needs_key):
        statuses[401] = ""
    elif access == "viewer":
        statuses |= {401: ""} if limits.has_operator else {403: NO_OPERATOR}
    return {
        "200": _success(operation),
        **{str(status): _failure(status, text) for status, text in sorted(statuses.items())},
    }


def _security(access: Access, limits: DocumentedLimits) -> list[Json]:
    admin: list[Json] = [{"adminToken": []}] if limits.has_operator else []
    if access == "operator":
        return admin
    return [{"apiKey": []}, *admin] if access != "anyone" and limits.needs_key else []


def _success(operation: Operation) -> Json:
    answer, content = operation.answer, dict[str, Json]()
    if isinstance(answer, str):
        content[answer] = {}
    elif answer is not None:
        content["application/json"] = {"schema": _reference(answer)}
    if operation.streams:
        content[EVENTS] = {}
    return {"description": "The answer"} | ({"content": content} if content else {})


def _failure(status: int, text: str) -> Json:
    """Return a Response Object, with the text of `STATUSES` if `text` is empty."""
    schema = {"schema": _reference(ErrorResponse)}
    return {"description": text or STATUSES[status], "content": {"application/json": schema}}


def _reference(model: type[BaseModel]) -> Json:
    return {"$ref": _SCHEMA.format(model=model.__name__)}


# -- the page -------------------------------------------------------------------------------------


@cache
def render_page(limits: DocumentedLimits) -> bytes:
    """Return the document as HTML, without scripts. Blocks while it reads the template."""
    document = create_document(limits)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {}  # or it sorts the names
    environment.filters["type_of"] = _describe_type
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(document=document).encode()


def _describe_type(schema: Json) -> str:
    """Return the type that a JSON schema describes, in words."""
    return " or ".join(dict.fromkeys(_types(schema))) or "anything"


def _types(schema: Json) -> Iterator[str]:
    for alternative in schema.get("anyOf", ()):
        yield from _types(alternative)
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    elif "const" in schema:
        yield _as_literal(schema["const"])
    elif "enum" in schema:
        yield from map(_as_literal, schema["enum"])
    elif schema.get("type") == "array":
        yield f"list of {_describe_type(schema.get('items', {}))}{_bounds(schema)}"
    elif "type" in schema:
        yield f"{schema['type']}{_bounds(schema)}"


def _as_literal(value: object) -> str:
    return json.dumps(value)


_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "minLength": "{} or more characters",
    "maxLength": "up to {} characters",
    "minItems": "{} or more",
    "maxItems": "up to {}",
}


def _bounds(schema: Json) -> str:
    texts = [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema]
    return f" ({', '.join(texts)})" if texts else ""
