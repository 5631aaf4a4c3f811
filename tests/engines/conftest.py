import copy
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vllm_doubles
from peft_adapters import llama, save, serving

from lorax_async.engines.smollm2 import prepare_base
from lorax_async.engines.transformers import AttachedModel
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    thread: int


def watched(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Call]:
    """The calls of a function from now on, which does what it did."""
    calls, original = list[Call](), getattr(owner, name)

    def call(*args: Any, **named: Any) -> Any:
        calls.append(Call((*args, *named.values()), threading.get_ident()))
        return original(*args, **named)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Where cores are shared, two OpenMP threads wait for each other several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model() -> Any:
    """SmolLM2 in float32, for our side; a test leaves it as it was."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(prepare_base(), dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def theirs(model: Any) -> Any:
    """Modules of their own on the same weights, for PEFT, which freezes them."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


@pytest.fixture(scope="session")
def examples() -> Path:
    return Path(__file__).parents[2] / "examples" / "adapters"


@pytest.fixture(scope="session")
def small() -> Any:
    return llama()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    most = {"r": 4, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "lm_head"]}
    return [
        save(llama(), most, root / "most"),
        save(llama(), {"r": 3, "target_modules": ["v_proj"]}, root / "some"),
        # As the first one in dtypes that round no scale: kernels may take them together.
        save(llama(), {"r": 2, "target_modules": ["q_proj", "k_proj", "o_proj"]}, root / "few"),
    ]


@pytest.fixture
def source(adapters: list[Path]) -> FakeSource:
    """ "warm" comes at once, "cold" as far as it is allowed to."""
    source = FakeSource()
    for id, folder in (("warm", adapters[2]), ("cold", adapters[0])):
        source.put(id, *tiny.files(folder))
    source.hold("cold")
    return source


@dataclass(frozen=True)
class Served:
    loader: AdapterLoader
    attached: AttachedModel
    first: AdapterHandle
    second: AdapterHandle


@pytest.fixture
async def served(small: Any, adapters: list[Path]) -> AsyncIterator[Served]:
    async with (
        serving(small) as (loader, attached),
        await loader.load(adapters[0]) as first,
        await loader.load(adapters[1]) as second,
    ):
        yield Served(loader, attached, first, second)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's modules be doubles."""
    vllm_doubles.install(monkeypatch)


@pytest.fixture
def builds_end(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let a worker's weights be collected, and with them its thread, as when its process ends."""
    gc.freeze()  # a collection of all that is older takes a second
    yield
    caplog.clear()
    request.node.funcargs.clear()
    end = time.monotonic() + 10
    for thread in threading.enumerate():
        if thread.name.startswith("lorax-build"):
            while thread.is_alive() and time.monotonic() < end:
                gc.collect()  # again: its thread drops them a moment after the build
                thread.join(0.01)
            assert not thread.is_alive()
    gc.unfreeze()
