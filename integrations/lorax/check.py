"""LoRAX with our patch beside LoRAX without it: its tests, its numbers, its event loop.

`make lorax` calls it. LORAX_SRC names a checkout of LoRAX that has the commit; without it, the
commit is fetched from GitHub. Where neither can be had, nothing is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV = ROOT / ".venv-lorax"
PYTHON = VENV / "bin" / "python"
COMMIT = "a7394ba386ece427d5a6125b419aa38b46d966dc"
PATCH = HERE / f"lorax-{COMMIT[:8]}.patch"
ORIGIN = "https://github.com/predibase/lorax"

NEAR = 1e-5
"""How far logits may be from PEFT's, as a fraction of the largest."""

OURS = {"test_lora": 5, "test_segments": 6, "test_sgmv": 20}
"""The tests of LoRAX that use what the patch replaces, by file: how many must pass."""


class SourceMissingError(Exception):
    pass


def run(*command: str | Path, cwd: Path | None = None, **options: Any) -> str:
    """Return what a command prints; raise with its last lines if it fails."""
    options = {"check": True, "timeout": 1800} | options
    try:
        done = subprocess.run(  # noqa: PLW1510 - among the options
            command, cwd=cwd, capture_output=True, text=True, **options
        )
    except subprocess.CalledProcessError as error:
        printed = f"{error.stdout[-2000:]}\n{error.stderr[-4000:]}"
        raise SystemExit(f"{command} failed:\n{printed}") from None
    return str(done.stdout)


def find_source(temporary: Path) -> Path:
    """Return a repository that has the commit."""
    checkout = os.environ.get("LORAX_SRC")
    source = Path(checkout) if checkout else temporary / "fetched"
    try:
        if not checkout:
            run("git", "init", "--quiet", source)
            fetch = ("git", "-C", source, "fetch", "--quiet", "--depth", "1", ORIGIN, COMMIT)
            run(*fetch, timeout=300, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"})
        run("git", "-C", source, "cat-file", "-e", f"{COMMIT}^{{commit}}")
    except (SystemExit, OSError, subprocess.TimeoutExpired):
        reason = f"{ORIGIN} gave none"
        if checkout:
            reason = f"LORAX_SRC={checkout} is no checkout that has it"
        raise SourceMissingError(f"LoRAX at {COMMIT[:8]} cannot be had: {reason}") from None
    return source


def install() -> None:
    """Install LoRAX's requirements beside this package, once for each state of the lists."""
    stamp = VENV / "installed"
    lists = HERE / "requirements.txt", ROOT / "pyproject.toml"
    if stamp.exists() and stamp.stat().st_mtime > max(path.stat().st_mtime for path in lists):
        return
    print(f"installing LoRAX's requirements into {VENV.name}", flush=True)
    venv.create(VENV, with_pip=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--editable", ".", "-r", lists[0], cwd=ROOT)
    stamp.touch()


def copy(source: Path, to: Path, *, patched: bool) -> Path:
    """Put LoRAX's files at the commit into a folder; return its server folder."""
    to.mkdir()
    archive = to.parent / f"{to.name}.tar"
    run("git", "-C", source, "archive", "-o", archive, COMMIT, "server", "proto")
    run("tar", "-xf", archive, "-C", to)
    if patched:
        # Not as part of a repository around it, where git would leave files out.
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(to.parent)}
        run("git", "apply", PATCH, cwd=to, env=alone)
    server = to / "server"
    generated = server / "lorax_server" / "pb"
    generated.mkdir(exist_ok=True)
    options = "-I../proto", f"--python_out={generated}", f"--grpc_python_out={generated}"
    run(PYTHON, "-m", "grpc_tools.protoc", *options, "../proto/generate.proto", cwd=server)
    # As LoRAX's Makefile does: the import becomes its package's.
    grpc = generated / "generate_pb2_grpc.py"
    grpc.write_text(
        grpc.read_text().replace("\nimport generate_pb2", "\nfrom . import generate_pb2")
    )
    (generated / "__init__.py").touch()
    return server


def environment(server: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    home = {"HF_HOME": str(server / "no hub"), "HF_HUB_OFFLINE": "1"}
    return kept | home | {"PYTHONPATH": f"{server}{os.pathsep}{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def passed_tests(server: Path) -> set[str]:
    """Run LoRAX's own tests, offline; return those that pass."""
    report = server / "report.xml"
    # The default folder is shared by all runs of a user, and each removes what it finds old.
    own = ("-p", "no:cacheprovider", f"--basetemp={server / 'temporary'}")
    options = ("-q", *own, "-m", "not private", f"--junit-xml={report}")
    env = environment(server)
    # Those that need the hub or CUDA fail with and without the patch.
    run(PYTHON, "-m", "pytest", *options, "tests", cwd=server, env=env, check=False)
    cases = ET.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}" for case in cases if not len(case)}


def measure(server: Path) -> dict[str, Any]:
    printed = run(PYTHON, HERE / "measure.py", cwd=server, env=environment(server))
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def measure_two(server: Path) -> dict[str, Any]:
    """Run `processes.py` in two processes, which meet on the loopback interface."""
    env = environment(server) | {"GLOO_SOCKET_IFNAME": "lo"}
    script, meeting = HERE / "processes.py", server / "meeting"
    command = (str(PYTHON), str(script), "1", str(meeting))
    with subprocess.Popen(command, cwd=server, env=env, stderr=subprocess.DEVNULL) as second:
        try:
            printed = run(PYTHON, script, "0", meeting, cwd=server, env=env, timeout=300)
        finally:
            second.kill()
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def compare_tests(servers: dict[str, Path]) -> list[str]:
    """Print the counts of LoRAX's own tests; return what is wrong."""
    passed = {name: passed_tests(server) for name, server in servers.items()}
    wrong = [f"with the patch {test} fails" for test in sorted(passed["LoRAX"] - passed["patched"])]
    print("LoRAX's own tests that pass: " + ", ".join(f"{n} {len(p)}" for n, p in passed.items()))
    for file, expected in OURS.items():
        counts = {n: sum(f".{file}::" in test for test in p) for n, p in passed.items()}
        print(f"  {file}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        if counts["patched"] < expected:
            wrong.append(f"{file} has {counts['patched']} tests that pass, not {expected}")
    return wrong


def shown(found: Any) -> str:
    """Return a difference, or the largest of several, or the error there was instead."""
    if isinstance(found, dict):
        return "  ".join(f"{name}: {value:.0e}" for name, value in found.items())
    return found if isinstance(found, str) else f"{found:.0e}"


def is_near(found: Any) -> bool:
    values = list(found.values()) if isinstance(found, dict) else [found]
    return all(isinstance(value, float) and value <= NEAR for value in values)


def compare_numbers(servers: dict[str, Path]) -> list[str]:
    """Print how far LoRAX's logits are from PEFT's, and how its loop went; return what is wrong."""
    results, wrong = {name: measure(server) for name, server in servers.items()}, list[str]()
    for name, server in servers.items():
        results[name]["layers of two processes"] = measure_two(server)
    for title in ("differences", "merges", "layers of two processes"):
        oracle = "their definition" if "layers" in title else "PEFT's logits"
        print(f"\n{title}: how far from {oracle}, as a fraction of the largest")
        for way in results["patched"][title]:
            for name, result in results.items():
                print(f"  {way:32} {name:8} {shown(result[title][way])}")
            if not is_near(results["patched"][title][way]):
                wrong.append(f"{title}, {way}: {shown(results['patched'][title][way])}")
    modules = {result["modules beside Medusa"] for result in results.values()}
    if modules != {3 * 7 + 1}:
        wrong.append(f"of an adapter with Medusa's heads {modules} modules are loaded")
    nbytes = results["patched"]["bytes"]
    print(f"\nthe event loop's longest gap, ms, while {nbytes / 1e6:.0f} MB load, three times")
    for name, result in results.items():
        gaps, took = (" ".join(f"{ms:.0f}" for ms in result["loop"][of]) for of in ("gaps", "took"))
        print(f"  {name:8} {gaps}   (idle {result['loop']['idle']:.0f}; the loads took {took})")
    if max(results["patched"]["loop"]["gaps"]) > min(results["LoRAX"]["loop"]["gaps"]):
        wrong.append("the loop's longest gap with the patch is longer than one without it")
    if results["patched"]["loop"]["types seen"] != [0, 7]:
        wrong.append("a batch could have been made with a part of an adapter's layer types")
    return wrong


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            source = find_source(folder)
        except SourceMissingError as error:
            print(f"not run: lorax: {error}; set LORAX_SRC to a checkout of it")
            return 0
        install()
        servers = {
            "LoRAX": copy(source, folder / "original", patched=False),
            "patched": copy(source, folder / "patched", patched=True),
        }
        wrong = compare_tests(servers) + compare_numbers(servers)
    for problem in wrong:
        print(f"wrong: {problem}")
    if not wrong:
        print("\nright: LoRAX with the patch passes all that it passes without, and is PEFT's")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
