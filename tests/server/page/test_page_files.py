"""GET /: a page that needs nothing from elsewhere, and that a keyboard and a reader can use."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from lorax_async.server.calls.page.routes import FILES, HERE
from server.world import serving

KINDS = {"css": "text/css", "js": "text/javascript", "html": "text/html"}


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


async def test_all_that_it_names_is_there() -> None:
    async with serving() as world:
        page = await world.ask("GET", "/")
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        text = page.body.decode()
        named = {f"/{name}" for name in re.findall(r'(?:src|href)="(page/[^"]+)"', text)}
        script = (await world.ask("GET", "/page/page.js")).body.decode()
        named |= {f"/page/{name}" for name in re.findall(r'from "\./(.+?)"', script)}
        assert named == FILES.keys() - {"/"}
        for path in named:
            answer = await world.ask("GET", path)
            assert answer.status == 200
            kind = KINDS[path.rpartition(".")[2]]
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            assert answer.body


async def test_nothing_is_taken_from_elsewhere() -> None:
    """Nor could it be: the browser is told so."""
    async with serving() as world:
        for path in FILES:
            answer = await world.ask("GET", path)
            assert not re.search(rb"""["'(](?:https?:)?//""", answer.body)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_it_works_behind_any_prefix() -> None:
    """Of a proxy: no path begins at the root."""
    for name in ("page.html", "page.js", "events.js"):
        text = (HERE / name).read_text()
        assert not re.search(r"""(?:src|href)=["']/|(?:ask|fetch)\(["'`]/|from ["']/""", text)


async def test_only_reading_is_allowed() -> None:
    async with serving() as world:
        for path in ("/", "/page/events", "/page/timeline.svg", "/page/trace.json"):
            assert (await world.ask("POST", path)).status == 405
        assert (await world.ask("GET", "/page/other.js")).status == 404
        assert (await world.ask("GET", "/page/../settings.py")).status == 404


def test_every_field_has_a_label() -> None:
    elements = Elements((HERE / "page.html").read_text())
    fields = {each["id"] for each in elements.all("input", "textarea")}
    assert fields == {each["for"] for each in elements.all("label")}
    assert elements.all("html") == [{"lang": "en"}]
    (viewport,) = [each for each in elements.all("meta") if each.get("name") == "viewport"]
    assert viewport["content"] == "width=device-width, initial-scale=1"
    (error,) = [each for _, each in elements.found if each.get("role") == "alert"]
    assert error["id"] == "error"
    (timeline,) = [each for _, each in elements.found if each.get("id") == "timeline"]
    assert (timeline["tabindex"], bool(timeline["aria-label"])) == ("0", True)


def test_the_script_finds_what_it_asks_for() -> None:
    elements = Elements((HERE / "page.html").read_text())
    ids = {each["id"] for _, each in elements.found if "id" in each}
    asked = set(re.findall(r'\bat\("(\w+)"\)', (HERE / "page.js").read_text()))
    assert asked
    assert asked <= ids


def test_no_text_becomes_markup() -> None:
    """Names of adapters and answers are strangers' words."""
    for script in ("page.js", "events.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write", (HERE / script).read_text()
        )


async def test_a_head_is_answered_and_keeps_nothing() -> None:
    async with serving() as world:
        for path in (*FILES, "/page/events"):
            answer = await world.ask("HEAD", path)
            assert (answer.status, answer.body) == (200, b"")
        assert not world.service.watching._open
