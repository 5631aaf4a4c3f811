"""What attaching does to a model, which adapter each row uses, and what is refused."""

import asyncio
import contextvars
import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from event_loops import until
from false_bytes import told_false
from peft_adapters import EVERY, adapted, llama, logits_of, prompt, save, serving
from tiny_loaders import fails
from tiny_sources import state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engines.conftest import Served
from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.engines.transformers import attach
from lorax_async.errors import ConfigError, HandleClosedError, IntegrityError, UsageError
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource
from lorax_kernels import Plan

Patch = pytest.MonkeyPatch
Paths = list[Path]


class Flat(nn.Module):
    """As some decoders do: the second linear's input has lost its rows."""

    def __init__(self) -> None:
        super().__init__()
        linears = {"up": nn.Linear(8, 8), "flat": nn.Linear(8, 8)}
        self.layers = nn.ModuleList([nn.ModuleDict(linears)])
        self.config = {"model_type": "custom"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layers[0]
        flat: torch.Tensor = layer["flat"](layer["up"](x).view(-1, 8))
        return flat.view(x.shape)


async def test_rows_that_cannot_be_told_apart_are_refused_if_adapted(tmp_path: Path) -> None:
    model, x = Flat(), torch.ones(2, 3, 8)
    up, flat = [save(model, {"r": 2, "target_modules": [n]}, tmp_path / n) for n in ("up", "flat")]
    async with serving(model) as (loader, attached):
        async with await loader.load(up) as handle:
            with torch.no_grad(), attached.batch([handle, None]):
                assert not torch.equal(*model(x))
        async with await loader.load(flat) as handle:
            with attached.batch([handle, None]), pytest.raises(UsageError, match="told apart"):
                model(x)


class Doubled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


def changed(name: str, module: nn.Module) -> Any:
    model = llama()
    model.set_submodule(name, module)
    return model


UP, TOKENS = "model.layers.1.mlp.up_proj", "model.embed_tokens"
ONE_MORE = partial(llama, num_hidden_layers=3)
LOOKS = r"'model.embed_tokens' \(.*\) does more than look up"


async def test_another_base_is_refused_before_anything_is_replaced() -> None:
    refused: list[tuple[Any, Any, Any, str]] = [
        # gate, up and down of two layers, of which three are named
        (partial(llama, intermediate_size=64), llama, {}, "32 → 64, not 32 → 48.*and 3 more"),
        (llama, ONE_MORE, {}, "no module 'model.layers.2.self_attn.q_proj'"),
        (partial(changed, UP, nn.Bilinear(1, 1, 1)), llama, {}, f"'{UP}' is a Bilinear"),
        # What such an embedding computes nobody here knows; a layout may have one (OPT's positions).
        (partial(changed, TOKENS, Doubled(64, 32)), llama, {}, LOOKS),
        (partial(changed, TOKENS, nn.Embedding(64, 32, max_norm=1.0)), llama, {}, LOOKS),
        (lambda: llama().bfloat16(), llama, {}, r"LoaderConfig\(dtype='bfloat16'\)"),
        (llama, llama, {"dtype": "float16"}, r"LoaderConfig\(dtype='float32'\)"),
        (lambda: llama().double(), llama, {}, "float64"),
        (lambda: llama().to("meta"), llama, {}, "the model is on meta"),
    ]
    for model, layout_of, settings, problem in refused:
        made, config = model(), LoaderConfig(**{"device_bytes": 1 << 20} | settings)
        async with AdapterLoader(layouts.from_module(layout_of()), config) as loader:
            before = {name: vars(module).copy() for name, module in made.named_modules()}
            with pytest.raises(ConfigError, match=problem):
                attach(made, loader)
            assert {name: vars(module) for name, module in made.named_modules()} == before


def anatomy(model: Any) -> list[object]:
    """Everything of a model that could change, by identity where there is one."""
    modules = [(name, id(m), type(m), vars(m).copy()) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()]
    return [modules, parameters, list(model.state_dict()), [m.training for m in model.modules()]]


async def test_names_parameters_and_hooks_stay_while_attached_and_all_else_after() -> None:
    model = llama(tie_word_embeddings=True)
    expected = logits_of(model, prompt(2))
    seen: list[torch.Size] = []
    linear = model.get_submodule(UP)
    linear.register_forward_hook(lambda _, __, y: seen.append(y.shape))
    before = anatomy(model)
    async with serving(model) as (loader, attached):
        assert anatomy(model)[1:] == before[1:]
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with attached.batch(None):
            logits_of(model, prompt(2))
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(UsageError, match="detach first"):
                copied(model.lm_head.forward)
        with pytest.raises(UsageError, match="already"):
            attach(model, loader)
        with attached.batch([None]):
            with pytest.raises(UsageError, match="open on this model: 1"):
                attached.detach()
            with pytest.raises(UsageError, match="in a batch of 1"):
                logits_of(model, prompt(2))  # still attached
        attached.detach()
        assert anatomy(model) == before
        attached.detach()
        with pytest.raises(UsageError, match="detached"), attached.batch(None):
            pass
        attach(model, loader).detach()
    assert anatomy(model) == before
    assert torch.equal(logits_of(model, prompt(2)), expected)
    assert seen == [torch.Size([2, 5, 48])] * 2


async def test_a_forward_of_others_is_kept_and_called(small: Any, monkeypatch: Patch) -> None:
    linear = small.model.layers[0].self_attn.q_proj
    wrapped = Mock(side_effect=linear.forward)
    monkeypatch.setattr(linear, "forward", wrapped)
    async with serving(small) as (_, attached):
        with attached.batch(None):
            logits_of(small, prompt(1))
        ours = linear.forward
        linear.forward = wrapped
        with pytest.raises(UsageError, match="replaced after attach"):
            attached.detach()
        linear.forward = ours
    assert linear.forward is wrapped
    assert [call.args[0].shape for call in wrapped.mock_calls] == [torch.Size([1, 5, 32])]


async def test_each_row_has_its_own_adapter(small: Any, served: Served) -> None:
    """A row's logits do not depend on its neighbours' adapters; base rows keep their bits."""
    attached, first, second = served.attached, served.first, served.second
    with pytest.raises(UsageError, match=r"attached\.batch"):
        logits_of(small, prompt(1))
    with attached.batch(None):  # any number of rows
        base = [logits_of(small, prompt(count)) for count in (1, 3)][1]
    with attached.batch([first, first, first]):
        only_first = logits_of(small, prompt(3))
        with attached.batch([second, second, second]):
            only_second = logits_of(small, prompt(3))
        assert torch.equal(logits_of(small, prompt(3)), only_first)
    with attached.batch([second, None, first]):
        mixed = logits_of(small, prompt(3))
        for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with grad():
                assert torch.equal(small(**prompt(3)).logits, mixed)
    assert torch.equal(mixed[1], base[1])
    torch.testing.assert_close(mixed[0], only_second[0])
    torch.testing.assert_close(mixed[2], only_first[2])
    assert (only_first - only_second).abs().max() > 0.01
    served.attached.detach()
    assert torch.equal(logits_of(small, prompt(3)), base)


async def test_a_mixed_batch_generates_what_its_rows_do_alone(small: Any, served: Served) -> None:
    """The head gets the last tokens only, which do not lie side by side in memory."""

    def tokens(rows: slice) -> list[list[int]]:
        inputs = prompt(3)["input_ids"][rows]
        listed: list[list[int]] = small.generate(inputs, max_new_tokens=6, do_sample=False).tolist()
        return listed

    batch, alone = [served.first, None, served.second], []
    for row, handle in enumerate(batch):
        with served.attached.batch([handle]):
            alone += tokens(slice(row, row + 1))
    with served.attached.batch(batch):
        assert tokens(slice(None)) == alone
    with served.attached.batch(None):
        assert tokens(slice(None)) != alone


async def test_another_number_of_rows_is_refused(small: Any, served: Served) -> None:
    for count in (1, 3):
        for batch in ([served.second, None], [None, None]):
            said = f"{count} rows in a batch of 2"
            with served.attached.batch(batch), pytest.raises(UsageError, match=said):
                logits_of(small, prompt(count))
    with served.attached.batch([served.first]):
        out = small.generate(**prompt(1), max_new_tokens=4, do_sample=False)
        assert out.shape == (1, 9)
        for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(UsageError, match="2 rows in a batch of 1"):
                small.generate(**prompt(1), max_new_tokens=4, **more)


async def test_what_would_miss_the_adapter_or_round_is_refused(
    small: Any, served: Served, monkeypatch: Patch
) -> None:
    """A gradient, autocast, and a module that returns its own input: read where it is written."""
    with served.attached.batch([served.first]):
        loss = small(**prompt(1)).logits.sum()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="autocast"):
            logits_of(small, prompt(1))
    with pytest.raises(UsageError, match="gradient"):
        loss.backward()
    small.zero_grad(set_to_none=True)
    served.attached.detach()
    name = "model.layers.0.self_attn.q_proj"
    monkeypatch.setattr(small.get_submodule(name), "forward", lambda x: x)
    refused = pytest.raises(UsageError, match=f"{name}.* y and x in memory of their own")
    with attach(small, served.loader) as attached, attached.batch([served.first]), refused:
        logits_of(small, prompt(1))


async def test_rows_are_own_open_handles(small: Any, adapters: list[Path], served: Served) -> None:
    served.attached.detach()
    async with serving(small) as (loader, attached), await loader.load(adapters[0]) as kept:
        released = await loader.load(adapters[1])
        released.release()
        refused: list[tuple[Any, type[Exception], str]] = [
            ([None, served.first], UsageError, "row 1: .* is another loader's"),
            (["adapter"], UsageError, "row 0 is a str"),
            ([], UsageError, "at least one row"),
            ([kept, released], HandleClosedError, "."),
        ]
        for batch, kind, why in refused:
            with pytest.raises(kind, match=why), attached.batch(batch):
                pass
        attached.detach()  # no batch is open
        kept.release()
        await loader.close(timeout=5)


async def test_rows_of_a_false_adapter_fail_and_others_go_on(small: Any, adapters: Paths) -> None:
    source, promised = FakeSource(), "not what was promised"
    for name, folder in zip(("a", "b"), adapters, strict=False):
        source.put(name, *tiny.files(folder))
    source.hold_verification("a")
    async with serving(small, source=source) as (loader, attached), await loader.load("b") as good:
        false = await loader.load("a")
        with attached.batch([None, good, false]):
            before = await asyncio.to_thread(logits_of, small, prompt(3))
            told_false(source)
            for call in (false.verified(), asyncio.to_thread(logits_of, small, prompt(3))):
                await fails(call, IntegrityError, promised)
        with pytest.raises(IntegrityError, match=promised), attached.batch([None, good, false]):
            await asyncio.to_thread(logits_of, small, prompt(3))
        with attached.batch([None, good, None]):
            after = await asyncio.to_thread(logits_of, small, prompt(3))
        assert torch.equal(after[:2], before[:2])
        assert not torch.equal(after[2], before[2])
        false.release()
        await until(lambda: state(loader, "a") == "nowhere")


async def test_the_same_rows_have_one_plan(small: Any, adapters: Paths, monkeypatch: Patch) -> None:
    made: list[tuple[int, ...]] = []
    original = Plan.from_segments.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Plan], /, bounds: Any, slots: Any, **more: Any) -> Plan:
        made.append(tuple(slots))
        plan: Plan = original(cls, bounds, slots, **more)
        return plan

    monkeypatch.setattr(Plan, "from_segments", classmethod(noted))
    async with serving(small, max_slots=1) as (loader, attached):
        for adapter in (adapters[0], adapters[0], adapters[1], adapters[0]):
            async with await loader.load(adapter) as handle:
                for _ in range(2):
                    with attached.batch([handle, None]):
                        seen = logits_of(small, prompt(2))
                    with attached.batch([handle, None], budget=1.0):
                        assert torch.equal(seen, logits_of(small, prompt(2)))
        assert made == [(0, -1)] * 3  # the slot has three tenants, one after the other
        async with await loader.load(adapters[0]) as handle:
            for rows in [[handle] * count for count in range(1, 7)] + [[handle]]:
                with attached.batch(rows):
                    logits_of(small, prompt(len(rows)))
        assert len(made) == 3 + 7  # the one that was used longest ago has gone


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


async def test_a_batch_shrinks_once_for_each_input(tmp_path: Path) -> None:
    """Two layers of seven modules: 14 shrinks in a first pass, 8 where it pays to have fewer."""
    small = llama().bfloat16()
    adapter = save(llama(), EVERY, tmp_path / "every")

    def counted() -> tuple[int, torch.Tensor]:
        products = Products()
        with products:
            logits = logits_of(small, prompt(2))
        return products.count["aten.mm.out"] + products.count["aten.mm.default"], logits

    async with adapted(small, adapter, dtype="bfloat16") as (attached, handle):
        with attached.batch([handle, handle]):
            (first, logits), _, (third, again) = counted(), counted(), counted()
        with attached.batch([None, None]):
            _, base = counted()
    assert first - third == 6
    torch.testing.assert_close(again, logits)
    assert (again - base).abs().max() > 10 * (again - logits).abs().max()


async def test_tasks_and_threads_have_batches_of_their_own(small: Any, served: Served) -> None:
    together = threading.Barrier(2)

    def forward() -> list[torch.Tensor]:
        together.wait(10)
        return [logits_of(small, prompt(1)) for _ in range(20)]

    async def one(handle: Any) -> list[torch.Tensor]:
        with served.attached.batch([handle]):
            return await asyncio.to_thread(forward)

    handles = (served.first, served.second)
    seen = await asyncio.gather(*map(one, handles))
    for handle, logits in zip(handles, seen, strict=True):
        with served.attached.batch([handle]):
            expected = logits_of(small, prompt(1))
        assert all(torch.equal(each, expected) for each in logits)
    assert not torch.equal(seen[0][0], seen[1][0])


async def test_a_bare_thread_needs_the_context(small: Any, served: Served) -> None:
    loop, forward = asyncio.get_running_loop(), partial(logits_of, small, prompt(1))
    with ThreadPoolExecutor(1) as pool, served.attached.batch([served.first]):
        expected = forward()
        await fails(loop.run_in_executor(pool, forward), UsageError, "copy_context")
        run = contextvars.copy_context().run
        assert torch.equal(await loop.run_in_executor(pool, run, forward), expected)


async def test_a_pass_that_outlives_its_block_stops_and_then_frees_its_adapter(
    small: Any, adapters: Paths, monkeypatch: Patch
) -> None:
    """Which goes on in its thread when a task that awaits `asyncio.to_thread` is cancelled."""
    inside, go_on = threading.Event(), threading.Event()
    linear = small.model.layers[1].self_attn.q_proj
    base: Callable[[torch.Tensor], torch.Tensor] = linear.forward

    def slow(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert go_on.wait(10)
        return base(x)

    monkeypatch.setattr(linear, "forward", slow)
    async with serving(small, max_slots=1) as (loader, attached):
        handle = await loader.load(adapters[0])
        with attached.batch([handle]):
            go_on.set()
            expected = logits_of(small, prompt(1))
            handle.release()
            waiting = asyncio.create_task(loader.load(adapters[1]))
            await asyncio.wait([waiting], timeout=0.1)
            assert torch.equal(logits_of(small, prompt(1)), expected)
            assert not waiting.done()
            inside.clear()
            go_on.clear()
            forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            await asyncio.to_thread(inside.wait, 10)
            late = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
        await fails(late, UsageError, "block of this batch was left")
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()  # the linear still reads the first adapter's bytes
        go_on.set()
        await fails(forward, UsageError, "block of this batch was left")
        async with asyncio.timeout(10), await waiting as other:
            with attached.batch([other]):
                assert not torch.equal(logits_of(small, prompt(1)), expected)
