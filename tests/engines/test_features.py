"""Biases, magnitudes, embeddings and tensors of a training loop: tiny models answer as PEFT's."""

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import peft_adapters as variants
import pytest
import tiny
import torch
import transformers
from event_loops import until
from late_device.world import LATE, bytes_now, loaded, new_stream
from peft import LoraConfig, get_peft_model_state_dict
from peft_adapters import adapted, llama, logits_of, logits_with, pefts, prompt, save, serving
from safetensors.torch import load_file, save_file
from tiny import assert_same, weights_of
from torch import nn

from engines.conftest import watched
from lorax_async import layouts
from lorax_async.config import LoaderConfig, Shard
from lorax_async.engines.batch import AdaptedModule, DoraFactors
from lorax_async.engines.transformers import attach
from lorax_async.errors import AdapterFormatError, UsageError
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import Module, Parallelism
from lorax_async.testing import FakeSource

Patch = pytest.MonkeyPatch

pytestmark = [pytest.mark.filterwarnings(variants.FEATURE_WARNINGS)]

WEIGHTS = "adapter_model.safetensors"
DORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
PLAIN = {**DORA, "use_dora": False}
BIAS = {**PLAIN, "lora_bias": True}
TOKENS = {"r": 4, "target_modules": ["embed_tokens"]}
CONV = {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}


def gpt2() -> Any:
    """Its weights are `[in, out]`, its linear modules have biases."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model: Any = transformers.GPT2LMHeadModel(config)
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
    return model


def gemma() -> Any:
    """Its embedding multiplies what it looks up by √32."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(2)
    config = transformers.Gemma3TextConfig(**sizes, **heads, num_hidden_layers=2)
    model: Any = transformers.Gemma3ForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (gpt2, CONV),
        (gpt2, {**CONV, "use_dora": True}),
        (gpt2, {**CONV, "lora_bias": True}),
        (gpt2, {"r": 4, "target_modules": ["wte"]}),
        (gpt2, {"r": 4, "target_modules": ["wte"], "use_dora": True}),
        (gemma, TOKENS),
        (gemma, {**TOKENS, "use_dora": True}),
        (llama, {**DORA, "target_modules": "all-linear", "use_rslora": True}),
    ],
)
def test_logits_are_pefts(make: Callable[[], Any], lora: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    adapter = save(model, lora, tmp_path / "adapter")
    inputs = prompt(2) | {"attention_mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])}
    expected = pefts(model, adapter, inputs)
    assert (expected - logits_of(model, inputs)).abs().max() > 1e-3
    assert torch.equal(asyncio.run(logits_with(model, adapter, inputs)), expected)


async def test_positions_of_one_row_are_pefts_and_of_more_are_refused(tmp_path: Path) -> None:
    """GPT-2 looks the positions up once for all rows: nobody can say whose they are."""
    model = gpt2()
    adapter = save(model, {"r": 4, "target_modules": ["wpe"]}, tmp_path / "adapter")
    other = save(model, {"r": 4, "target_modules": ["wte"]}, tmp_path / "other")
    expected = pefts(model, adapter, prompt(1))
    assert torch.equal(await logits_with(model, adapter, prompt(1)), expected)
    with pytest.raises(UsageError, match=r"'transformer.wpe' got .*\[1, 5\].* batch of 2 cannot"):
        await logits_with(model, adapter, prompt(2))
    assert (await logits_with(model, other, prompt(2))).shape == (2, 5, 64)
    async with adapted(model, other) as (attached, handle):
        with attached.batch([handle]), pytest.raises(UsageError, match=r"\[rows, tokens\] only"):
            logits_of(model, prompt(2))


@pytest.mark.parametrize("lora", [DORA, BIAS, TOKENS])
async def test_bf16_is_as_near_as_pefts(lora: dict[str, Any], tmp_path: Path, small: Any) -> None:
    """PEFT keeps A and B in float32 there, which are rounded here; magnitudes are not."""
    adapter = save(llama(), lora, tmp_path / "adapter")
    exact = pefts(llama(), adapter, prompt(2))
    theirs = pefts(llama().bfloat16(), adapter, prompt(2))
    ours = await logits_with(llama().bfloat16(), adapter, prompt(2))
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 1.5 * (theirs.float() - exact).norm()
    async with adapted(small, adapter) as (attached, handle):
        autocast, refused = torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError)
        with attached.batch([handle]), autocast, refused as caught:
            logits_of(small, prompt(1))
        assert "autocast" in str(caught.value)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
async def test_one_grad_modes_measures_serve_all(grad: Any, small: Any, tmp_path: Path) -> None:
    adapter = save(llama(), {**DORA, "target_modules": ["embed_tokens", "q_proj"]}, tmp_path / "x")
    async with adapted(small, adapter) as (attached, handle):
        with attached.batch([handle, None]):
            with grad():
                first = small(**prompt(2)).logits.detach().clone()
            assert torch.equal(logits_of(small, prompt(2)), first)
            with torch.enable_grad():
                loss = small(**prompt(2)).logits.sum()
        with pytest.raises(UsageError, match="gradient"):
            loss.backward()
    small.zero_grad(set_to_none=True)


async def test_rows_are_measured_once(small: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    first = save(llama(), DORA, tmp_path / "first")
    second = save(llama(), {**DORA, "r": 6}, tmp_path / "second")
    expected = [pefts(llama(), adapter, prompt(2)) for adapter in (first, second)]
    norms, measured = watched(monkeypatch, torch.linalg, "norm"), list[int]()
    async with serving(small, max_slots=1) as (loader, attached):
        for turn in range(4):
            async with await loader.load((first, second)[turn % 2]) as handle:
                for _ in range(3):
                    with attached.batch([handle, handle]):
                        logits = await asyncio.to_thread(logits_of, small, prompt(2))
                    assert torch.equal(logits, expected[turn % 2])
            measured.append(len(norms))
        handle = await loader.load(first)
        with attached.batch([handle, handle]):
            handle.release()  # which inside of a block takes no vectors away
            assert torch.equal(logits_of(small, prompt(2)), expected[0])
    assert [*measured, len(norms)] == [4, 8, 12, 16, 20]  # q and down of two layers


def test_factors_are_there_when_they_are_known_and_forgotten_with_their_stay() -> None:
    class Stay:
        """In place of a stay's vectors, by which factors are known."""

    for _ in loaded():
        module = Module("layers.0.q", 4, 6, 0, Parallelism.COLUMN)
        a, b = torch.zeros(2, 4, device=LATE), torch.zeros(6, 2, device=LATE)
        base = nn.Linear(4, 6).to(LATE)
        nn.init.ones_(base.weight)
        magnitude = torch.full((6,), 4.0, device=LATE)
        factors, adapted, stay = DoraFactors(), AdaptedModule(base, module, 0), Stay()
        known: Any = stay
        torch.accelerator.current_stream(LATE).synchronize()  # what the factors are made of
        with new_stream():
            first = factors.of(known, magnitude, (a, b, 1.0), adapted)
            assert bytes_now(first) == set(torch.tensor([2.0]).view(torch.uint8).tolist())
        assert factors.of(known, magnitude, (a, b, 1.0), adapted) is first
        factors.forget()
        second = factors.of(known, magnitude, (a, b, 1.0), adapted)
        assert second is not first
        kept = ref(second)
        del second, known, stay
        gc.collect()
        assert kept() is None


@pytest.mark.parametrize("lora", [DORA, {**TOKENS, "use_dora": True}], ids=["linear", "embedding"])
async def test_layers_are_computed_as_they_come(small: Any, tmp_path: Path, lora: Any) -> None:
    adapter = save(llama(), lora, tmp_path / "adapter")
    expected, source = pefts(llama(), adapter, prompt(1)), FakeSource()
    source.put("streamed", *tiny.files(adapter))
    source.hold("streamed")
    computed = list[int]()
    hook = small.model.layers[0].register_forward_hook(lambda *_: computed.append(0))
    async with serving(small, source=source) as (it, attached), it.stream("streamed") as handle:
        with attached.batch([handle]):
            if lora is not DORA:
                with pytest.raises(UsageError, match="to_thread"):
                    logits_of(small, prompt(1))
            forward = asyncio.create_task(asyncio.to_thread(logits_of, small, prompt(1)))
            if lora is DORA:
                source.allow("streamed", 0)
                await until(lambda: computed)
            await asyncio.wait([forward], timeout=0.1)
            assert not forward.done()
            assert len(computed) == (lora is DORA)
            source.allow("streamed")
            assert torch.equal(await forward, expected)
    hook.remove()


WORLD = 2
UP = "model.layers.1.mlp.up_proj"


def share(rank: int) -> Any:
    """A rank's part of `llama`, cut as Megatron-LM cuts; the head is whole."""
    model = llama()
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        by_columns = name.endswith(("o_proj", "down_proj"))
        piece = linear.weight.detach().chunk(WORLD, int(by_columns))[rank]
        linear.weight = nn.Parameter(piece.clone())
        linear.out_features, linear.in_features = piece.shape
    return model


async def output(rank: int, adapter: Path, x: torch.Tensor) -> torch.Tensor:
    layout = layouts.from_module(llama()).replicate("lm_head")
    config = LoaderConfig(device_bytes=1 << 20, shard=Shard(rank, WORLD))
    model = share(rank)
    async with AdapterLoader(layout, config) as loader:
        with attach(model, loader) as attached:
            async with await loader.load(adapter) as handle:
                with attached.batch([handle]), torch.no_grad():
                    made: torch.Tensor = model.get_submodule(UP)(x)
    return made


@pytest.mark.parametrize("feature", [{"use_dora": True}, {"lora_bias": True}])
async def test_a_rank_has_features_of_rows_and_of_no_sum(feature: Any, tmp_path: Path) -> None:
    """Column-parallel: together the ranks' outputs are PEFT's.

    Row-parallel: each rank would add the bias, and measure its part of the rows only.
    """
    lora = {"r": 4, "target_modules": ["up_proj", "k_proj"], **feature}
    adapter = save(llama(), lora, tmp_path / "adapter")
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with variants.active(llama(), only=adapter) as theirs, torch.no_grad():
        expected = theirs.base_model.model.get_submodule(UP)(x)
    made = [await output(rank, adapter, x) for rank in range(WORLD)]
    torch.testing.assert_close(torch.cat(made, -1), expected)
    row = save(llama(), {**lora, "target_modules": ["up_proj", "down_proj"]}, tmp_path / "row")
    with pytest.raises(UsageError, match=r"'model.layers.0.mlp.down_proj', of which Shard\(rank=1"):
        await output(1, row, x)


class Packed(nn.Linear):
    """As a quantised linear: its weight is packed in integers."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.scale = plain.weight.detach().abs().max() / 127
        packed = (plain.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


class Told(torch.Tensor):
    """As torchao's: it says that it is floating-point."""


def subclass_weight(linear: nn.Linear) -> nn.Module:
    weight = linear.weight.detach().as_subclass(Told)
    del linear.weight
    linear.weight = weight
    return linear


@pytest.mark.parametrize("pack", [Packed, subclass_weight])
async def test_dora_on_packed_weights_is_refused_and_lora_is_not(pack: Any, tmp_path: Path) -> None:
    model = llama()
    dora, plain = save(model, DORA, tmp_path / "dora"), save(model, PLAIN, tmp_path / "plain")
    model.model.layers[1].mlp.down_proj = pack(model.model.layers[1].mlp.down_proj)
    assert (await logits_with(model, plain, prompt(1))).isfinite().all()
    with pytest.raises(UsageError, match=r"'model.layers.1.mlp.down_proj' is a .*plain weights"):
        await logits_with(model, dora, prompt(1))


MAGNITUDE = "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_a_load_of_magnitudes_that_are_no_numbers_is_refused(
    device: str, small: Any, tmp_path: Path
) -> None:
    adapter = save(llama(), DORA, tmp_path / "adapter")
    made = load_file(adapter / WEIGHTS)
    made[MAGNITUDE][3] = torch.nan
    save_file(made, adapter / WEIGHTS)
    async with serving(small, device=device, check_finite=True) as (loader, _):
        with pytest.raises(AdapterFormatError, match="'model.*1.mlp.down_proj' has NaN or infin"):
            await loader.load(adapter)


PATTERNS: Any = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# In the order of the config, as the live model has it, the first that matches counts.
PATTERNS |= {"rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn.*": 3}}
PATTERNS |= {"alpha_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 1}}
SMALL = ("every_linear", "rslora", "dora", "lora_bias", "embedding_and_all", "dora_embedding")
LORAS: Any = {name: variants.VARIANTS[name].lora for name in SMALL} | {"patterns": PATTERNS}


@pytest.mark.parametrize("name", LORAS)
async def test_it_answers_as_the_live_model_and_as_its_file(tmp_path: Path, name: str) -> None:
    model, inputs = llama(), prompt(2)
    with variants.wrapped(llama(), LORAS[name], seed=5) as live:
        given = get_peft_model_state_dict(live, save_embedding_layers=False)
        config: LoraConfig = live.peft_config["default"]
        expected = logits_of(live.eval(), inputs)
        live.save_pretrained(tmp_path, save_embedding_layers=False)
    async with serving(model) as (it, attached), await it.load_tensors("x", given, config) as x:
        with attached.batch([x] * 2):
            logits = await asyncio.to_thread(logits_of, model, inputs)
        if name != "patterns":  # PEFT sorts them when it saves: its own file does not load
            async with await it.load(tmp_path) as twin:
                assert_same(weights_of(x), weights_of(twin))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(logits, logits_of(model, inputs), atol=1e-3)
    if name == "every_linear":
        for rank in range(2):
            settings = LoaderConfig(shard=Shard(rank, 2), dtype="bfloat16")
            loader = AdapterLoader(layouts.from_module(model), settings)
            pushed = loader.load_tensors("policy", given, config)
            async with loader, await pushed as handle, await loader.load(tmp_path) as twin:
                assert_same(weights_of(handle), weights_of(twin))
                assert handle.nbytes == twin.nbytes
