"""Several processes on one disk cache: killed at every call, at once, and anything at any time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cache_inputs import KEY, NBYTES

from lorax_async.core.cache_names import scope_name
from lorax_async.core.chunk_map import CHUNK_BYTES

pytestmark = pytest.mark.slow

IO = Path(__file__).parent
PATHS = [str(IO), str(IO.parent), str(IO.parent.parent), str(IO.parent.parent / "kernels")]
BUDGET = 1_000_000
LARGEST = 560_000


def run_script(what: str, base: Path, locks: str = "flock") -> Any:
    done = subprocess.run(
        [sys.executable, IO / "cache_processes.py", what, base, locks],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def chunks_in(spans: list[list[int]]) -> set[int]:
    """The chunks that these spans have written as a whole, by hand."""
    written = bytearray(NBYTES)
    for start, stop in spans:
        written[start:stop] = b"\1" * (stop - start)
    cut = [written[at : at + CHUNK_BYTES] for at in range(0, NBYTES, CHUNK_BYTES)]
    return {number for number, chunk in enumerate(cut) if all(chunk)}


@pytest.mark.parametrize("locks", ["flock", "none"])
def test_killed_after_any_call_a_second_process_goes_on(tmp_path: Path, locks: str) -> None:
    outcomes = run_script("kills", tmp_path, locks)
    assert {"open", "mkdir", "pwritev", "posix_fallocate", "fsync", "rename", "unlink"} <= {
        outcome["call"] for outcome in outcomes
    }
    entry = f"entries/{KEY.name}"
    names = ["adapter_config.json", "adapter_model.safetensors", "record.json"]
    names += [scope_name("somebody")]
    for outcome in outcomes:
        assert outcome["second"] == 0, outcome
        assert outcome["left"] == [entry, *(f"{entry}/{name}" for name in names)], outcome
        fetched = {
            number
            for start, stop in outcome["fetched"]
            for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))
        }
        assert not fetched & chunks_in(outcome["written"]), outcome
    assert [] in [outcome["fetched"] for outcome in outcomes]  # all was here, or published


def test_of_several_processes_one_downloads(tmp_path: Path) -> None:
    for outcomes in run_script("together", tmp_path):
        assert [code for code, _ in outcomes] == [0, 0, 0, 0]
        assert sorted(told[-1] for _, told in outcomes) == ["had", "had", "had", "published"]
        assert sum(stop - start for start, stop in spans_of(outcomes)) == NBYTES


def test_without_locks_all_may_download_and_all_are_right(tmp_path: Path) -> None:
    for outcomes in run_script("together", tmp_path, "none"):
        assert [code for code, _ in outcomes] == [0, 0, 0, 0]
        assert {told[-1] for _, told in outcomes} <= {"had", "published"}
        assert "published" in {told[-1] for _, told in outcomes}
    assert len(spans_of(outcomes)) > 6  # the slow ones did not wait: the locks were none


def spans_of(outcomes: list[tuple[int, list[Any]]]) -> list[list[int]]:
    return [each for _, told in outcomes for each in told if isinstance(each, list)]


@pytest.mark.parametrize("locks", ["flock", "none"])
def test_anything_at_any_time(tmp_path: Path, locks: str) -> None:
    """Fetches, evictions, kills and giving up, in six processes at a time on a small budget."""
    outcome = run_script("adventures", tmp_path, locks)
    assert set(outcome["codes"]) <= {0, -9}, outcome
    assert {0, -9} <= set(outcome["codes"])
    told = {text for text in outcome["told"] if "do not fit" not in text}
    assert "had" in told
    assert outcome["problems"] == []
    assert outcome["partials"] == 0
    assert outcome["used"] <= BUDGET
    if locks == "flock":
        assert told == {"had"}
        assert outcome["most"] <= BUDGET
    else:
        assert all("again" in text for text in told - {"had"})
        assert outcome["most"] <= BUDGET + 5 * LARGEST
