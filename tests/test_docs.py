"""The documents say what is there: diagrams, errors, links, commands and the README's example."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from lorax_async import LocalRoot, errors
from lorax_async.core.peft_fields import FIELDS, Use
from lorax_async.core.peft_names import SUFFIXES
from lorax_async.core.transitions import FILE_MOVES, SLOT_MOVES, FileMove, SlotMove
from tiny_loaders import ONE, loader

ROOT = Path(__file__).parent.parent
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.LoraxError)
}


def _draw_states() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_states", ROOT / "docs" / "draw_states.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _without_code(page: Path) -> str:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


# -- architecture.md ------------------------------------------------------------------------------


def test_the_diagrams_are_drawn_from_the_tables() -> None:
    page = ARCHITECTURE.read_text()
    assert _draw_states().redrawn(page) == page, "run: python docs/draw_states.py --write"


def test_the_diagrams_have_every_move_and_no_other() -> None:
    drawn = {
        (before, word.strip("«»"), after)
        for before, after, words in re.findall(
            r"^    (\w+) --> (\w+) : (.+)$", ARCHITECTURE.read_text(), re.MULTILINE
        )
        for word in words.split(", ")
    }
    moves = {(s.name, m.value, t.name) for (s, m), t in FILE_MOVES.items()}
    moves |= {(s.name, m.value, t.name) for (s, m), t in SLOT_MOVES.items()}
    assert drawn == moves


@pytest.mark.parametrize("moves", [FileMove, SlotMove])
def test_what_is_drawn_as_a_decision_is_one(moves: type[FileMove] | type[SlotMove]) -> None:
    source = inspect.getsource(moves).partition("# decisions")[2]
    decisions = set(re.findall(r"^    ([A-Z_]+) =", source, re.MULTILINE))
    assert decisions
    drawn = {move.name for move in moves if move in _draw_states().DECISIONS}
    assert drawn == decisions


@pytest.mark.parametrize("mark", ["BEGIN", "END"])
def test_a_page_without_its_marks_is_not_touched(mark: str) -> None:
    draw = _draw_states()
    page = ARCHITECTURE.read_text()
    for broken in (page.replace(vars(draw)[mark], ""), page + vars(draw)[mark]):
        with pytest.raises(ValueError, match="once"):
            draw.redrawn(broken)


def test_there_are_nine_rules() -> None:
    rules = ARCHITECTURE.read_text().partition("### The nine rules")[2].partition("\n### ")[0]
    assert re.findall(r"^(\d)\. \*\*", rules, re.MULTILINE) == list("123456789")


# -- errors.md ------------------------------------------------------------------------------------


def _sections() -> dict[str, str]:
    parts = re.split(r"^### (\w+)$", (ROOT / "docs" / "errors.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_errors_have_a_section_each() -> None:
    assert _sections().keys() == ERRORS.keys()


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_explained(name: str) -> None:
    section, kind = _sections()[name], ERRORS[name]
    assert re.search(r"^- \*\*Means:\*\* \w.+", section, re.MULTILINE)
    assert re.search(r"^- \*\*Do:\*\* \w.+", section, re.MULTILINE)
    found = re.search(
        r"^- \*\*Retryable:\*\* (yes|no)\. \*\*Stage:\*\* (.+)\.$", section, re.MULTILINE
    )
    assert found is not None
    assert (found[1] == "yes") == kind.retryable_by_default
    if kind is not errors.AdapterTimeoutError:  # whose stage is never a default
        assert found[2] == (kind.default_stage or "none")
    for example in re.findall(r"^ {6}(\S.*)$", section, re.MULTILINE):
        assert example.startswith(f"{name}: ")
        assert len(example) <= errors.MAX_TEXT


def test_the_tree_of_errors_is_theirs() -> None:
    tree = re.findall(
        r"^    ([│├└─ ]*)(\w+Error)\b(.*)$",
        (ROOT / "docs" / "errors.md").read_text().partition("## The tree")[2].partition("###")[0],
        re.MULTILINE,
    )
    above: list[type] = []
    for indent, name, remark in tree:
        depth = len(indent) // 4
        kind = ERRORS[name]
        assert kind.__bases__[0] is (above[depth - 1] if depth else Exception), name
        assert issubclass(kind, TimeoutError) == ("TimeoutError" in remark), name
        above[depth:] = [kind]
    assert sorted(name for _, name, _ in tree) == sorted(ERRORS)


def test_every_stage_is_explained() -> None:
    table = (ROOT / "docs" / "errors.md").read_text().partition("## Stages")[2]
    words = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert words == list(errors.Stage.__args__)  # type: ignore[attr-defined]


# -- adapters.md ----------------------------------------------------------------------------------


def _mentioned(section: str) -> set[str]:
    page = (ROOT / "docs" / "adapters.md").read_text()
    text = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`([^`\s]+)`", text))


def test_every_refused_field_has_its_reason() -> None:
    refused = {name for name, field in FIELDS.items() if field.use is Use.REFUSED}
    assert refused | {"peft_type", "init_lora_weights"} <= _mentioned("Refused")
    assert not refused & _mentioned("Applied")


def test_every_tensor_that_is_applied_is_explained() -> None:
    assert set(SUFFIXES) <= _mentioned("Applied")
    assert {"use_dora", "lora_bias", "use_rslora", "rank_pattern"} <= _mentioned("Applied")


# -- all pages ------------------------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def _links(page: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(page)):
        if not re.match(r"https?:", link):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _links(page):
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not fragment or fragment in _anchors(target), link


def test_every_make_target_that_is_named_is_one() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^    )make (\w+)", page.read_text(), re.MULTILINE))
        assert named <= targets, page


# -- README.md ------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Where cores are shared, two OpenMP threads wait for each other several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.usefixtures("nothing_left")
async def test_the_lines_about_room_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = _python_blocks()
    scope: dict[str, Any] = {}
    exec("async def play(loader):\n" + textwrap.indent(lines, "    "), scope)
    for name in ("sql", "chat"):
        tiny.write(tmp_path / name)
    async with loader(local_roots=(LocalRoot(tmp_path, immutable=True),)) as there:
        await scope["play"](there)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sql" in line]
    file_bytes = os.path.getsize(tmp_path / "sql" / "adapter_model.safetensors")
    assert line.split()[1:] == ["device", str(ONE), str(file_bytes)]


@pytest.mark.usefixtures("nothing_left")
async def test_the_lines_about_tensors_run(capsys: pytest.CaptureFixture[str]) -> None:
    *_, lines = _python_blocks()
    steps = iter((1, 2))
    scope: dict[str, Any] = {
        "model": SimpleNamespace(peft_config={"default": tiny.config()}),
        "get_peft_model_state_dict": lambda _: tiny.tensors(next(steps)),
    }
    exec("async def play(loader):\n" + textwrap.indent(lines, "    "), scope)
    async with loader() as there:
        await scope["play"](there)
    assert capsys.readouterr().out.splitlines() == ["policy 4", "True"]


@pytest.mark.usefixtures("one_thread", "nothing_left")
def test_the_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, *_ = _python_blocks()
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 26
    monkeypatch.chdir(ROOT)
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    shape, base, pirate, shout = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([8, 576])"
    assert not base.startswith("Arr")
    assert pirate.startswith("Arr")
    assert shout.isupper()
    assert not base.isupper()
