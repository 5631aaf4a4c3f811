"""Each wait and each event of the code is needed: without it, some test fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest

from ordering.table import MUTANTS
from ordering.tree import ROOT, Tree


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_to_be_removed_is_there(name: str) -> None:
    """Once; and what is left is Python."""
    mutant = MUTANTS[name]
    path = ROOT / "lorax_async" / mutant.file
    whole = path.read_text()
    assert whole.count(mutant.snippet) == 1
    compile(whole.replace(mutant.snippet, mutant.instead), path, "exec")


@cache
def defined() -> set[str]:
    """Names of all tests and their classes."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        found.update(re.findall(r"^ *(?:def|class) (\w+)", path.read_text(), re.MULTILINE))
    return found


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_to_miss_it_is_there(name: str) -> None:
    for node in MUTANTS[name].tests:
        file, *names = node.partition("[")[0].split("::")
        assert (ROOT / "tests" / file).is_file()
        assert defined().issuperset(names)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def noticed(pytestconfig: pytest.Config) -> Iterator[dict[str, str]]:
    """What failed without what; told at the end."""
    found: dict[str, str] = {}
    yield found
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    assert reporter is not None
    reporter.ensure_newline()
    for name, test in found.items():
        reporter.write_line(f"{name} → {test}")


@pytest.mark.soak
def test_nothing_fails_while_nothing_is_removed(tree: Tree) -> None:
    nodes = sorted({node for mutant in MUTANTS.values() for node in mutant.tests})
    verdict = tree.run(nodes, hangs_after=200, given_up_after=900)
    assert verdict.passed, verdict.output


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_removed_is_missed(name: str, tree: Tree, noticed: dict[str, str]) -> None:
    mutant = MUTANTS[name]
    with tree.without(mutant):
        verdict = tree.run(mutant.tests)
    if verdict.not_run:
        pytest.skip("the late device, which its tests need, cannot be built here")
    assert verdict.failed, verdict.output
    noticed[name] = verdict.failed
