"""Rows that are computed beside others are what each would be alone, as PEFT and transformers say."""

import asyncio
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from decode_world import all_of, generate
from event_loops import until
from peft_adapters import PEFT_WARNING, active, logits_of, serving, streaming
from transformers import PreTrainedConfig

from engines.conftest import watched
from lorax_async.engines.transformers import AttachedModel
from lorax_async.errors import AdapterTimeoutError, ConfigError, FetchError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.scheduler.scheduler import AdapterScheduler
from lorax_async.server.engine import (
    DecoderStep,
    Engine,
    Sampler,
    Sampling,
    SequencePart,
    StepResult,
    choose,
)
from lorax_async.server.transformers_decoder import BLOCK, KVCache, TransformersDecoder
from lorax_async.testing import FakeSource

Patch = pytest.MonkeyPatch
Paths = list[Path]

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)
PLAYS = [("sdpa", 1), ("sdpa", 2), ("eager", 0), ("eager", 1), ("eager", 2)]

Solo = Callable[[str | None, Sequence[int]], torch.Tensor]
"""Logits after these tokens, computed alone with the adapter of that name."""


@dataclass(eq=False)
class Row:
    """What a decoder was given of a sequence so far, and what it will be given."""

    number: int
    name: str | None
    handle: AdapterHandle | None
    tokens: list[int]
    computed: int = 0

    @property
    def wants(self) -> int:
        return len(self.tokens) - self.computed

    def part(self, count: int) -> SequencePart:
        tokens = self.tokens[self.computed : self.computed + count]
        return SequencePart(self.number, self.computed, tokens, self.handle)


def row(number: int, length: int, name: str | None = None, handle: Any = None) -> Row:
    return Row(number, name, handle, list(range(number + 1, number + 1 + length)))


@dataclass(eq=False)
class Play:
    decoder: TransformersDecoder
    solo: Solo
    atol: float = 2e-5

    async def step(self, *rows: tuple[Row, int], budget: float = 0.0) -> StepResult:
        """Compute this many tokens of each; a row that is complete gets the likeliest next one."""
        step = DecoderStep([one.part(count) for one, count in rows], budget, lambda: False)
        computed = await asyncio.to_thread(self.decoder.compute, step)
        for number, (one, count) in enumerate(rows):
            if number in computed.out:
                one.computed = 0
                continue
            one.computed += count
            expected = self.solo(one.name, one.tokens[: one.computed])
            torch.testing.assert_close(computed.logits[number], expected, atol=self.atol, rtol=1e-4)
            assert computed.logits[number].argmax() == expected.argmax()
            if not one.wants:
                one.tokens.append(int(expected.argmax()))
        return computed

    async def whole(self, *rows: Row, budget: float = 0.0) -> StepResult:
        return await self.step(*((one, one.wants) for one in rows), budget=budget)


@contextmanager
def alone(model: Any, **adapters: Path) -> Iterator[Solo]:
    with active(model, **adapters) as peft_model:

        def solo(name: str | None, tokens: Sequence[int]) -> torch.Tensor:
            inputs = {"input_ids": torch.tensor([list(tokens)])}
            if name is None:
                with peft_model.disable_adapter():
                    return logits_of(peft_model, inputs)[0, -1]
            peft_model.set_adapter(name)
            return logits_of(peft_model, inputs)[0, -1]

        yield solo


def base_alone(model: Any) -> Solo:
    return lambda _, tokens: logits_of(model, {"input_ids": torch.tensor([list(tokens)])})[0, -1]


@pytest.mark.parametrize(
    ("attention", "seed"),
    [("sdpa", 0), *(pytest.param(*play, marks=pytest.mark.slow) for play in PLAYS)],
)
async def test_rows_are_solo_runs(small: Any, adapters: Paths, attention: str, seed: int) -> None:
    """Prompts whole or in parts beside rows that decode; rows come, go, move and begin again."""
    small = copy.deepcopy(small)
    small.set_attn_implementation(attention)
    shuffled, there, lengths = random.Random(seed), list[Row](), set[int]()
    with alone(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as solo:
        small.lm_head.register_forward_hook(lambda _, __, y: lengths.add(y.shape[1]))
        async with (
            serving(small) as (loader, attached),
            await loader.load(adapters[0]) as most,
            await loader.load(adapters[1]) as some,
        ):
            handles = {"most": most, "some": some, None: None}
            play = Play(TransformersDecoder(small, attached, 4), solo)
            for number in range(60):
                if len(there) < 4 and shuffled.random() < 0.5:
                    name = shuffled.choice(["most", "some", None])
                    length = shuffled.choice([1, 3, 3, 7, 70])
                    there.append(
                        Row(number, name, handles[name], shuffled.choices(range(64), k=length))
                    )
                rows = shuffled.sample(there, shuffled.randint(0, len(there)))
                if rows:
                    await play.step(*((one, shuffled.choice([one.wants, 1])) for one in rows))
                for one in tuple(there):
                    if shuffled.random() < 0.1:
                        there.remove(one)
                        play.decoder.forget(one.number)
                    elif shuffled.random() < 0.05:
                        one.computed = 0
    assert lengths == {1}, "of a whole batch, last tokens alone have heads"


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"intermediate_size": 48, "pad_token_id": 0}


def made(config: PreTrainedConfig) -> Any:
    torch.manual_seed(5)
    auto: Any = transformers.AutoModelForCausalLM  # untyped in transformers
    return auto.from_config(config).eval()


@pytest.mark.parametrize("name", ["GPT2", "Qwen2", "Qwen3", "Gemma"])
async def test_models_of_several_families_are_decoded(name: str) -> None:
    old = {"intermediate_size", "num_key_value_heads", "head_dim", "pad_token_id"}
    sizes = {key: size for key, size in SIZES.items() if name != "GPT2" or key not in old}
    config: Any = getattr(transformers, f"{name}Config")
    model = made(config(**sizes, bos_token_id=1, eos_token_id=2))
    base = copy.deepcopy(model)
    async with serving(model) as (_, attached):
        play = Play(TransformersDecoder(model, attached, 3), base_alone(base))
        rows = [row(n, n + 2) for n in range(3)]
        await play.step((rows[0], 2), (rows[2], 3))
        await play.step((rows[0], 1), (rows[1], 3), (rows[2], 1))
        for _ in range(3):
            await play.whole(*rows)


async def test_what_was_at_a_place_never_matters(small: Any) -> None:
    """Not even keys and values that are NaN: beside a longer row they are masked."""
    broken = copy.deepcopy(small)
    async with serving(broken) as (_, attached):
        decoder = TransformersDecoder(broken, attached, 2)
        play, long, short = Play(decoder, base_alone(small)), row(0, 40), row(2, 3)
        await play.whole(long)
        weight = broken.model.layers[0].self_attn.v_proj.weight
        sound = weight.clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        computed = decoder.compute(DecoderStep([row(1, 30).part(30)], 0.0, lambda: False))
        assert computed.logits.isnan().all()
        with torch.no_grad():
            weight.copy_(sound)
        decoder.forget(1)
        await play.whole(short)
        for _ in range(3):
            await play.step((short, 1), (long, 1))
        assert decoder.sequences == 2


async def test_late_rows_begin_again(small: Any, adapters: list[Path], source: FakeSource) -> None:
    """No prompt is waited for by those that decode, though it is alone in its pass."""
    with alone(copy.deepcopy(small), warm=adapters[2], cold=adapters[0]) as solo:
        async with streaming(small, source) as (attached, warm, cold):
            decoder = TransformersDecoder(small, attached, 4)
            play = Play(decoder, solo)
            source.allow("cold", 0)
            await cold.layer_ready(0)
            fast, base = row(0, 5, "warm", warm), row(1, 5)
            late, longer = row(2, 5, "cold", cold), row(3, 7, "cold", cold)
            computed = await play.whole(late, fast, base, budget=0.01)
            assert {n: type(each) for n, each in computed.out.items()} == {0: AdapterTimeoutError}
            assert decoder.sequences == 2
            computed = await play.step((longer, 7), (fast, 1), budget=0.01)
            assert set(computed.out) == {0}
            assert "the pass had waited 0.01 s" in str(computed.out[0])
            source.allow("cold")
            await cold.layer_ready(cold.layers[-1])
            for _ in range(3):
                assert not (await play.whole(late, base, fast, budget=0.01)).out


async def test_passes_share_one_budget(small: Any, source: FakeSource, monkeypatch: Patch) -> None:
    passes = watched(monkeypatch, AttachedModel, "batch")
    async with streaming(small, source) as (attached, warm, cold):
        decoder = TransformersDecoder(small, attached, 3)
        rows = (row(1, 4, "cold", cold), row(0, 3, "warm", warm), row(2, 5, "cold", cold))
        step = DecoderStep([each.part(each.wants) for each in rows], 0.02, lambda: False)
        computed = await asyncio.to_thread(decoder.compute, step)
        assert set(computed.out) == {0, 2}
    assert [each.args[2] for each in passes] == [
        0.02,
        0.02,
        0.0,
    ]  # who is there first; then one waits, and one no more


def rope(kind: str) -> PreTrainedConfig:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0}
    if kind == "longrope":
        parameters |= {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
        parameters["original_max_position_embeddings"] = 32
    return transformers.LlamaConfig(**SIZES, rope_parameters=parameters, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.MistralConfig(**SIZES, sliding_window=8), "DynamicSlidingWindowLayer"),
        (transformers.Qwen3NextConfig(**SIZES, num_experts=0), "LinearAttention"),
        (transformers.BertConfig(**SIZES), "attend to later ones"),
        (rope("dynamic"), "rope_type is dynamic"),
        (rope("longrope"), "rope_type is longrope"),
    ],
)
def test_models_that_mix_their_rows_are_refused(config: PreTrainedConfig, words: str) -> None:
    attached: Any = None  # it is not looked at
    with pytest.raises(ConfigError, match=words):
        TransformersDecoder(made(config), attached, 4)


def test_numbers_are_limited_by_the_model(small: Any) -> None:
    attached: Any = None
    for sequences, length in ((0, None), (4, 0), (4, 2049)):
        with pytest.raises(ConfigError):
            TransformersDecoder(small, attached, sequences, length)
    with pytest.raises(ConfigError, match="training mode"):
        TransformersDecoder(copy.deepcopy(small).train(), attached, 4)
    decoder = TransformersDecoder(small, attached, 4)
    assert (decoder.max_length, decoder.vocabulary) == (2048, 64)
    assert TransformersDecoder(small, attached, 4, 100).max_length == 100


async def test_steps_that_do_not_follow_change_nothing(small: Any) -> None:
    def step(*parts: tuple[int, int, list[int]]) -> DecoderStep:
        made = [SequencePart(number, start, tokens, None) for number, start, tokens in parts]
        return DecoderStep(made, 0.0, lambda: False)

    async with serving(small) as (_, attached):
        decoder = TransformersDecoder(small, attached, 2)
        decoder.compute(step((0, 0, [1, 2, 3]), (1, 0, [4, 5, 6])))
        with pytest.raises(UsageError, match="goes on at 4, and has 3"):
            decoder.compute(step((0, 4, [1])))
        with pytest.raises(UsageError, match="max_begun"):
            decoder.compute(step((2, 0, [1])))
        assert decoder.sequences == 2
        found = decoder.compute(step((0, 3, [7])))
        with torch.no_grad(), attached.batch(None):
            expected = small(input_ids=torch.tensor([[1, 2, 3, 7]])).logits[:, -1]
        torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-4)
        decoder.forget(1)
        decoder.forget(1)
        decoder.compute(step((2, 0, [1])))


def generated(peft_model: Any, name: str | None, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name is not None:
        peft_model.set_adapter(name)
    with nullcontext() if name else peft_model.disable_adapter():
        found = peft_model.generate(**inputs, max_new_tokens=new, do_sample=False)
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


async def test_answers_are_generates_while_adapters_come(small: Any, adapters: list[Path]) -> None:
    """Those of the first adapter give way to the second's, and are computed again."""
    wanted: list[tuple[str | None, list[int]]] = [
        *((None, [1, 2, 3]), ("most", [1, 2, 3]), ("some", [4, 5])),
        *(("most", list(range(1, 30))), (None, [9]), ("some", [4, 5])),
    ]
    source = FakeSource()
    for name, folder in (("most", adapters[0]), ("some", adapters[1]), ("lost", adapters[1])):
        source.put(name, *tiny.files(folder))
    source.hold("most")
    source.fail("fetch_groups", FetchError("the line is down", retryable=False), id="lost", at=1)
    with active(copy.deepcopy(small), most=adapters[0], some=adapters[1]) as peft_model:
        expected = [generated(peft_model, name, prompt, 8) for name, prompt in wanted]
        expected_long = [generated(peft_model, "most", [n, 2, 3], 24) for n in range(4)]
    begun: Any = {"max_begun": 4}
    async with (
        serving(small, source=source, max_slots=4) as (loader, attached),
        AdapterScheduler(loader, **begun) as scheduler,
    ):
        decoder = TransformersDecoder(small, attached, 4)
        async with Engine(scheduler, decoder, max_tokens=16, max_sequences=4) as engine:
            lost = engine.submit(generate([1, 2], 8, "lost"))
            answers = [engine.submit(generate(prompt, 8, name)) for name, prompt in wanted]
            assert await all_of(answers[0]) == expected[0]  # nobody waits for "most"
            source.allow("most")
            assert await asyncio.gather(*map(all_of, answers[1:])) == expected[1:]
            assert await all_of(lost, FetchError) == []

            answers = [engine.submit(generate([n, 2, 3], 24, "most")) for n in range(4)]
            await until(lambda: all(len(answer.known) > 5 for answer in answers))
            assert await all_of(engine.submit(generate([4, 5], 8, "some"))) == expected[2]
            assert all(len(answer.known) < 3 + 24 for answer in answers)
            assert await asyncio.gather(*map(all_of, answers)) == expected_long
        assert decoder.sequences == 0


def random_logits(seed: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def chances(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """By transformers' own, in vLLM's order."""
    ids: Any = None  # they do not look at it
    scores = transformers.TemperatureLogitsWarper(sampling.temperature)(ids, logits[None])
    if sampling.min_p:
        scores = transformers.MinPLogitsWarper(sampling.min_p)(ids, scores)
    if sampling.top_k:
        scores = transformers.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = transformers.TopPLogitsWarper(sampling.top_p)(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "given",
    [
        *({"top_p": 1e-6}, {"top_p": 0.3}, {"top_p": 0.9}, {}, {"top_k": 1}, {"top_k": 5}),
        *({"top_k": 5, "top_p": 0.7}, {"top_k": 99}, {"min_p": 0.05}, {"min_p": 1.0}),
        {"min_p": 0.1, "top_k": 8, "top_p": 0.9},
    ],
)
def test_tokens_come_as_often_as_transformers_says(temperature: float, given: Any) -> None:
    logits, draws = random_logits(1, 40), 4000
    sampling = Sampling(temperature, **given, seed=5)
    sampler = Sampler(sampling)
    drawn = torch.tensor([sampler.choose(logits) for _ in range(draws)])
    found = torch.bincount(drawn, minlength=40)
    likely = chances(logits, sampling)
    deviation = (draws * likely * (1 - likely)).sqrt()
    # Of tokens that hardly ever come, a few may.
    assert ((found - draws * likely).abs() <= 5 * deviation + 2 * (likely > 0)).all()


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_is_penalized_as_transformers_does(penalty: float) -> None:
    logits, known = random_logits(6, 40), [3, 7, 7, 39, 3]
    processor: Any = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([known]), logits[None].clone())[0]
    Sampler(Sampling(repetition_penalty=penalty)).penalize(logits, known)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_nucleus_of_any_size_is_transformers_own(spread: float) -> None:
    logits = random_logits(2, 20_000, spread)
    for top_p in (0.1, 0.7, 0.99):
        sampler = Sampler(Sampling(1.0, top_p, seed=1))
        allowed = chances(logits, Sampling(1.0, top_p)) > 0
        assert allowed[[sampler.choose(logits) for _ in range(50)]].all()


def test_no_temperature_takes_the_likeliest_and_nothing_of_what_is_no_number() -> None:
    logits = torch.stack([random_logits(3, 50), random_logits(4, 50)])
    samplers = [Sampler(Sampling(temperature=0, top_p=p)) for p in (0.5, 1.0)]
    assert choose(logits, samplers) == logits.argmax(dim=-1).tolist()
    nearly = Sampler(Sampling(temperature=1e-300, seed=1))
    assert nearly.choose(logits[0]) == int(logits[0].argmax())
    logits = torch.stack([random_logits(seed, 50) for seed in range(4)])
    logits[1, 7], logits[2, 8], logits[3, 9] = nan, inf, -inf
    samplers = [Sampler(Sampling(temperature=t)) for t in (0, 0, 1, 0)]
    sound = [int(logits[row].argmax()) for row in (0, 3)]
    assert choose(logits, samplers) == [sound[0], None, None, sound[1]]


@pytest.mark.parametrize("seed", [0, 7, -1, (1 << 63) - 1, -(1 << 63)])
def test_a_seed_says_which_tokens_come_whatever_is_beside_it(seed: int) -> None:
    logits, before = torch.stack([random_logits(n, 50) for n in range(3)]), torch.get_rng_state()

    def alone(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.choose(logits[1]) for _ in range(20)]

    samplers = [Sampler(Sampling()), Sampler(Sampling(seed=seed)), Sampler(Sampling(top_p=0.5))]
    beside = [choose(logits, samplers)[1] for _ in range(20)]
    assert beside == alone(seed) != alone(8)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_out_of_range_is_refused() -> None:
    for name, values in {
        "temperature": (-0.1, nan, inf, "1", True, None, 10**400),
        "top_p": (0, -1, 1.01, nan, "1", None),
        "top_k": (-1, 1.5, True, None),
        "min_p": (-0.1, 1.1, nan, None),
        "repetition_penalty": (0, -1, nan, inf, "1"),
        "seed": (1.5, True, 1 << 63, -(1 << 63) - 1, "1"),
    }.items():
        for value in values:
            with pytest.raises(UsageError, match=name):
                Sampler(Sampling(**{name: value}))  # type: ignore[arg-type]


HEADS, DIM = 2, 3


def filled(kept: KVCache, sequences: list[int], starts: list[int], tokens: int) -> Any:
    kept.begin(sequences, starts, tokens)
    new = torch.tensor(sequences, dtype=torch.float32).view(-1, 1, 1, 1)
    new = new.expand(-1, HEADS, tokens, DIM).clone()
    keys, values = kept.cache.update(new, 2 * new, 0)
    assert torch.equal(values, 2 * keys)
    store = kept.cache.layers[0].keys
    return keys, keys.untyped_storage().data_ptr() != store.untyped_storage().data_ptr()


def test_rows_in_another_order_are_copied_once() -> None:
    kept = KVCache(1, 4, torch.device("cpu"))
    filled(kept, [10, 11, 12], [0, 0, 0], 5)
    _, copied = filled(kept, [10, 11, 12], [5, 5, 5], 1)
    assert not copied
    for start in (6, 7, 8):
        keys, copied = filled(kept, [12, 10], [start, start], 1)
        assert copied == (start == 6)
        assert keys[:, 0, :, 0].tolist() == [[12.0] * (start + 1), [10.0] * (start + 1)]
    keys, _ = filled(kept, [11], [6], 1)
    assert torch.equal(keys, torch.full((1, HEADS, 7, DIM), 11.0))


def test_places_are_as_many_and_as_long_as_were_needed_at_a_time() -> None:
    kept = KVCache(1, 100, torch.device("cpu"))
    for sequence in range(20):
        filled(kept, [sequence], [0], 3)
        if sequence:
            kept.forget(sequence - 1)
    assert kept.cache.layers[0].keys.shape == (2, HEADS, BLOCK, DIM)
    filled(kept, [30], [0], BLOCK + 1)
    store = kept.cache.layers[0].keys
    assert store.shape == (2, HEADS, 2 * BLOCK, DIM)
    assert (store[0, :, BLOCK + 1 :] == 0).all()
    assert len(kept) == 2
