"""What a run of these tests does not share with another one."""

import os
import re
import subprocess
import sys
from pathlib import Path

WHERE = """
def test_where(tmp_path):
    tmp_path.joinpath("file").touch()
    print(f"in {tmp_path} at last")
"""


def test_runs_share_no_temporary_folder(tmp_path: Path) -> None:
    """Nor is anything left behind. One of the two has workers."""
    tmp_path.joinpath("test_where.py").write_text(WHERE)
    parent = tmp_path / "parent"
    parent.mkdir()
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(parent)}
    command = [sys.executable, "-m", "pytest", "-rP", "-p", "conftest", "test_where.py"]
    runs = [
        subprocess.Popen(each, cwd=tmp_path, env=given, stdout=subprocess.PIPE, text=True)
        for each in (command, [*command, "-n", "1"])
    ]
    shown = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], shown
    folders = [re.findall(rf"in {parent}/([^/]+)/.* at last", text) for text in shown]
    assert [len(found) for found in folders] == [1, 1], shown
    assert folders[0] != folders[1]
    assert not list(parent.iterdir())
