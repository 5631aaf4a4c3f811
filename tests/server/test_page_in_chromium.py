"""The page as a person has it: in a browser, by mouse, by keyboard, on a phone. And the timeline of
a trace as a file.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from tools import tool

from cli.test_serve import TOKEN, served

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.needs("playwright"), pytest.mark.slow]

DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
COLD = {"number": 1, "name": "one", "outcome": "first token", "seconds": 1.0, "ended": 1.0}
PATIENCE = 30_000
"""Milliseconds: the model computes on two cores."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        # As root it has no sandbox, and it opens this page only.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=tool("chromium"), args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    broken = tmp_path_factory.mktemp("broken") / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (broken / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(7) + b'{"a":1}  ')
    with served("--adapters", str(examples), f"broken={broken}") as (_, client):
        yield str(client.base_url).removesuffix("/v1/")


@contextmanager
def opened(chromium: Any, site: str, size: dict[str, int], scheme: str = "light") -> Iterator[Any]:
    """The page, live; nothing on it may fail, and it asks no other server."""
    context = chromium.new_context(viewport=size, color_scheme=scheme, has_touch=size is PHONE)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if _is_bad(said) else None)
    page.on("request", lambda asked: complaints.append(asked.url) if _is_foreign(asked) else None)

    def _is_bad(said: Any) -> bool:
        # The browser itself tells of each answer that is an error, which the page shows.
        return said.type in {"error", "warning"} and "Failed to load resource" not in said.text

    def _is_foreign(asked: Any) -> bool:
        return not asked.url.startswith((f"{site}/", "data:", f"blob:{site}/"))

    page.goto(site)
    shows(page, "#link", "live")
    yield page
    context.close()
    assert complaints == []


def shows(page: Any, where: str, what: str | re.Pattern[str]) -> str:
    from playwright.sync_api import expect

    expect(page.locator(where)).to_contain_text(what)
    return str(page.locator(where).inner_text())


def row(page: Any, name: str) -> Any:
    return page.locator("#adapters li").filter(has=page.get_by_text(name, exact=True))


def has(page: Any, name: str, what: str) -> None:
    from playwright.sync_api import expect

    expect(row(page, name)).to_contain_text(what)


def ask(page: Any, prompt: str = "What is ice?") -> str:
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("button", name="Send").click()
    return shows(page, "#times", "first token after")


def test_a_prompt_makes_a_tier_change(
    chromium: Any, site: str, pytestconfig: pytest.Config
) -> None:
    with opened(chromium, site, DESK) as page:
        assert page.title() == "lorax-async"
        shows(page, "#base", "smollm2")
        names = page.locator("#adapters .name").all_inner_texts()
        assert sorted(names) == ["broken", "json", "pirate", "shout"]
        assert page.get_by_label("Adapter: a name").input_value() == "smollm2"
        has(page, "shout", "not loaded")
        row(page, "shout").click()
        times = ask(page)
        assert re.search(r"after [\d.]+ m?s; \d+ tokens, [\d.]+ tokens/s", times)
        has(page, "shout", "resident")
        has(page, "shout", "device")
        said = page.locator("#answer").inner_text()
        assert said
        assert said == said.upper(), "the adapter's style"
        assert "shout" in shows(page, "#cold", "layers were computed")
        shows(page, "#slots", re.compile(r"^1 of \d+ used, \d+ free$"))
        shows(page, "#device", re.compile(r"^1\.\d MiB of \d+"))
        shows(page, "#hits", "0 % of 1 loads")
        shows(page, "#queue", "0 running, 0 waiting")
        bars = ("slots", "device", "host")
        values = [page.locator(f"#{bar}-bar").evaluate("it => [it.value, it.max]") for bar in bars]
        assert values[0][0] == 1
        assert values[1][0] > 1e6
        assert values[2] == [0, 256 << 20]
        page.locator("#timeline canvas").hover(position={"x": 300, "y": 45})
        shows(page, "#timeline .note", "request shout: ")
        with page.expect_download() as download:
            page.get_by_role("link", name="Save the trace").click()
        assert download.value.suggested_filename == "cold-request.json"
        assert '"traceEvents"' in Path(download.value.path()).read_text()
        _picture(page, pytestconfig, "page.png")


def test_by_keyboard_alone(chromium: Any, site: str) -> None:
    with opened(chromium, site, DESK) as page:
        _tab_to(page, "Send")
        _tab_to(page, "pirate")
        page.keyboard.press("Enter")
        assert page.get_by_label("Adapter: a name").input_value() == "pirate"
        page.keyboard.press("Control+a")
        page.keyboard.type("What is ice?")
        page.keyboard.press("Control+Enter")
        shows(page, "#times", "first token after")
        assert page.locator("#answer").inner_text()
        _tab_to(page, "zoom in")
        _tab_to(page, "timeline: ")
        _tab_to(page, "Save the trace")


def test_the_timeline_is_zoomed(chromium: Any, site: str) -> None:
    """And tells what is pointed at, whose name is never markup."""
    page = chromium.new_page(viewport=DESK)
    span = {"ph": "X", "pid": 1, "tid": 1, "name": "<b>load", "dur": 5e4}
    trace = {"traceEvents": [span | {"ts": number * 1e5} for number in range(10)]}
    _stream(page, report(["one"], COLD))
    page.route("**/page/trace.json?number=1", lambda route: route.fulfill(json=trace))
    page.goto(site)
    canvas = page.locator("#timeline canvas")
    canvas.hover(position={"x": 150, "y": 45})
    shows(page, "#timeline .note", "<b>load: 50.000 ms from 0.000")
    whole = canvas.screenshot()
    button = partial(page.get_by_role, "button")
    ways: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (partial(page.mouse.wheel, 0, -480), partial(page.mouse.wheel, 0, 2_000)),
        (partial(canvas.press, "+"), partial(canvas.press, "0")),
        (button(name="zoom in").click, button(name="show all").click),
    ]
    for zoom, show_all in ways:
        zoom()
        _looks(canvas, whole, same=False)
        show_all()
        _looks(canvas, whole, same=True)
    page.close()


def test_no_label_of_the_axis_is_cut(chromium: Any, site: str) -> None:
    page = chromium.new_page(viewport=PHONE)
    page.add_init_script("""
      window.ends = [];
      const draw = CanvasRenderingContext2D.prototype.fillText;
      CanvasRenderingContext2D.prototype.fillText = function (text, x, ...more) {
        const width = this.measureText(text).width * (this.textAlign === "center" ? 0.5 : 1);
        if (/^[0-9]+ ms$/.test(text)) ends.push([text, x + width, this.canvas.clientWidth]);
        draw.call(this, text, x, ...more);
      };""")
    _stream(page, report(["one"], COLD))
    page.goto(site)
    shows(page, "#cold", "one")
    page.wait_for_function("ends.some(([text]) => text === '1000 ms')")
    assert [end for end in page.evaluate("ends") if end[1] > end[2]] == []
    page.close()


def test_a_cold_request_is_chosen(chromium: Any, site: str) -> None:
    """It stays when others come, until it is no longer kept; a new server counts anew."""
    page = chromium.new_page(viewport=DESK)
    colds = [COLD | {"number": n, "name": name, "ended": n} for n, name in enumerate("abcd", 1)]
    again = COLD | {"number": 1, "name": "e", "ended": 9.0}
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    _stream(
        page,
        report([], *colds[2::-1]),
        report([], *colds[::-1]),
        report([], colds[3]),
        report([], again),
    )
    page.goto(site)
    shows(page, "#cold", "c, ")
    page.get_by_label("Request", exact=True).select_option(index=3)
    shows(page, "#cold", "a, ")
    options = page.locator("#which option")
    expect_count(options, 5)
    assert "2: b, " in options.nth(3).inner_text()
    assert "a, " in page.locator("#cold").inner_text()
    shows(page, "#cold", "d, ")
    shows(page, "#cold", "e, ")
    found = [url.partition("number=")[2] for url in asked if "trace.json" in url]
    assert found == ["3", "1", "4", "1"], "what is drawn already is not asked for again"
    page.close()


def test_a_trace_that_does_not_come_is_asked_for_again(chromium: Any, site: str) -> None:
    page = chromium.new_page(viewport=DESK)
    _stream(page, report(["one"], COLD), report(["one"], COLD))
    answers: list[Any] = [{"status": 503}, {"json": {"traceEvents": []}}]
    page.route("**/page/trace.json?number=1", lambda route: route.fulfill(**answers.pop(0)))
    page.goto(site)
    shows(page, "#cold", "no timeline: status 503")
    shows(page, "#cold", "first token after 1.00 s; no layer was computed.")
    page.close()


def test_an_error_is_shown(chromium: Any, site: str) -> None:
    with opened(chromium, site, DESK) as page:
        row(page, "broken").click()
        page.keyboard.press("Control+Enter")
        said = page.locator("#error")
        shows(page, "#error", "adapter 'broken'")
        assert said.inner_text()
        has(page, "broken", "adapter 'broken'")
        page.get_by_label("Adapter: a name").fill("no id at all")
        page.keyboard.press("Enter")
        shows(page, "#error", "no id at all")
        page.get_by_label("Adapter: a name").fill("smollm2")
        page.keyboard.press("Enter")
        shows(page, "#times", "answering")
        shows(page, "#answer", re.compile(r"\w"))
        assert said.inner_text() == ""
        page.keyboard.press("Escape")


def test_an_answer_is_stopped(chromium: Any, site: str) -> None:
    with opened(chromium, site, DESK) as page:
        page.get_by_role("textbox", name="Prompt").fill("Tell me a very long story about the sea.")
        page.get_by_role("button", name="Send").click()
        shows(page, "#answer", re.compile(r"\w"))
        page.keyboard.press("Escape")
        shows(page, "#times", "stopped")
        assert page.locator("#error").inner_text() == ""
        assert page.get_by_role("button", name="Stop").is_disabled()
        page.get_by_role("button", name="Send").press("Enter")
        page.get_by_role("button", name="Stop").press("Enter")
        shows(page, "#times", "stopped")
        assert page.locator(":focus").inner_text() == "Send", "the focus is not lost"


def test_on_a_phone(chromium: Any, site: str, pytestconfig: pytest.Config) -> None:
    """Nothing is wider than the screen, and what is touched is large enough for a finger."""
    with opened(chromium, site, PHONE, "dark") as page:
        row(page, "json").tap()
        page.get_by_role("button", name="Send").tap()
        shows(page, "#cold", "json")
        shows(page, "#times", "first token after")
        places = "header, nav, section, input, textarea, select, meter, #adapters li, #timeline"
        for each in page.locator(places).all():
            box = each.bounding_box()
            assert box is None or 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["width"]
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box is None or box["height"] >= 44
        _picture(page, pytestconfig, "page-phone.png")


def test_the_operator_sees_all(chromium: Any, site: str) -> None:
    """With the right token; another one is forgotten, be it no text of HTTP."""
    with opened(chromium, site, DESK) as page:
        page.get_by_text("Key", exact=True).click()
        wrong = ("€", "not connected"), ("a wrong one", "needs the admin token")
        for token, link in (*wrong, (TOKEN, "live, all adapters")):
            assert not page.get_by_role("button", name=re.compile("^(Pin|Unload|Load)")).count()
            give_token(page, token, link)
            shows(page, "#link", "live")
        assert row(page, "pirate").count() == 1
        assert page.url == f"{site}/"
        stored = "localStorage.length + sessionStorage.length + document.cookie.length"
        assert page.evaluate(stored) == 0
        page.reload()
        shows(page, "#link", re.compile("^live$"))


def test_the_operator_loads_pins_and_unloads(chromium: Any, site: str, examples: Path) -> None:
    name = "<b>mine"
    with opened(chromium, site, DESK) as page:
        page.get_by_text("Key", exact=True).click()
        give_token(page, TOKEN, "live, all adapters")
        page.get_by_text("Load an adapter").click()
        page.get_by_label("Name, for requests").fill(name)
        for path, place, words in (
            ("/no/such", "#refused", "no such folder"),
            (str(examples / "pirate"), "#done", f"'{name}' added"),
            (str(examples / "pirate"), "#refused", "has already been loaded"),
        ):
            page.get_by_label("Folder on the server, or id").fill(path)
            page.get_by_role("button", name="Load", exact=True).click()
            shows(page, place, words)
        has(page, name, "device")
        page.get_by_role("button", name=f"Pin {name}").press("Enter")
        has(page, name, "pinned")
        assert page.locator(":focus").inner_text() == "Unpin", "the same button"
        page.keyboard.press("Enter")
        shows(page, "#done", "unpinned successfully")
        has(page, name, "Pin")
        page.get_by_role("button", name=f"Pin {name}").click()
        has(page, name, "pinned")
        shows(page, "#refused", "")
        page.once("dialog", lambda dialog: dialog.dismiss())
        page.get_by_role("button", name=f"Unload {name}").click()
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name=f"Unload {name}").press("Enter")
        shows(page, "#done", f"'{name}' removed")
        expect_count(row(page, name), 0)
        assert page.locator(":focus").count() == 1, "the focus goes to a neighbour"


def test_the_page_leads_to_metrics_and_documents(chromium: Any, site: str) -> None:
    with opened(chromium, site, PHONE) as page:
        links = page.get_by_role("navigation").get_by_role("link")
        assert links.evaluate_all("all => all.map(it => it.href)") == [
            f"{site}/openapi.json",
            f"{site}/metrics",
        ]
        for number in range(2):
            with page.expect_navigation() as going:
                links.nth(number).click()
            assert going.value.status == 200
            page.go_back()


def give_token(page: Any, token: str, link: str) -> None:
    page.get_by_label("Admin token").fill(token)
    page.get_by_role("button", name="Use it").click()
    shows(page, "#link", link)


def expect_count(place: Any, count: int) -> None:
    from playwright.sync_api import expect

    expect(place).to_have_count(count)


def test_a_server_that_has_gone_is_told_of(chromium: Any, examples: Path) -> None:
    with served("--adapters", str(examples)) as (process, client):
        page = chromium.new_page(viewport=DESK)
        page.goto(str(client.base_url).removesuffix("/v1/"))
        shows(page, "#link", "live")
        process.terminate()
        assert process.wait(30) == 0
        shows(page, "#link", "not connected")
        page.get_by_role("button", name="Send").click()
        shows(page, "#error", re.compile(r"\w"))
        page.close()


def test_a_lost_stream_moves_nothing_under_the_finger(chromium: Any, site: str) -> None:
    """Rows stay as they are; of what has gone nothing is left. A name is never markup."""
    page, four = chromium.new_page(viewport=DESK), "<b>four"
    _stream(page, report(["one", "two"], COLD), report(["two", "three"]), report(["two", four]))
    page.goto(site)
    shows(page, "#cold", "one")
    row(page, "two").get_by_role("button").focus()
    has(page, "three", "disk")
    assert page.locator(":focus").inner_text().startswith("two")
    assert page.locator("#adapters .name").all_inner_texts() == ["two", "three"]
    shows(page, "#cold", "None yet")
    page.locator("#adapters .name", has_text="two").hover()
    page.mouse.down()
    has(page, four, "disk")
    page.mouse.up()
    assert page.get_by_label("Adapter: a name").input_value() == "two"
    row(page, four).get_by_role("button").click()
    assert page.get_by_label("Adapter: a name").input_value() == four
    page.close()


def test_a_file_draws_a_timeline(
    chromium: Any, tmp_path: Path, examples: Path, pytestconfig: pytest.Config
) -> None:
    """Of a trace of the example; the file is all it needs."""
    trace, file = tmp_path / "demo.json", tmp_path / "demo.html"
    command = partial(subprocess.run, check=True, capture_output=True)
    example = str(examples.parent / "slow_link.py")
    command([sys.executable, example, "--base", "smollm2", "--trace", str(trace)])
    command([sys.executable, "-m", "lorax_async", "timeline", str(trace), "-o", str(file)])
    context = chromium.new_context(viewport=DESK | {"height": 660}, offline=True)
    page, complaints = context.new_page(), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text))
    page.on("request", lambda asked: complaints.append(asked.url))
    page.goto(file.as_uri())
    shows(
        page,
        "#summary",
        re.compile(r"ms; layers were computed for [\d.,]+ ms, of which [\d.,]+ ms"),
    )
    page.locator("canvas").hover(position={"x": 137, "y": 45})  # the beginning of the first lane
    shows(page, ".note", re.compile(r"(load|stream) (pirate|shout|json): "))
    _picture(page, pytestconfig, "timeline.png")
    context.close()
    assert complaints == [file.as_uri()]


def report(names: list[str], *cold: Any, operator: bool = False) -> dict[str, Any]:
    plain = {"tier": "disk", "state": "present", "layers": None, "bytes": 1, "leases": 0}
    rows = {name: plain | {"name": name, "named": True, "error": None} for name in names}
    return {"base": "base", "operator": operator, "cold": cold, "rows": rows}


def _stream(page: Any, *events: dict[str, Any]) -> None:
    """Instead of the server's: a stream for each event, which ends with it; then no answer."""
    left = list(events)

    def answer(route: Any) -> None:
        if left:
            kind = {"content-type": "text/event-stream"}
            route.fulfill(headers=kind, body=f"data: {json.dumps(left.pop(0))}\n\n")

    page.route("**/page/events", answer)
    page.route("**/page/trace.json?*", lambda route: route.fulfill(json={"traceEvents": []}))


def _tab_to(page: Any, name: str) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        called = focused.get_attribute("aria-label") or focused.inner_text()
        if called.startswith(name):
            return
    raise AssertionError(f"nobody gets to {name!r} by Tab")


def _looks(canvas: Any, picture: bytes, *, same: bool) -> None:
    deadline = monotonic() + PATIENCE / 1e3
    while (canvas.screenshot() == picture) != same:
        assert monotonic() < deadline


def _picture(page: Any, config: pytest.Config, name: str) -> None:
    folder: Path | None = config.getoption("--pictures")
    if folder is not None:
        page.screenshot(path=folder / name, full_page=True)
