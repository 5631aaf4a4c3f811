"""Pickles of PEFT's become safetensors; hostile ones are refused, and nothing is left of them."""

import os
import resource
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import output
from peft import LoraConfig, get_peft_model
from peft_adapters import (
    FEATURE_WARNINGS,
    PEFT_WARNING,
    VARIANTS,
    llama,
    logits_with,
    pefts,
    prompt,
)
from safetensors.torch import load_file

from lorax_async import errors
from lorax_async.cli import main
from lorax_async.config import Limits
from lorax_async.sources.pickled_weights import convert

PICKLE, WEIGHTS = "adapter_model.bin", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.filterwarnings(PEFT_WARNING, FEATURE_WARNINGS),
]


def slow(*cases: Any) -> list[Any]:
    """Cases for `make slow`: each starts a process that imports torch."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in cases
    ]


def children() -> set[str]:
    """Return the processes that this one has started."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a test changes nothing but the two files of weights, nor leaves a child."""
    before = children()
    yield tmp_path
    assert children() <= before
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {PICKLE, WEIGHTS, "adapter_config.json", "README.md"}


def write(folder: Path, state: object, **options: Any) -> Path:
    torch.save(state, folder / PICKLE, **options)
    return folder


def refused(folder: Path, kind: type[errors.LoraxError], match: str, **options: Any) -> None:
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(kind, match=match):
        convert(folder, **options)
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "variant", ["embedding_and_all", *slow("every_linear", "dora", "lora_bias")]
)
async def test_a_pickle_of_peft(folder: Path, variant: str) -> None:
    """The file has PEFT's names and bits, and gives PEFT's logits."""
    model = llama()
    peft_model: Any = get_peft_model(model, LoraConfig(**VARIANTS[variant].lora))
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                weight.normal_(0, 0.04)
    peft_model.save_pretrained(folder, safe_serialization=False, save_embedding_layers=False)
    peft_model.unload()
    written = convert(folder)

    expected = torch.load(folder / PICKLE, weights_only=True)
    tensors = load_file(written)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert written.stat().st_mode == (folder / PICKLE).stat().st_mode
    ours = await logits_with(model, folder, prompt(2))
    (folder / WEIGHTS).unlink()  # so that PEFT reads the pickle
    torch.testing.assert_close(ours, pefts(model, folder, prompt(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)])
def test_shared_and_strided_tensors_get_memory_of_their_own(
    folder: Path, dtype: torch.dtype
) -> None:
    whole = torch.randn(8, 8).to(dtype)
    state = {A: whole[:4], B: whole.T[:, :4], f"{A}2": torch.nn.Parameter(whole)}
    tensors = load_file(convert(write(folder, state)))
    assert all(torch.equal(tensors[name], state[name]) for name in state)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("function", [os.system, *slow(eval, exec, getattr)])
def test_code_is_not_run(folder: Path, function: Callable[..., object]) -> None:
    seen = folder / "it ran"
    write(folder, {A: torch.ones(2, 2), B: Call(function, f"touch '{seen}'")})
    refused(folder, errors.UnsafeFileError, function.__name__)


@pytest.mark.slow
def test_a_bomb_of_memory(folder: Path) -> None:
    """The file has one number, in a tensor that repeats it 2**40 times."""
    write(folder, {A: torch.ones(1).expand(1 << 20, 1 << 20)})
    refused(folder, errors.UnsafeFileError, "limit of 4,294,967,296 bytes")
    huge = Limits(max_adapter_bytes=1 << 50)
    refused(folder, errors.UnsafeFileError, "limit of memory", limits=huge)


def repack(folder: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Replace the pickle in torch's archive."""
    path = write(folder, {A: torch.ones(2, 2)}) / PICKLE
    old = folder.parent / "old.zip"
    shutil.move(path, old)
    with zipfile.ZipFile(old) as before, zipfile.ZipFile(path, "w") as after:
        for item in before.infolist():
            is_pickle = item.filename.endswith("data.pkl")
            member = content if is_pickle else before.read(item)
            after.writestr(item.filename, member, compression if is_pickle else None)
    old.unlink()


@pytest.mark.slow
def test_an_endless_loop(folder: Path) -> None:
    """A key of tuples in tuples, each with the next one twice, takes 2**64 steps to hash."""
    pairs = b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(64))
    repack(folder, b"\x80\x02N" + pairs + b"q\x64}h\x64K\x01s.")
    began = time.monotonic()
    refused(folder, errors.UnsafeFileError, "limit of", seconds=8.0)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_pickle_that_grows_when_it_is_unpacked(folder: Path) -> None:
    repack(folder, b"\x80\x02" + b"N" * (1 << 29) + b".", zipfile.ZIP_DEFLATED)
    refused(folder, errors.UnsafeFileError, "limit of memory")


@pytest.mark.slow
def test_what_is_not_torchs_zip(folder: Path) -> None:
    write(folder, {A: torch.ones(2, 2)}, _use_new_zipfile_serialization=False)
    refused(folder, errors.AdapterFormatError, "torch before 1.6")
    content = (write(folder, {A: torch.ones(64, 64)}) / PICKLE).read_bytes()
    (folder / PICKLE).write_bytes(content[: len(content) // 2])
    refused(folder, errors.AdapterFormatError, "damaged")
    (folder / PICKLE).write_bytes(b"")
    refused(folder, errors.AdapterFormatError, "empty")
    (folder / PICKLE).unlink()
    refused(folder, errors.AdapterNotFoundError, PICKLE)
    os.mkfifo(folder / PICKLE)
    refused(folder, errors.AdapterFormatError, "FIFO")


@pytest.mark.parametrize(
    ("state", "kind", "word"),
    [
        ({A: {"nested": torch.ones(2, 2)}}, errors.AdapterFormatError, "more than tensors"),
        ({A: torch.ones(2, 2).double()}, errors.UnsupportedAdapterError, "float64"),
        *slow(
            ([torch.ones(2, 2)], errors.AdapterFormatError, "by name"),
            ({}, errors.AdapterFormatError, "by name"),
            ({1: torch.ones(2, 2)}, errors.AdapterFormatError, "more than tensors"),
            ({"lora_A": torch.ones(2, 2)}, errors.UnsupportedAdapterError, "PEFT's"),
            ({A: torch.ones(2, 2).to_sparse()}, errors.UnsupportedAdapterError, "sparse"),
            ({A: torch.ones(2, 2, device="meta")}, errors.UnsupportedAdapterError, "strided"),
            ({A: torch.ones(2, 2, 1)}, errors.UnsupportedAdapterError, "shape"),
        ),
    ],
)
def test_what_is_not_weights(
    folder: Path, state: object, kind: type[errors.LoraxError], word: str
) -> None:
    refused(write(folder, state), kind, word)


def test_safetensors_are_never_overwritten(folder: Path) -> None:
    write(folder, {A: torch.ones(2, 2)})
    (folder / WEIGHTS).write_bytes(b"mine")
    refused(folder, errors.UsageError, "exists already")
    (folder / WEIGHTS).unlink()

    def save() -> bool:  # another program, meanwhile
        (folder / WEIGHTS).write_bytes(b"mine")
        return False

    with pytest.raises(errors.UsageError, match="exists already"):
        convert(folder, is_cancelled=save)
    assert (folder / WEIGHTS).read_bytes() == b"mine"


def test_a_cancellation_ends_the_process(folder: Path) -> None:
    write(folder, {A: torch.ones(2, 2)})
    refused(folder, errors.FetchError, "no caller", is_cancelled=lambda: True)


@pytest.mark.slow
def test_a_full_disk(folder: Path) -> None:
    """The disk takes no more than 4 KiB of a file."""
    write(folder, {A: torch.ones(64, 64)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, limits[1]))
    try:
        refused(folder, errors.FetchError, "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
def test_conversions_side_by_side(folder: Path) -> None:
    """One of them writes the file, and the others say that it exists."""
    write(folder, {A: torch.ones(2, 2)})
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(convert(folder))
        except errors.UsageError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(type, outcomes), key=str).count(errors.UsageError) == 1
    assert torch.equal(load_file(folder / WEIGHTS)[A], torch.ones(2, 2))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {A: torch.ones(2, 2)})
    assert main(["convert", str(folder), "--json"]) == 0
    written = folder / WEIGHTS
    assert output(capsys) == {"file": str(written), "bytes": written.stat().st_size}
    assert main(["convert", str(folder), "--json"]) == 1
    assert "exists already" in capsys.readouterr().err
