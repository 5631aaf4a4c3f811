"""`lorax-async demo`: load three adapters at once and answer in one batch."""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorax_async import layouts
from lorax_async.cli.demo_remote import ADAPTERS, adapters_in
from lorax_async.cli.load import (
    LoadProgress,
    LoopStall,
    Show,
    create_loads,
    in_ms,
    load_as_json,
    load_at_once,
    run_on_uvloop,
    with_ticker,
)
from lorax_async.cli.serve import serve_commands
from lorax_async.cli.terminal import Terminal, format_ms, format_runs, format_size
from lorax_async.config import LoaderConfig
from lorax_async.engines.smollm2 import BASE_MODEL, prepare_base
from lorax_async.engines.transformers import attach
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout
from lorax_async.types import AdapterRef

PROMPT_TOKENS = 96


def load_base_model(base: str, report: Callable[[str], None]) -> Any:
    """Load a base model from a folder, or "smollm2", in float32. Blocks."""
    folder = prepare_base(progress=report) if base == "smollm2" else Path(base)
    report("loading the base")
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    with without_bars():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in eval mode


async def stream_through(model: Any, loader: AdapterLoader, refs: Sequence[AdapterRef]) -> None:
    """Run one prompt after another, each through its adapter's layers as they become ready."""
    with attach(model, loader) as attached:
        for ref in refs:
            async with loader.stream(ref) as handle:
                with attached.batch([handle]):
                    await asyncio.to_thread(_compute, model)


def _compute(model: Any) -> None:
    import torch  # noqa: PLC0415

    ids = torch.arange(PROMPT_TOKENS).unsqueeze(0) % model.config.vocab_size
    with torch.inference_mode(), _one_torch_thread():
        model(ids, use_cache=False, logits_to_keep=1)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Leave the other cores to the slow link's server and to the copies."""
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


PROMPT = "What is ice?"
"""A prompt of the adapters' training data: the smallest adapter knows little else."""

MAX_NEW_TOKENS = 32
IDLE_SECONDS = 0.25
"""How long the idle loop is measured before the loads; they take about a tenth of that."""

CONFIG = LoaderConfig(dtype="float32", device_bytes=32 << 20, max_slots=len(ADAPTERS))

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DemoReply:
    """The answer of one row; `cut` if it reached `MAX_NEW_TOKENS`."""

    by: str
    text: str
    cut: bool


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The answers and times of a demo.

    `stall` is the loop's longest stall during the loads, `idle` that of the idle loop before them.
    `again_seconds` is the time a second loader of the same process takes to load all three: the
    first load of a process pays for warming up, too.
    """

    adapters: Path
    prompt: str
    answers: tuple[DemoReply, ...]
    loads: tuple[LoadProgress, ...]
    again_seconds: float
    idle: LoopStall
    stall: LoopStall
    prepare_seconds: float
    generate_seconds: float


def run_demo(folder: Path, prompt: str, terminal: Terminal) -> DemoResult:
    """Prepare the base model, then load, attach and generate on a uvloop event loop.

    Raises `ConfigError` if the adapters or the base model are missing, and what a load raises.
    """
    adapters_in(folder)  # fail before the base is loaded
    start = time.perf_counter()
    # Import and load before the loop starts: both block for seconds, and Ctrl-C ends them at once.
    with terminal.steps() as report:
        base = _DemoModel.load(report)
    prepared = time.perf_counter() - start
    return run_on_uvloop(_demo(base, folder, prompt, terminal, prepared))


async def _demo(
    base: _DemoModel, folder: Path, prompt: str, terminal: Terminal, prepared: float
) -> DemoResult:
    paths = adapters_in(folder)
    layout = layouts.from_module(base.model)
    async with AdapterLoader(layout, CONFIG) as loader:
        loads = create_loads(paths)
        try:
            with terminal.bars() as bars:
                _, idle = await with_ticker(asyncio.sleep(IDLE_SECONDS))
                _, stall = await with_ticker(_load(loader, loads, bars.show))
            again = await _load_again(layout, paths)
            start = time.perf_counter()
            with terminal.steps() as report:
                report("four rows, one batch: the base and the three adapters")
                answers = await _answer(base, loader, loads, prompt)
            spent = time.perf_counter() - start
        finally:
            _release(loads)
    return DemoResult(folder, prompt, answers, tuple(loads), again, idle, stall, prepared, spent)


async def _load(loader: AdapterLoader, loads: Sequence[LoadProgress], show: Show) -> None:
    await load_at_once(loader, loads, show, hold=True)
    for load in loads:
        if load.error is not None:
            raise load.error


async def _load_again(layout: ModelLayout, paths: Sequence[Path]) -> float:
    async with AdapterLoader(layout, CONFIG) as loader:
        loads = create_loads(paths)
        await _load(loader, loads, lambda _, __: None)
        _release(loads)
    return max(load.resident or 0.0 for load in loads)


def _release(loads: Sequence[LoadProgress]) -> None:
    for load in loads:
        load.release()


async def _answer(
    base: _DemoModel, loader: AdapterLoader, loads: Sequence[LoadProgress], prompt: str
) -> tuple[DemoReply, ...]:
    rows: list[AdapterHandle | None] = [None, *(load.handle for load in loads)]
    with attach(base.model, loader) as attached, attached.batch(rows):
        answers = await _in_thread(lambda stop: base.answer(prompt, len(rows), stop))
    names = ["base", *(load.name for load in loads)]
    return tuple(
        DemoReply(name, text, cut) for name, (text, cut) in zip(names, answers, strict=True)
    )


async def _in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run `work` in a thread. On cancellation, set its event and wait for its end."""
    stop = threading.Event()
    thread = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([thread])
        raise


@dataclass(frozen=True, slots=True)
class _DemoModel:
    """The base model in fp32, with its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, report: Callable[[str], None]) -> _DemoModel:
        report("preparing the base model")
        folder = prepare_base(progress=report)
        report("importing transformers")
        import torch  # noqa: PLC0415
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

        report(f"loading {BASE_MODEL}")
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder, padding_side="left"))

    def answer(self, prompt: str, rows: int, stop: threading.Event) -> list[tuple[str, bool]]:
        """Answer the prompt greedily in `rows` rows; return each text and whether it was cut."""
        import torch  # noqa: PLC0415
        from transformers import StoppingCriteriaList  # noqa: PLC0415

        def is_stopped(ids: torch.Tensor, _: object, **__: object) -> torch.Tensor:
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        chat = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer([text] * rows, return_tensors="pt", padding=True)
        with _half_of_the_cores():
            out = self.model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([is_stopped]),
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        end = self.tokenizer.eos_token_id
        return [
            (self.tokenizer.decode(row, skip_special_tokens=True).strip(), end not in row)
            for row in new
        ]


@contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """Limit torch to half of the cores: OpenMP's threads spin, and on all cores took 7x as long."""
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable the progress bars that transformers draws on any stderr, even a pipe."""
    logging: Any = importlib.import_module("transformers.utils.logging")  # its switches are untyped

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def show_demo(demo: DemoResult, terminal: Terminal) -> None:
    """Print the answers and the table of loads."""
    terminal.say(demo.prompt, "bold")
    terminal.say()
    terminal.pairs([(a.by, " ".join(a.text.split()) + " …" * a.cut) for a in demo.answers])
    columns = ("adapter", "layers", " file", " on device", " first layer", " resident")
    terminal.table(columns, [_row(load) for load in demo.loads])
    terminal.pairs(
        [
            ("times", "from load(), called for all three in one iteration of the event loop"),
            ("second load", f"{format_ms(demo.again_seconds)} for all three, by a second loader"),
            ("longest stall", f"{_stall(demo.stall)} during the loads"),
            ("", f"{_stall(demo.idle)} in the idle loop before"),
            ("answers", f"{demo.generate_seconds:.1f} s for four rows in one batch, fp32, greedy"),
        ]
    )
    serving, asking = serve_commands(demo.adapters)
    terminal.say()
    terminal.say("To serve the adapters, and query one:", "bold")
    terminal.say(serving)
    terminal.say(asking)


def _row(load: LoadProgress) -> tuple[str, ...]:
    assert load.file_bytes is not None
    assert load.nbytes is not None
    return (
        load.name,
        format_runs(load.layers),
        format_size(load.file_bytes),
        format_size(load.nbytes),
        format_ms(load.first_layer),
        format_ms(load.resident),
    )


def _stall(stall: LoopStall) -> str:
    return f"{format_ms(stall.longest)} (1 ms ticker, {stall.ticks} ticks)"


def demo_as_json(demo: DemoResult) -> dict[str, object]:
    """Return the result as plain values; names ending in `_ms` hold milliseconds."""
    return {
        "prompt": demo.prompt,
        "answers": [asdict(answer) for answer in demo.answers],
        "adapters": [load_as_json(load) for load in demo.loads],
        "again_resident_ms": in_ms(demo.again_seconds),
        "stall_ms": {"loading": in_ms(demo.stall.longest), "idle": in_ms(demo.idle.longest)},
        "ticks": {"loading": demo.stall.ticks, "idle": demo.idle.ticks},
        "prepare_s": round(demo.prepare_seconds, 3),
        "generate_s": round(demo.generate_seconds, 3),
    }
