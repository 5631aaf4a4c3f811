"""What protects bytes, slots, leases and files is needed: without it, a named test fails."""

from inspect import getattr_static

import pytest
from mutants.child import Children
from mutants.table import MUTANTS

NODES = sorted({mutant.test for mutant in MUTANTS.values()})


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Children:
    return Children(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_mutant_replaces_exists(name: str) -> None:
    for owner, attribute, replacement in MUTANTS[name].patches:
        assert getattr_static(owner, attribute) is not replacement


@pytest.mark.slow
def test_their_tests_exist(children: Children) -> None:
    verdict = children.run(NODES, None, "--collect-only", "-q", hangs_after=60)
    assert verdict.code == 0, verdict.output


@pytest.mark.soak
def test_without_a_mutant_all_pass(children: Children) -> None:
    verdict = children.run(NODES, None, hangs_after=300)
    assert verdict.passed, verdict.output


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught(name: str, children: Children) -> None:
    verdict = children.run([MUTANTS[name].test], name)
    if verdict.not_run:
        pytest.skip("what its test needs is not installed")
    assert verdict.failure is not None, verdict.output
