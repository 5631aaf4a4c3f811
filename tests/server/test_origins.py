"""What a page of another origin can do with a server that its reader runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorax_async import ConfigError
from lorax_async.commands.serve import hosts_of
from lorax_async.server.serving import listen
from lorax_async.server.settings import ServerSettings
from server.world import COMPLETIONS, TOKEN, FakeEngine, World, echo, serving

PLAIN = {"model": "base", "prompt": "x"}
POSTS = (
    *(COMPLETIONS, "/v1/chat/completions"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
)


JSON_TYPES = [
    "application/json",
    "Application/JSON",
    "application/json; charset=utf-8",
    "application/json;charset=UTF-8",
    " application/json ",
]


OTHER_TYPES = [
    "",
    "text/plain",
    "text/plain;charset=UTF-8",
    "text/plain; application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/json-seq",
    "application/jsonx",
    "json",
    "application/json, text/plain",
    "text/plain\r\nContent-Type: application/json",
    "application/json\r\nContent-Type: text/plain",
]


@pytest.mark.parametrize("kind", [*JSON_TYPES, *OTHER_TYPES])
async def test_only_json_is_computed(kind: str) -> None:
    """By every call that takes a body, whoever brings the operator's token too."""
    async with serving(FakeEngine(echo)) as world:
        if kind in JSON_TYPES:
            answer = await world.ask("POST", COMPLETIONS, PLAIN, Content_Type=kind)
            assert answer.status == 200
            return
        for path in POSTS:
            for content in (PLAIN, b""):
                answer = await world.ask(
                    "POST", path, content, Content_Type=kind, Authorization=f"Bearer {TOKEN}"
                )
                assert answer.status == 415
                assert answer.error["type"] == "invalid_request_error"
                assert answer.error["code"] == "unsupported_media_type"
                assert "application/json" in answer.error["message"]
        assert not world.engine.submitted


async def test_a_large_body_of_another_type_is_not_kept() -> None:
    async with serving(max_body_bytes=10) as world:
        large = b"x" * 400_000
        answer = await world.ask("POST", COMPLETIONS, large, Content_Type="text/plain")
    assert (answer.status, answer.headers["connection"]) == (415, "close")


async def test_no_other_origin_is_let_in() -> None:
    """A browser asks before it sends JSON across origins, and gets no leave; nor may it read."""
    asks = {"Origin": "https://evil.example"}
    preflight = asks | {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "content-type,authorization",
    }
    async with serving(FakeEngine(echo)) as world:
        answers = [await world.ask("OPTIONS", path, b"", **preflight) for path in POSTS]
        assert [answer.status for answer in answers] == [405] * 4
        answers.append(await world.ask("POST", COMPLETIONS, PLAIN, **asks))
        answers += [await world.ask("GET", path, b"", **asks) for path in ("/v1/models", "/")]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control-")]


# -- hosts ----------------------------------------------------------------------------------------


async def called(world: World, *hosts: str, path: str = "/health") -> int:
    fields = "".join(f"Host: {host}\r\n" for host in hosts)
    answer = await world.raw(f"GET {path} HTTP/1.1\r\n{fields}Connection: close\r\n\r\n".encode())
    return answer.status


@pytest.mark.parametrize(
    ("allowed", "right", "wrong"),
    [
        (
            ("API.example.com", "*.lan.example", "10.0.0.7", "[2001:DB8::0:1]"),
            [
                *("api.example.com", "api.example.com:8000", "API.EXAMPLE.COM", "api.example.com."),
                *("a.lan.example", "a.b.lan.example:1", "10.0.0.7:80", "[2001:db8::1]:8000"),
            ],
            [
                *("example.com", "evil.example", "api.example.com.evil.example", "lan.example"),
                *("xlan.example", "10.0.0.8", "[2001:db8::2]", "localhost", "127.0.0.1", ""),
                *("api.example.com:80:80", "api.example.com@evil.example", "[::1", "a b"),
            ],
        ),
        (("*",), ["evil.example", "10.0.0.8:1"], []),
        (None, ["evil.example", "10.0.0.8:1"], []),
    ],
    ids=["names", "all", "not said"],
)
async def test_only_allowed_hosts_are_answered(
    allowed: tuple[str, ...] | None, right: list[str], wrong: list[str]
) -> None:
    async with serving(allowed_hosts=allowed) as world:
        assert [await called(world, host) for host in right] == [200] * len(right)
        assert [await called(world, host) for host in wrong] == [400] * len(wrong)


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


@pytest.mark.parametrize(
    ("host", "right", "wrong"),
    [
        (
            "127.0.0.1",
            ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "app.localhost"],
            ["evil.example", "192.168.0.2", "localhost.evil.example", "0.0.0.0"],
        ),
        ("localhost", ["localhost", "127.0.0.1"], ["evil.example"]),
        ("127.0.0.5", ["127.0.0.5", "localhost"], ["127.0.0.6"]),
        ("0.0.0.0", ["evil.example", "192.168.0.2"], []),
    ],
)
async def test_a_loopback_server_answers_this_machines_names_by_default(
    host: str, right: list[str], wrong: list[str]
) -> None:
    with listen(host, 0) as listener:
        allowed = hosts_of(listener, host, None)
        assert hosts_of(listener, host, ["api.example.com"]) == ("api.example.com",)
    async with serving(allowed_hosts=allowed) as world:
        assert [await called(world, each) for each in right] == [200] * len(right)
        assert [await called(world, each) for each in wrong] == [400] * len(wrong)


@pytest.mark.parametrize(
    "hosts",
    [
        "localhost",
        (5,),
        ("",),
        ("a:80",),
        ("http://a",),
        ("a/b",),
        ("a.*",),
        ("**",),
        ("[::1]:80",),
    ],
)
def test_hosts_that_are_none_are_refused(hosts: Any) -> None:
    with pytest.raises(ConfigError, match="host"):
        ServerSettings(base="base", allowed_hosts=hosts)
