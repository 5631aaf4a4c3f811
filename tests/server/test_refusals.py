"""Requests that are refused: by their bodies, limits and origins; in the form that clients know."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import openai
import pytest
import server_world as fakes
import tiny
from pydantic import ValidationError
from server_world import COMPLETIONS, TOKEN, FakeEngine, FakeTokens, World, echo, loading, serving
from starlette.requests import HTTPConnection
from tiny_loaders import fails
from tiny_loaders import loader as tiny_loader

import lorax_async as la
from engines.conftest import watched
from lorax_async.cli.serve import choose_hosts
from lorax_async.errors import ConfigError, LoraxError, UsageError
from lorax_async.server import request_bodies
from lorax_async.server.app import listen
from lorax_async.server.request_bodies import ChatBody, CompletionBody, GenerationBody, parse_body
from lorax_async.server.responses import INTERNAL, Refusal, create_refusal
from lorax_async.server.server_settings import ServerSettings, identify_client

Patch = pytest.MonkeyPatch
PLAIN = {"model": "base", "prompt": "x"}
STATUSES = (
    *((la.AdapterNotFoundError, 404, "model_not_found"), (la.UsageError, 400, "invalid_request")),
    *((la.AccessDeniedError, 403, "model_access_denied"), (la.EvictedError, 503, "evicted")),
    *((la.InvalidAdapterIdError, 400, "invalid_model_id"), (la.CapacityError, 429, "over_capacity")),
    *((la.AdapterFormatError, 422, "adapter_malformed"), (la.FetchError, 502, "fetch_failed")),
    (la.UnsafeFileError, 422, "adapter_unsafe"),
    *((la.UnsupportedAdapterError, 422, "adapter_unsupported"), (la.FetchTimeoutError, 504, "timeout")),
    *((la.IncompatibleAdapterError, 422, "adapter_incompatible"), (la.TransferError, 500, "transfer_failed")),
    *((la.LoaderClosedError, 503, "closing"), (la.HandleClosedError, 503, "closing")),
    *((la.AdapterTimeoutError, 504, "timeout"), (la.IntegrityError, 502, "adapter_altered")),
    (la.SavedDuringLoadError, 503, "adapter_saved"),
    *((la.AdapterInUseError, 409, "adapter_in_use"), (la.InternalError, 500, "internal_error")),
)  # fmt: skip


def test_every_error_of_the_library_has_its_status() -> None:
    inherited = {la.AdapterError, la.ConfigError, la.InvalidTransitionError, LoraxError}
    public = (getattr(la, name) for name in la.__all__)
    every = {e for e in public if isinstance(e, type) and issubclass(e, LoraxError)}
    assert every == {kind for kind, _, _ in STATUSES} | inherited
    for kind, status, code in STATUSES:
        refusal = create_refusal(kind("the reason", id="org/x"), 2.5)
        assert (refusal.status, refusal.code) == (status, code)
        hidden = kind is la.InternalError
        assert ("the reason" in refusal.message) is not hidden
        assert hidden == (refusal.message == INTERNAL)
        comes_back = status in {429, 503, 504} or code in {"fetch_failed", "adapter_altered"}
        assert refusal.response().headers.get("retry-after") == ("3" if comes_back else None)
    for error, retry_after in (  # a source says itself when to come back
        (la.FetchError("busy", retry_after=40.2), "41"),
        (la.FetchError("gone", retryable=False), None),
    ):
        assert create_refusal(error, 1).response().headers.get("retry-after") == retry_after


@pytest.mark.parametrize("stream", [False, True])
async def test_the_official_client_raises(stream: bool) -> None:
    """A stream that has not begun is refused with a status, too."""
    for error, kind in (
        (la.AdapterNotFoundError("nothing there", id="org/x"), openai.NotFoundError),
        (la.CapacityError("full"), openai.RateLimitError),
        (la.LoaderClosedError("closing"), openai.InternalServerError),
    ):
        names = {"sql": "org/x"}  # of an unknown model, a client is told less
        async with serving(FakeEngine(fakes.failing(error)), adapters=names) as world:
            create: Any = world.client.completions.create
            raised: Any = await fails(create(model="sql", prompt="x", stream=stream), kind)
        assert error.problem in raised.message
        assert raised.param == ("model" if error.id else None)


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("rank 300 is too high; raise Limits.max_rank to accept it", "rank 300 is too high"),
        ("no slot is free; unpin some, or raise device_bytes", "no slot is free"),
        ("give a token (or let ours be used: use_token=True)", "give a token"),
        ("modules_to_save is set; retrain without", "modules_to_save is set; retrain without"),
    ],
)
async def test_settings_of_programs_are_for_the_log_alone(
    problem: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lorax_async.server")
    engine = FakeEngine(fakes.failing(la.UnsupportedAdapterError(problem)))
    async with serving(engine, adapters={"sql": "org/x"}) as world:
        answer = await world.ask("POST", COMPLETIONS, PLAIN | {"model": "sql"})
    assert answer.error["message"].endswith(f": {told}")
    assert problem in caplog.text


async def test_an_operators_path_stays_hidden(tmp_path: Path) -> None:
    bases = "for '/home/me/llama-2'; this loader serves 'org/llama-3'"
    for problem, told in (("no JSON", "no JSON"), (bases, bases.replace("/home/me/", ""))):
        error = la.AdapterFormatError(problem, id=str(tmp_path))
        async with serving(FakeEngine(fakes.failing(error)), adapters={"mine": tmp_path}) as world:
            answer = await world.ask("POST", COMPLETIONS, PLAIN | {"model": "mine"})
        assert answer.error["message"] == f"adapter 'mine', stage verify: {told}"


async def test_an_error_in_a_streams_midst_is_its_last_event() -> None:
    def rule(tokens: FakeTokens) -> None:
        tokens.say("half")
        tokens.fail(la.AdapterTimeoutError("too slow", id="org/x"))

    async with serving(FakeEngine(rule)) as world:
        answer = await world.ask("POST", COMPLETIONS, PLAIN | {"stream": True, "model": "org/x"})
        stream = await world.client.completions.create(model="org/x", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="too slow"):
            async for _ in stream:
                pass
        assert all(tokens.cancelled.is_set() for tokens in world.engine.submitted)
    assert answer.status == 200
    events = [json.loads(line[6:]) for line in answer.body.splitlines() if line[:5] == b"data:"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "half"
    assert events[-1]["error"]["code"] == "timeout"
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("begun", [False, True])
async def test_a_fault_in_the_engine_is_for_the_log_alone(caplog: Any, begun: bool) -> None:
    def rule(tokens: FakeTokens) -> None:
        if begun:
            tokens.say("a")
        tokens.fail(RuntimeError("a secret"))

    async with serving(FakeEngine(rule)) as world:
        answer = await world.ask("POST", COMPLETIONS, PLAIN | {"stream": True})
    assert answer.status == (200 if begun else 500)
    assert INTERNAL.encode() in answer.body
    assert b"secret" not in answer.body
    assert "a secret" in caplog.text


async def test_what_can_never_be_computed_is_refused() -> None:
    engine = FakeEngine(fakes.saying("y"), max_length=100)
    async with serving(engine, max_prompt_tokens=10, max_choices=4) as world:
        prompts: Any = ("x" * 11, [0, 257], [-1], "", [], ["x", ""])
        fields: Any
        for fields, param in (
            *(({"prompt": prompt}, "prompt") for prompt in prompts),
            ({"prompt": "x" * 10, "max_tokens": 91}, "max_tokens"),
            ({"prompt": "x", "n": 5}, "n"),
            ({"prompt": ["x", "y"], "n": 3}, "prompt"),
            ({"prompt": "x", "echo": True}, "echo"),
        ):
            answer = await world.ask("POST", COMPLETIONS, {"model": "base"} | fields)
            assert (answer.status, answer.error["param"]) == (400, param), fields
            assert answer.error["type"] == "invalid_request_error"
        assert not engine.submitted
        longest = {"model": "base", "prompt": fakes.tokens_of("x" * 10), "max_tokens": 90}
        assert (await world.ask("POST", COMPLETIONS, longest)).status == 200
        assert len(engine.submitted) == 1


async def test_a_template_refuses_in_its_own_words_and_unknown_calls_are_told() -> None:
    async with serving() as world:
        body = {"model": "base", "messages": [{"role": "assistant", "content": "a"}]}
        answer = await world.ask("POST", "/v1/chat/completions", body)
        assert (answer.status, answer.error["param"]) == (400, "messages")
        assert "the user speaks first" in answer.error["message"]
        for path in ("/v1", COMPLETIONS, "/v1/models/nobody", "/v1/models/org/x"):
            answer = await world.ask("GET", path)
            assert answer.status == (405 if path == COMPLETIONS else 404)
            assert answer.error["message"]


async def test_a_full_queue_refuses() -> None:
    """Also more sequences than there is room for, of which none is queued; no prompt is read."""
    engine = FakeEngine()
    async with serving(engine, max_waiting=2, max_choices=2, retry_after=7) as world:
        first = world.completing(PLAIN)
        await engine.asked()
        two = await world.ask("POST", COMPLETIONS, PLAIN | {"n": 2})
        second = world.completing(PLAIN)
        await engine.asked(2)
        world.service.prompts.read = lambda body: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        one = await world.ask("POST", COMPLETIONS, PLAIN)
        assert len(engine.submitted) == 2
        for tokens in engine.submitted:
            tokens.end()  # it is computed, so that there is room again
        assert {(await first).status, (await second).status} == {200}
    for answer in (one, two):
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert answer.error["type"] == "rate_limit_error"


async def test_where_one_sequence_is_refused_all_are() -> None:
    engine = FakeEngine()

    def rule(_: FakeTokens) -> None:
        engine.alive = False

    engine.rule = rule
    async with serving(engine) as world:
        assert (await world.ask("POST", COMPLETIONS, PLAIN | {"n": 2})).status == 503
        assert engine.submitted[0].cancelled.is_set()
        assert engine.waiting == 0


async def test_a_client_has_a_number_of_adapters_in_flight() -> None:
    """By its key and its address, which it cannot choose; the engine is told which it is."""
    engine, found = FakeEngine(), set[tuple[str, str]]()
    for address, bearer in product(("10.0.0.1", "10.0.0.2"), (b"Bearer a", b"Bearer b", b"")):
        fields = [(b"authorization", bearer)]
        scope = {"type": "http", "client": (address, 1), "headers": fields}
        found.add(identify_client(HTTPConnection(scope)))
    assert len(found) == 6
    async with serving(engine, max_adapters_per_client=1) as world:

        async def status(model: str, key: str | None) -> int:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            headers["X-Forwarded-For"] = f"10.0.0.{len(engine.submitted)}"
            answer = await world.ask("POST", COMPLETIONS, PLAIN | {"model": model}, **headers)
            return answer.status

        asked, keys = [], ("anna", "anna", "anna", "bert", None, None)
        models = ("org/a", "org/a", "base", "org/b", "org/a", "base")
        for number, (model, key) in enumerate(zip(models, keys, strict=True), 1):
            asked.append(asyncio.create_task(status(model, key)))
            await engine.asked(number)
        assert await status("org/b", "anna") == await status("org/b", None) == 429
        clients = [tokens.generation.client for tokens in engine.submitted]
        assert len({*clients[:3]}) == len({*clients[4:]}) == 1
        assert len({*clients}) == 3
        assert "anna" not in repr(engine.submitted[0].generation)
        engine.rule = FakeTokens.end
        for tokens in engine.submitted:
            tokens.end()
        assert await asyncio.gather(*asked) == [200] * 6
        assert await status("org/b", "anna") == 200, "the place is free again"


async def test_ids_are_a_loaders(tmp_path: Path) -> None:
    """Names of requests are local below the operator's roots only; what is there is told by status."""
    roots = tmp_path / "roots"
    tiny.write(tmp_path / "outside", 1)
    tiny.write(roots / "good", 0)
    tiny.write(roots / "deep", 0, layers=5)
    tiny.write(roots / "other", 0, peft_type="IA3")
    (tiny.write(roots / "torn", 0) / "adapter_config.json").write_text("{")
    there, outside = tiny_loader(local_roots=(roots,), offline=True), roots.parent / "outside"
    async with serving(FakeEngine(loading(there)), there, adapters={"outside": outside}) as world:
        for model, status, said in (
            ("./good", 200, "loaded"),
            ("good", 200, "loaded"),
            ("nowhere", 404, "model_not_found"),
            ("outside", 200, "loaded"),
            (str(outside), 404, "model_not_found"),
            ("./nowhere", 404, "model_not_found"),
            ("./torn", 422, "adapter_malformed"),
            ("./deep", 422, "adapter_incompatible"),
            ("./other", 422, "adapter_unsupported"),
            ("s3://bucket/x", 404, "model_not_found"),
            ("http://u:p@host/x", 404, "model_not_found"),
            ("gpt-4", 404, "model_not_found"),
            ("a b", 404, "model_not_found"),
        ):
            answer = await world.ask("POST", COMPLETIONS, PLAIN | {"model": model})
            told = answer.json["choices"][0]["text"] if status == 200 else answer.error["code"]
            assert (answer.status, told) == (status, said), model
            if status == 404:
                assert answer.error["message"] == f"The model `{model}` does not exist."
                assert answer.error["param"] == "model"


async def test_health() -> None:
    async with serving() as world:
        assert (await world.ask("GET", "/health")).status == 200
        world.engine.alive = False
        gone = await world.ask("GET", "/health")
        assert (gone.status, gone.error["code"]) == (503, "engine_gone")
        assert (await world.ask("POST", COMPLETIONS, PLAIN)).status == 503
        world.engine.alive = True
        world.service.in_flight.close()
        closing = await world.ask("GET", "/health")
        assert (closing.status, closing.error["code"]) == (503, "closing")
        assert closing.headers["retry-after"] == "1"


def test_settings_are_checked_have_their_own_names_and_hide_the_token() -> None:
    wrong: Any
    for wrong in (
        *({"admin_token": ""}, {"admin_token": "two words"}, {"max_body_bytes": 0}),
        *({"root_path": path} for path in ("llm", "/llm/", "/", "//a", "/a?b", 5)),
        *({"api_keys": keys} for keys in ("key", ("",), ("two words",), ("one", 5))),
        *({"max_prompt_tokens": 0}, {"max_waiting": 1}, {"slow_client": 0}, {"drain": -1}),
        *({"retry_after": "1"}, {"base": ""}, {"sources": ("hub",)}),
        *({"adapters": adapters} for adapters in ({"b": "x/y"}, {"": "x/y"}, {"a": 5})),
        *({"allowed_hosts": (host,)} for host in ("", "a:80", "http://a", "a/b", "a.*", "**")),
        *({"allowed_hosts": hosts} for hosts in ("localhost", ("[::1]:80",), (5,))),
    ):
        said = "host" if "allowed_hosts" in wrong else "."
        with pytest.raises((ConfigError, UsageError), match=said):
            ServerSettings(**({"base": "b"} | wrong))
    names = {"a": "x/y"}
    settings = ServerSettings(base="b", adapters=names, admin_token=TOKEN, api_keys=("a-key",))
    names["c"] = "x/z"
    assert settings.adapters == {"a": "x/y"}
    with pytest.raises(TypeError):
        settings.adapters["d"] = "x/y"  # type: ignore[index]
    assert TOKEN not in repr(settings)
    assert "a-key" not in repr(settings)


def test_no_api_key_is_the_admin_token() -> None:
    """Or every client would be the operator."""
    with pytest.raises(ConfigError, match="api_keys.*admin_token") as refused:
        ServerSettings(base="b", admin_token=TOKEN, api_keys=("a-key", TOKEN))
    assert TOKEN not in str(refused.value)
    assert "a-key" not in str(refused.value)
    ServerSettings(base="b", admin_token=TOKEN, api_keys=("a-key", TOKEN + "x"))


BODY: dict[str, Any] = {"model": "m", "prompt": "p"}


def messages(*given: Any) -> dict[str, Any]:
    return {"messages": list(given)}


def user(content: Any = "c", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


def completion(**fields: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps(BODY | fields).encode())


def chat(**fields: Any) -> ChatBody:
    return parse_body(ChatBody, json.dumps({"model": "m"} | messages(user()) | fields).encode())


def test_prompts_have_several_forms_and_fields_that_change_nothing_are_taken() -> None:
    for same in (["a", "b"], [[1], [2, 3]], []):
        assert completion(prompt=same).prompts == same
    assert (completion(prompt="a").prompts, completion(prompt=[1, 2]).prompts) == (["a"], [[1, 2]])
    neutral: dict[str, Any]
    for neutral in (
        {"logprobs": None, "echo": False, "best_of": 1, "suffix": None, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "user": "u", "n": 1, "seed": -1},
        {"temperature": None, "top_p": None, "max_tokens": None, "stop": None, "stream": False},
        {"stream": True, "stream_options": {"include_usage": True}},
    ):
        assert completion(**neutral).prompts == ["p"]
    chat(
        tools=[], tool_choice="auto", response_format={"type": "text"}, logprobs=False,
        metadata={"a": "b"}, service_tier="auto", store=False, modalities=["text"],
    )  # fmt: skip


def test_what_is_not_implemented_is_refused_by_name() -> None:
    fields: dict[str, Any]
    for fields in (
        *({"logprobs": 0}, {"logprobs": True}, {"echo": True}, {"best_of": 2}, {"suffix": "x"}),
        *({"logit_bias": {"5": 1}}, {"presence_penalty": 0.1}, {"frequency_penalty": -1}),
        *({"tools": [{}]}, {"response_format": {"type": "json_object"}}),
    ):
        (param,) = fields
        for refuse in (completion, chat):
            with pytest.raises(Refusal, match=f"{param} is not implemented") as refused:
                refuse(**fields)
            assert (refused.value.status, refused.value.param) == (400, param)
            assert refused.value.code == "unsupported_parameter"


MANY = 3000
MEMBERS = {f"x{n}": 1 for n in range(MANY)}
TEXT = {"type": "text", "text": "x"}
"""A body of 1 MiB has room for half a million mistakes, which took seconds to list."""


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        *((CompletionBody, {name: value}, name) for name, value in (
            ("max_token", 5), ("temperature", 2.1), ("temperature", -0.1), ("temperature", "1"),
            ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("n", 0), ("n", 1.5),
            ("repetition_penalty", 1e-300), ("repetition_penalty", 1e308),
            ("max_tokens", 0), ("seed", 2**63), ("stop", ["a"] * 5), ("stop", ""),
            ("stop", "x" * 257), ("stop", 5), ("stop", [""] * MANY), ("model", ""), ("model", 5),
            ("stream", "yes"), ("stream_options", {"include_usage": True}),
            ("prompt", None), ("prompt", [1, "a"]), ("prompt", [[1], "a"]), ("prompt", {"a": 1}),
            ("prompt", [1.5] * MANY), ("prompt", [None] * MANY), ("prompt", [[None] * MANY]),
            ("prompt", [1] + [""] * MANY), ("prompt", [[""] * 3] * MANY), ("prompt", [[]] * MANY),
        )),
        (CompletionBody, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (CompletionBody, MEMBERS, None),
        *((ChatBody, messages(*given), param) for given, param in (
            ([], "messages"), ([user("x")] * MANY, "messages"),
            (["x"], "messages.0"), ([1] * MANY, "messages.0"), ([user() | MEMBERS], "messages.0"),
            ([{"role": "tool", "content": "x"}], "messages.0.role"),
            ([{}] * MANY, "messages.0.role"),
            ([{"role": "user"}], "messages.0.content"),
            ([user(None)], "messages.0.content"),
            ([user([{"type": "image_url"}])], "messages.0.content"),
            ([user([{}] * MANY)], "messages.0.content"),
            ([user([TEXT] * MANY)], "messages.0.content"),
            ([user([TEXT | MEMBERS])], "messages.0.content"),
            ([user(tool_calls=[{}])], "messages.0.tool_calls"),
            ([user(weight=1)], "messages.0.weight"),
        )),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(
    monkeypatch: Patch, kind: Any, fields: Any, param: str | None
) -> None:
    counts = [0]

    def validate(found: Any) -> Any:
        try:
            return kind(**found)
        except ValidationError as error:
            counts.append(error.error_count())
            raise

    monkeypatch.setattr(kind, "model_validate", validate)
    plain = BODY if kind is CompletionBody else {"model": "m"}
    with pytest.raises(Refusal) as refused:
        parse_body(kind, json.dumps(plain | fields).encode())
    assert (refused.value.status, refused.value.param) == (400, param)
    assert (param or "the body") in refused.value.message
    assert refused.value.code is not None
    assert max(counts) < 10


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"x", b"\xff", b"[]", b"null", b'"a"', b'{"model": NaN}', b'{"model": "\\ud800"}',
        b'{"a":' * 5000, b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_object_is_refused(kind: type[GenerationBody], content: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        parse_body(kind, content)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_what_is_missing_is_named() -> None:
    for missing, there in (("prompt", b'{"model": "m"}'), ("model", b'{"prompt": "p"}')):
        with pytest.raises(Refusal, match=f"Missing required parameter: {missing}"):
            parse_body(CompletionBody, there)


@pytest.fixture
def no_thread_is_interrupted() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("no_thread_is_interrupted")
@pytest.mark.parametrize("kind", [CompletionBody, ChatBody, None])
def test_other_threads_run_while_a_long_text_becomes_tokens(
    kind: type[GenerationBody] | None,
) -> None:
    """And while tokens become a text."""
    prompts, text = request_bodies.PromptEncoder(fakes.tokenizer()), "what is ice " * 30_000
    tokens = fakes.tokens_of(text)
    begun, read = threading.Event(), list[int]()

    def reading() -> None:
        begun.set()
        if kind is None:
            read.append(len(prompts.detokenize(tokens)))
            return
        fields = messages(user(text)) if kind is ChatBody else {"prompt": text}
        body = parse_body(kind, json.dumps({"model": "m"} | fields).encode())
        read.extend(map(len, prompts.read(body)))

    thread = threading.Thread(target=reading)
    thread.start()
    begun.wait()
    assert not read
    thread.join()
    assert read[0] >= len(text)


async def test_a_prompt_is_read_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as world:
        reads = watched(monkeypatch, world.service.prompts, "read")
        assert (await world.ask("POST", COMPLETIONS, PLAIN)).status == 200
    assert [read.thread == threading.get_ident() for read in reads] == [False]


ADMIN = tuple(f"/v1/{call}_lora_adapter" for call in ("load", "unload", "pin", "unpin"))
POSTS = (COMPLETIONS, "/v1/chat/completions", *ADMIN)
JSON_TYPES = (
    *("application/json", "Application/JSON", " application/json "),
    *("application/json; charset=utf-8", "application/json;charset=UTF-8"),
)
OTHER_TYPES = (
    *("", "text/plain", "text/plain;charset=UTF-8", "text/plain; application/json", "json"),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
    *("application/json-seq", "application/jsonx", "application/json, text/plain"),
    "text/plain\r\nContent-Type: application/json",
    "application/json\r\nContent-Type: text/plain",
)


async def test_only_json_is_computed() -> None:
    async with serving(FakeEngine(echo)) as world:
        for kind in OTHER_TYPES:
            headers = {"Content_Type": kind, "Authorization": f"Bearer {TOKEN}"}
            for path in POSTS:
                for content in (PLAIN, b""):
                    answer = await world.ask("POST", path, content, **headers)
                    assert (answer.status, answer.error["type"]) == (415, "invalid_request_error")
                    assert answer.error["code"] == "unsupported_media_type"
                    assert "application/json" in answer.error["message"]
        assert not world.engine.submitted
        for kind in JSON_TYPES:
            answer = await world.ask("POST", COMPLETIONS, PLAIN, Content_Type=kind)
            assert answer.status == 200


async def test_no_other_origin_is_let_in() -> None:
    """A browser asks before it sends JSON across origins, and gets no leave; nor may it read."""
    asks = {"Origin": "https://evil.example"}
    more = {"Method": "POST", "Headers": "content-type,authorization"}
    preflight = asks | {f"Access_Control_Request_{name}": value for name, value in more.items()}
    async with serving(FakeEngine(echo)) as world:
        answers = [await world.ask("OPTIONS", path, b"", **preflight) for path in POSTS]
        assert [answer.status for answer in answers] == [405] * len(POSTS)
        answers.append(await world.ask("POST", COMPLETIONS, PLAIN, **asks))
        answers += [await world.ask("GET", path, b"", **asks) for path in ("/v1/models", "/")]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control-")]


async def called(world: World, *hosts: str, path: str = "/health") -> int:
    fields = "".join(f"Host: {host}\r\n" for host in hosts)
    answer = await world.raw(f"GET {path} HTTP/1.1\r\n{fields}Connection: close\r\n\r\n".encode())
    return answer.status


@pytest.mark.parametrize(
    ("allowed", "right", "wrong"),
    [
        (("API.example.com", "*.lan.example", "10.0.0.7", "[2001:DB8::0:1]"),
         ("api.example.com api.example.com:8000 API.EXAMPLE.COM api.example.com. a.lan.example"
          " a.b.lan.example:1 10.0.0.7:80 [2001:db8::1]:8000"),
         ("example.com evil.example api.example.com.evil.example lan.example xlan.example 10.0.0.8"
          " [2001:db8::2] localhost 127.0.0.1 api.example.com:80:80 api.example.com@evil.example"
          " [::1")),
        (("*",), "evil.example 10.0.0.8:1", ""),
        (None, "evil.example 10.0.0.8:1", ""),
        ("127.0.0.1", "localhost:8000 127.0.0.1:8000 [::1]:8000 app.localhost",
         "evil.example 192.168.0.2 localhost.evil.example 0.0.0.0"),
        ("localhost", "localhost 127.0.0.1", "evil.example"),
        ("127.0.0.5", "127.0.0.5 localhost", "127.0.0.6"),
        ("0.0.0.0", "evil.example 192.168.0.2", ""),
    ],
)  # fmt: skip
async def test_only_allowed_hosts_are_answered(allowed: Any, right: str, wrong: str) -> None:
    """By default this machine's own names, where the server listens at such an address alone."""
    if isinstance(allowed, str):
        with listen(allowed, 0) as listener:
            assert choose_hosts(listener, allowed, ["api.example.com"]) == ("api.example.com",)
            allowed = choose_hosts(listener, allowed, None)
    async with serving(allowed_hosts=allowed) as world:
        assert {await called(world, host) for host in right.split()} == {200}
        strange = [*wrong.split(), *(["", "a b"] if allowed and "*" not in allowed else [])]
        answers = {host: await called(world, host) for host in strange}
        assert answers == dict.fromkeys(strange, 400)


async def test_another_host_reaches_no_call() -> None:
    async with serving(FakeEngine(echo), allowed_hosts=("localhost",)) as world:
        content = json.dumps(PLAIN)
        for path in (*POSTS, "/v1/models", "/", "/metrics", "/page/page.js", "/none"):
            method = "POST" if path in POSTS else "GET"
            answer = await world.raw(
                f"{method} {path} HTTP/1.1\r\nHost: evil.example:8000\r\nAuthorization: Bearer"
                f" {TOKEN}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
                f"\r\n\r\n{content}".encode()
            )
            assert (answer.status, answer.error["code"]) == (400, "invalid_host"), path
            assert "--allowed-hosts" in answer.error["message"]
        assert await called(world, "localhost", "evil.example") == 400
        assert await called(world, "evil.example", "localhost") == 400
        assert not world.engine.submitted
