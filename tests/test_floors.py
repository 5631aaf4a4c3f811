"""The house has floors: a file imports from its own and lower ones; core/ touches nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lorax_async"

FLOORS = {
    0: {
        *("errors", "identity", "ids", "verification", "merge", "adapter", "events"),
        *("config", "settings"),
    },
    1: {"core", "tracing"},
    2: {"io"},
    3: {"runtime", "handle"},
    4: {"loader", "looking", "tensor_calls", "layouts", "adaptable", "parts"},
    5: {"scheduler", "scheduling", "adapters", "metrics", "load_spans"},
    6: {"engines", "server", "cli", "commands", "__main__"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
IMPURE = {"asyncio", "torch", "os", "time", "random", "threading", "pathlib", "concurrent", "mmap"}
HEAVY = {
    "peft",
    "transformers",
    "triton",
    "safetensors",
    "huggingface_hub",
    "obstore",
    "rich",
    "uvloop",
    "aiohttp",
    "matplotlib",
    "prometheus_client",
    "opentelemetry",
}
ITS_PURPOSE = {
    "server": {"transformers", "prometheus_client"},
    "metrics": {"prometheus_client"},
    "load_spans": {"opentelemetry"},
}
"""Whoever imports these parts wants that."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imports(tree: ast.AST, *, top_level: bool = False) -> Iterator[str]:
    nodes = tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = _part(path)
    if part == "__init__":
        return
    floor = FLOOR_OF[part]
    for name in _imports(_tree(path)):
        words = name.split(".")
        if words[0] == "lorax_kernels":
            assert floor >= 5, f"{path.name} is below the kernels"
        if words[0] != "lorax_async" or len(words) < 2 or words[1] not in FLOOR_OF:
            continue
        lower = FLOOR_OF[words[1]]
        assert lower <= floor, (
            f"{path.relative_to(ROOT)} (floor {floor}) imports {name} (floor {lower})"
        )


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda p: p.stem)
def test_core_touches_nothing(path: Path) -> None:
    touched = {name.split(".")[0] for name in _imports(_tree(path))} & IMPURE
    assert not touched


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_imports_stand_where_they_are_used(path: Path) -> None:
    at_top = {name.split(".")[0] for name in _imports(_tree(path), top_level=True)}
    assert not at_top & HEAVY - ITS_PURPOSE.get(_part(path), set())


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_torch_only(path: Path) -> None:
    allowed = {"torch", "lorax_kernels", "triton"}
    foreign = {
        name.split(".")[0] for name in _imports(_tree(path)) if name != "__future__"
    } - allowed
    assert all(name in _STDLIB for name in foreign), foreign


_STDLIB = {
    *("bisect", "itertools"),
    *("__future__", "collections", "contextlib", "dataclasses", "functools", "math", "threading"),
    "typing",
}


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((ROOT / "kernels").rglob("*.py"))], ids=lambda p: p.name
)
def test_functions_fit_on_a_screen(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
