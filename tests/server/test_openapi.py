"""The OpenAPI document against the standard, the routes and real answers."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from fastapi.routing import iter_route_contexts
from server_world import (
    MAX_LENGTH,
    TOKEN,
    Answer,
    FakeEngine,
    World,
    failing,
    serving,
    tokenizer,
    tokens_of,
)
from tokenizers import processors

from lorax_async.errors import AccessDeniedError
from lorax_async.server.app import FILES, create_app
from lorax_async.server.request_bodies import CompletionBody, PromptEncoder, parse_body

API_KEY = "k"
KEYS = {"apiKey": f"Bearer {API_KEY}", "adminToken": f"Bearer {TOKEN}"}
validated = pytest.mark.needs("openapi_spec_validator")


async def call(
    world: World, path: str, operation: Any, method: str, key: str, lora: Path
) -> Answer:
    """Make a call as the document shows it."""
    content = operation.get("requestBody", {}).get("content", {})
    body = content.get("application/json", {}).get("example")
    if body is not None:
        body = {**body, "model": "base"} if "model" in body else body
        body = {**body, "lora_path": str(lora)} if "lora_path" in body else body
    if path == "/page/events":
        method = "head"  # or it does not end
    target = path.replace("{name}", "base")
    return await world.ask(method.upper(), target, body, Authorization=key)


async def test_every_call_is_described_as_it_is_and_no_other(tmp_path: Path) -> None:
    lora = tiny.write(tmp_path / "lora")
    async with serving(api_keys=(API_KEY,)) as world:
        document = (await world.ask("GET", "/openapi.json")).json
        calls = {
            (path, method): operation
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        }
        routes: list[Any] = list(iter_route_contexts(create_app(world.service).routes))
        assert calls.keys() == {
            (route.path.replace(":path", ""), method.lower())
            for route in routes
            if route.include_in_schema
            for method in route.methods
        }
        assert {route.path for route in routes if not route.include_in_schema} == {
            *("/openapi.json", *FILES)
        }
        for (path, method), operation in calls.items():
            keys = [name for needed in operation.get("security", []) for name in needed]
            stranger = await call(world, path, operation, method, "", lora)
            assert (stranger.status == 401) is bool(keys)
            answer = await call(world, path, operation, method, KEYS[(keys or ["apiKey"])[0]], lora)
            assert answer.status == (404 if path == "/page/trace.json" else 200)
            if method == "get":
                head = await call(
                    world, path, operation, "head", KEYS[(keys or ["apiKey"])[0]], lora
                )
                assert (head.status, head.body) == (answer.status, b"")
            kinds = operation["responses"][str(answer.status)].get("content", {"": {}})
            assert answer.headers.get("content-type", "").partition(";")[0] in kinds


@validated
async def test_the_document_keeps_the_standard_and_answers_keep_to_it(tmp_path: Path) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    lora = tiny.write(tmp_path / "lora")
    async with serving(root_path="/llm") as world:
        document = (await world.ask("GET", "/llm/openapi.json")).json
        OpenAPIV31SpecValidator(document).validate()
        assert document["servers"] == [{"url": "/llm"}]
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if "requestBody" in operation:
                    content = operation["requestBody"]["content"]["application/json"]
                    assert is_valid(content["example"], content["schema"], document)
                answer = await call(world, path, operation, method, KEYS["adminToken"], lora)
                content = operation["responses"][str(answer.status)].get("content", {})
                schema = content.get("application/json", {}).get("schema")
                if schema is not None:
                    assert is_valid(answer.json, schema, document)


def is_valid(value: Any, schema: Any, document: Any) -> bool:
    from jsonschema import Draft202012Validator

    whole = {**schema, "components": document["components"]}
    return bool(Draft202012Validator(whole).is_valid(value))


HI = {"role": "user", "content": "hi"}
COMPLETING: Any = {"model": "base", "prompt": "hi"}
CHATTING: Any = {"model": "base", "messages": [HI]}
BODIES: list[tuple[str, Any, bool]] = [
    ("/v1/completions", COMPLETING, True),
    ("/v1/completions", COMPLETING | {"prompt": [tokens_of("a"), tokens_of("b")]}, True),
    ("/v1/completions", COMPLETING | {"prompt": 5}, False),
    ("/v1/completions", COMPLETING | {"stop": ["a", "b"], "seed": 2**63 - 1, "top_k": -1}, True),
    ("/v1/completions", COMPLETING | {"stop": [""]}, False),
    ("/v1/completions", COMPLETING | {"seed": 2**63}, False),
    ("/v1/completions", COMPLETING | {"top_p": 0}, False),
    ("/v1/completions", COMPLETING | {"stream_options": {"include_usage": True}, "stream": True}, True),
    ("/v1/completions", COMPLETING | {"n": True}, False),
    ("/v1/completions", COMPLETING | {"user": {"any": "thing"}, "best_of": 1, "tools": None}, True),
    ("/v1/completions", COMPLETING | {"best_of": True}, False),
    ("/v1/completions", COMPLETING | {"made_up": 1}, False),
    ("/v1/chat/completions", CHATTING | {"tools": [], "messages": [HI | {"tool_calls": []}]}, True),
    ("/v1/chat/completions", CHATTING | {"tools": [{}]}, False),
    ("/v1/chat/completions", CHATTING | {"messages": []}, False),
    ("/v1/chat/completions", CHATTING | {"messages": [HI | {"role": "tool"}]}, False),
    ("/tokenize", {"prompt": "hi", "messages": None}, True),
    ("/tokenize", {"messages": [HI | {"refusal": None}], "add_special_tokens": False}, True),
    ("/tokenize", {"prompt": "hi", "messages": [HI]}, False),
    ("/tokenize", {"prompt": None}, False),
    ("/detokenize", {"tokens": ["a"]}, False),
    *(("/v1/completions", COMPLETING | {"prompt": prompt}, valid) for prompt, valid in (
        ("", False), ([], False), ([""], False), (["a", ""], False), ([[]], False),
        ([[1], []], False), ([0, 256], True), ([257], False), ([-116], False), ([[257]], False),
        (["a"] * 16, True), (["a"] * 17, False), ([[1]] * 16, True), ([[1]] * 17, False),
        ([1] * 17, True), ([1] * (MAX_LENGTH - 20), True), ([1] * MAX_LENGTH, False),
    )),
    *((path, body | fields, valid) for path, body in (
        ("/v1/completions", COMPLETING), ("/v1/chat/completions", CHATTING),
    ) for fields, valid in (
        ({"n": 16}, True), ({"n": 17}, False), ({"stream_options": {}}, False),
        ({"stream_options": {"include_usage": True}, "stream": False}, False),
        ({"stream_options": None}, True), ({"stream_options": {}, "stream": True}, True),
        ({"stream_options": {"continuous_usage_stats": True}, "stream": True}, True),
        ({"max_tokens": MAX_LENGTH - 100}, True), ({"max_tokens": MAX_LENGTH}, False),
    )),
    *(("/detokenize", {"tokens": tokens}, valid) for tokens, valid in (
        ([], True), ([0, 256], True), ([257], False), ([-1], False),
    )),
    *(("/v1/load_lora_adapter", names, False) for names in (
        {}, {"lora_name": "a"}, {"lora_path": "org/a"}, {"lora_name": "", "lora_path": "org/a"},
        {"lora_name": "a", "lora_path": ""},
    )),
    *(("/v1/unload_lora_adapter", names, False) for names in (
        {}, {"lora_name": ""}, {"lora_int_id": 1},
    )),
]  # fmt: skip


@validated
async def test_what_the_schema_calls_valid_is_accepted_and_nothing_else() -> None:
    async with serving() as world:
        document = (await world.ask("GET", "/openapi.json")).json
        for path, body, valid in BODIES:
            (operation,) = document["paths"][path].values()
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert is_valid(body, schema, document) is valid, body
            assert (await world.admin(path, body)).status == (200 if valid else 400), body


@validated
async def test_a_number_of_a_trace_is_one_that_the_document_allows() -> None:
    async with serving() as world:
        document = (await world.ask("GET", "/openapi.json")).json
        (number,) = document["paths"]["/page/trace.json"]["get"]["parameters"]
        for value, valid in ((-116, False), (-1, False), (0, True), (10**18 - 1, True)):
            assert is_valid(value, number["schema"], document) is valid
            answer = await world.ask("GET", f"/page/trace.json?number={value}")
            assert answer.status == (404 if valid else 400)
        assert not is_valid(10**18, number["schema"], document)


@pytest.mark.parametrize("api_keys", [(), (API_KEY,)])
@pytest.mark.parametrize("token", [None, TOKEN])
async def test_every_status_is_documented_and_every_refusal_of_a_key_happens(
    tmp_path: Path, token: str | None, api_keys: tuple[str, ...]
) -> None:
    """Without an admin token, the operator's calls are refused, whatever the key."""
    lora = tiny.write(tmp_path / "lora")
    async with serving(admin_token=token, api_keys=api_keys) as world:
        document = (await world.ask("GET", "/openapi.json")).json
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                responses, statuses = operation["responses"], set[str]()
                for key in ("", "Bearer wrong", f"Bearer {API_KEY}", KEYS["adminToken"]):
                    answer = await call(world, path, operation, method, key, lora)
                    statuses.add(str(answer.status))
                assert statuses <= responses.keys(), path
                assert ("401" in responses) is ("401" in statuses), path
                if token is None and path in OPERATORS:
                    assert responses.keys() == {"403"}
                    assert "security" not in operation
                    assert "no admin token" in responses["403"]["description"]


OPERATORS = {f"/v1/{deed}_lora_adapter" for deed in ("load", "unload", "pin", "unpin")} | {
    "/v1/adapters"
}


async def test_a_refusal_by_the_source_of_a_named_adapter_is_documented() -> None:
    engine = FakeEngine(failing(AccessDeniedError("it is private")))
    async with serving(engine, adapters={"named": "org/private"}) as world:
        document = (await world.ask("GET", "/openapi.json")).json
        answer = await world.ask("POST", "/v1/completions", COMPLETING | {"model": "named"})
        assert answer.status == 403
        assert "403" in document["paths"]["/v1/completions"]["post"]["responses"]


def test_a_text_may_be_empty_where_the_tokenizer_begins_every_text() -> None:
    fast = copy.deepcopy(tokenizer())
    assert not PromptEncoder(fast).takes_empty_text
    first = processors.TemplateProcessing(single="a $0", special_tokens=[("a", tokens_of("a")[0])])
    fast.backend_tokenizer.post_processor = first
    prompts = PromptEncoder(fast)
    assert prompts.takes_empty_text
    body = parse_body(CompletionBody, json.dumps(COMPLETING | {"prompt": ""}).encode())
    assert prompts.read(body) == [tuple(tokens_of("a"))]


async def test_the_document_is_open_and_says_nothing_of_adapters() -> None:
    adapters = {"very-secret": "org/hidden"}
    async with serving(api_keys=(API_KEY,), base="secret-base", adapters=adapters) as world:
        document = await world.ask("GET", "/openapi.json")
        pages = [await world.ask("GET", path) for path in ("/docs", "/redoc")]
    assert document.status == 200
    assert not re.search(rb"secret|hidden", document.body)
    assert [page.status for page in pages] == [404, 404], "they would load another host's scripts"


@pytest.mark.parametrize("root_path", ["", "/llm"])
async def test_no_redirect_names_a_scheme(root_path: str) -> None:
    """Behind a proxy that speaks TLS, the server would name the wrong one."""
    async with serving(root_path=root_path) as world:
        paths = ["", "/version/", "/v1/models/", "/v1/chat/completions/", "/health/"]
        answers = [await world.ask("GET", root_path + path or "/") for path in paths]
    first, *rest = answers
    assert (first.status, first.headers.get("location")) == (
        (307, "/llm/") if root_path else (200, None)
    )
    assert [answer.status for answer in rest] == [404] * 4
    assert all(json.loads(answer.body)["error"]["code"] for answer in rest)
