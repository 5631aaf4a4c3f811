"""Tensors become the safetensors file of theirs that safetensors' own reader reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import safetensors.torch
import torch

from late_device import build
from late_device.world import LATE, loaded
from lorax_async.config import Limits
from lorax_async.core.header import HeaderLimits, parse_header
from lorax_async.errors import FetchError, IntegrityError, UnsupportedAdapterError
from lorax_async.io import snapshot as snapshot_module
from lorax_async.io.snapshot import STEP_BYTES, Snapshot, TensorsFile

CONFIG = b'{"r": 4}'


def begun(tensors: Mapping[str, torch.Tensor], config: bytes = CONFIG) -> Snapshot:
    snapshot = Snapshot(tensors, config, Limits())
    snapshot.measure()
    return snapshot


def taken(tensors: Mapping[str, torch.Tensor], config: bytes = CONFIG) -> TensorsFile:
    snapshot = begun(tensors, config)
    while snapshot.step():
        pass
    return snapshot.file()


def read_back(file: TensorsFile) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(bytes(file.content.tolist()))


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def awkward() -> dict[str, torch.Tensor]:
    """Of every kind of view and of all three dtypes, in odd sizes."""
    base = torch.arange(7 * 9, dtype=torch.float32).view(7, 9)
    with torch.inference_mode():
        unversioned = torch.ones(3, 5)
    return {
        "z odd half": torch.arange(5).half(),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, 3, dtype=torch.bfloat16).expand(5, 3),
        "shared": base[1:3],
        "shared again": base[2:4],
        "a parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "of inference": unversioned,
        "a number": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "negated": torch.view_as_real(torch.tensor([1 + 2j, 3 - 4j]).conj().resolve_conj())[:, 1],
        "a line": torch.randn(11, dtype=torch.bfloat16),
        "naïve ✓": torch.zeros(2, dtype=torch.float16),
    }


def test_the_file_is_the_one_that_safetensors_reads() -> None:
    tensors = awkward()
    file = taken(tensors)
    assert_equal(read_back(file), tensors)
    assert not file.content.requires_grad
    header = parse_header(file.prefix, file.content.nbytes, HeaderLimits())
    for span in header.tensors:
        dtype = {"F32": 4, "F16": 2, "BF16": 2}[span.dtype]
        assert span.start % dtype == 0
    assert len(file.prefix) % 64 == 0
    assert bytes(file.content[: len(file.prefix)].tolist()) == file.prefix
    assert file.config == CONFIG


@pytest.mark.parametrize("step", [1, 7, 64, STEP_BYTES])
def test_neither_steps_nor_order_change_it(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    tensors = awkward()
    whole = taken(tensors)
    monkeypatch.setattr(snapshot_module, "STEP_BYTES", step)
    again = taken(dict(reversed(tensors.items())))
    assert again.key == whole.key
    assert torch.equal(again.content, whole.content)


def test_the_key_tells_config_names_shapes_and_bytes() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    others = [
        one | {"b": torch.tensor([4.0])},
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"].view(1, 2), "b": one["b"]},
        {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0])},
        {"a": one["a"].view(torch.float16), "b": one["b"]},
    ]
    keys = {taken(each).key for each in [one, *others]} | {taken(one, CONFIG + b" ").key}
    assert len(keys) == 7
    assert taken({name: tensor.clone() for name, tensor in one.items()}).key in keys


def test_a_step_is_some_milliseconds_of_work() -> None:
    """Whatever the sizes: one large tensor, or very many small ones. A row is not cut."""
    large = begun({"large": torch.zeros(3 * STEP_BYTES // 4 + 5, 4)})
    assert sum(1 for _ in iter(large.step, False)) == 12
    small = begun({str(n): torch.zeros(1) for n in range(1000)})
    assert sum(1 for _ in iter(small.step, False)) == 3
    wide = torch.randn(2, STEP_BYTES // 4 + 3)
    assert_equal(read_back(taken({"wide": wide})), {"wide": wide})


def test_what_is_not_to_be_copied_is_refused_before_it_is() -> None:
    with pytest.raises(UnsupportedAdapterError, match="torch.int8; give it as"):
        begun({"x": torch.zeros(3, dtype=torch.int8)})
    vast = torch.zeros(1).expand(1 << 31)
    with pytest.raises(UnsupportedAdapterError, match="over the limit of 4,294,967,296"):
        begun({"x": vast})
    with pytest.raises(UnsupportedAdapterError, match="2 tensors are over the limit of 1"):
        Snapshot({"x": vast, "y": vast}, CONFIG, Limits(max_tensors=1))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_write_at_any_time_is_noticed(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(snapshot_module, "STEP_BYTES", 8)
    tensors = {name: torch.zeros(2) for name in "abc"}
    snapshot = begun(tensors)
    for _ in range(at):
        assert snapshot.step()
    tensors["a"][0] = 1
    with pytest.raises(IntegrityError, match="tensor 'a' was written to"):
        while snapshot.step():
            pass


class _Broken(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "copy_":
            raise ValueError("of its own")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_a_tensor_that_cannot_be_read_is_named() -> None:
    gone = torch.zeros(4)
    snapshot = begun({"gone": gone})
    gone.untyped_storage().resize_(0)
    with pytest.raises(FetchError, match="tensor 'gone' has no memory behind it") as caught:
        snapshot.step()
    assert not caught.value.retryable
    snapshot = begun({"fine": torch.zeros(3), "odd": torch.zeros(3).as_subclass(_Broken)})
    with pytest.raises(FetchError, match="tensor 'odd' could not be copied: of its own") as caught:
        snapshot.step()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.fixture
def late() -> Iterator[None]:
    yield from loaded()


@pytest.mark.usefixtures("late")
def test_what_its_stream_has_yet_to_write_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    was_done: list[bool] = []

    class Told(torch.Event):
        def synchronize(self) -> None:
            was_done.append(self.query())
            begun.set()
            super().synchronize()

    monkeypatch.setattr(snapshot_module, "new_event", lambda device: Told(device=device))
    source = torch.arange(64, dtype=torch.float32).pin_memory()
    stream = torch.Stream(device=LATE)
    with build.held(stream):
        with stream:  # the zeros as well, or they may come last
            there = torch.zeros(64, dtype=torch.float32, device=LATE)
            there.copy_(source, non_blocking=True)
            snapshot = Snapshot({"x": there, "y": source}, CONFIG, Limits())
        snapshot.measure()

        def copy() -> None:
            while snapshot.step():
                pass
            ended.set()
            begun.set()

        thread = threading.Thread(target=copy)
        thread.start()
        assert begun.wait(20)
        assert was_done == [False]
        assert not ended.is_set()
    thread.join(20)
    assert_equal(read_back(snapshot.file()), {"x": source, "y": source})
