"""`lorax-async demo`: the example adapters and their base, in one batch."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from lorax_async import layouts
from lorax_async.cli.command_line import (
    ABOUTS,
    OK,
    AddParser,
    ProgressBars,
    Terminal,
    add_command,
    in_ms,
    run_on_uvloop,
)
from lorax_async.cli.load import LoadProgress, LoopStall, create_loads, load_at_once, with_ticker
from lorax_async.cli.serve import serve_commands
from lorax_async.concurrency import IsWanted, in_thread
from lorax_async.config import LoaderConfig
from lorax_async.engines.smollm2 import Report, prepare_base
from lorax_async.errors import ConfigError
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader

ADAPTERS = ("pirate", "shout", "json")

PROMPT = "What is ice?"
"""A prompt of the adapters' training data: the smallest adapter knows little else."""

MAX_NEW_TOKENS = 32

IDLE_SECONDS = 0.25
"""How long the idle loop is measured before the loads; they take about a tenth of that."""


def add_to(add: AddParser) -> None:
    about = ABOUTS["demo"]
    parser = add_command(add, "demo", about, _demo)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to ask (default: what all three know)"
    )
    parser.add_argument(
        "--adapters",
        type=Path,
        default=Path("examples/adapters"),
        metavar="DIR",
        help="the folder with pirate, shout and json (default: %(default)s, of a checkout)",
    )


def _find_adapters(folder: Path) -> list[Path]:
    """Return the folders of the demo's adapters. Raises `ConfigError` if one is missing."""
    paths = [folder / name for name in ADAPTERS]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise ConfigError(
            f"the demo's adapters are missing: {', '.join(missing)}; run the command in a"
            " checkout of the project, or give their folder with --adapters"
        )
    return paths


def _load_model(report: Report) -> tuple[Any, Path]:
    """Return the base model in float32 and eval mode, and its folder. Blocks for seconds."""
    folder = prepare_base(progress=report)
    report("loading the base model")
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    # transformers draws progress bars on any stderr, even a pipe.
    logging: Any = importlib.import_module("transformers.utils.logging")  # untyped
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def _half_of_torchs_threads() -> Iterator[None]:
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


async def _load_all(
    loader: AdapterLoader, loads: Sequence[LoadProgress], bars: ProgressBars
) -> None:
    """Load all at once and hold them; raise the first error."""
    await load_at_once(loader, loads, bars, hold=True)
    for load in loads:
        if load.error is not None:
            raise load.error


def _demo(arguments: argparse.Namespace, terminal: Terminal) -> int:
    folder, prompt = arguments.adapters, arguments.prompt or PROMPT
    paths = _find_adapters(folder)  # fail before the base is loaded
    began = time.perf_counter()
    # Import and load before the loop starts: both block for seconds, and Ctrl-C ends them at once.
    with terminal.steps("looking for the base model") as report:
        model, base = _load_model(report)
        from transformers import AutoTokenizer  # noqa: PLC0415

        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    prepared = time.perf_counter() - began
    loads = create_loads(paths)
    demo = run_on_uvloop(_run_demo(model, tokenizer, loads, prompt, terminal))
    if arguments.json:
        adapters = [load.as_json() for load in loads]
        prepare = {"prepare_s": round(prepared, 3)}
        terminal.json({"prompt": prompt, "adapters": adapters} | demo | prepare)
        return OK
    terminal.say(prompt, "bold")
    terminal.say()
    terminal.pairs(
        [(it["by"], " ".join(it["text"].split()) + " …" * it["cut"]) for it in demo["answers"]]
    )
    terminal.table([_cells(load, "state") for load in loads])
    stalls = {
        when: f"{milliseconds:.1f} ms (1 ms ticker, {demo['ticks'][when]} ticks)"
        for when, milliseconds in demo["stall_ms"].items()
    }
    again = f"{demo['again_resident_ms']:.1f} ms for all three, by a second loader"
    terminal.pairs([
        ("times", "from load(), called for all three in one iteration of the event loop"),
        ("second load", again),
        ("longest stall", f"{stalls['loading']} during the loads"),
        ("", f"{stalls['idle']} in the idle loop before"),
        ("answers", f"{demo['generate_s']:.1f} s for four rows in one batch, fp32, greedy"),
    ])  # fmt: skip
    terminal.say()
    terminal.say("To serve the adapters, and query one:", "bold")
    for command in serve_commands(folder):
        terminal.say(command)
    return OK


def _cells(load: LoadProgress, *without: str) -> dict[str, str]:
    return {name: cell for name, cell in load.cells().items() if name not in without}


async def _run_demo(
    model: Any, tokenizer: Any, loads: Sequence[LoadProgress], prompt: str, terminal: Terminal
) -> dict[str, Any]:
    """Load, attach and generate; return answers and times as JSON has them.

    "stall_ms" are the loop's longest stalls during the loads, and in the idle loop before.
    "again_resident_ms" is the time that a second loader of the same process takes to load all
    three: the first load of a process pays for warming up, too.
    """
    from lorax_async.engines.transformers import attach  # noqa: PLC0415 - imports its kernels

    layout = layouts.from_module(model)
    config = LoaderConfig(dtype="float32", device_bytes=32 << 20, max_slots=len(ADAPTERS))
    async with AdapterLoader(layout, config) as loader:
        try:
            with terminal.bars() as bars:
                _, idle = await with_ticker(asyncio.sleep(IDLE_SECONDS))
                _, stall = await with_ticker(_load_all(loader, loads, bars))
            async with AdapterLoader(layout, config) as second:
                again = create_loads([load.ref for load in loads])
                await _load_all(second, again, ProgressBars(None))
                for load in again:
                    load.release()
            began = time.perf_counter()
            rows: list[AdapterHandle | None] = [None, *(load.handle for load in loads)]
            step = "four rows, one batch: the base and the three adapters"
            with terminal.steps(step), attach(model, loader) as attached, attached.batch(rows):
                run = copy_context().run  # the batch assigns rows in this context
                answers = await in_thread(
                    lambda wanted: run(_answer, model, tokenizer, prompt, len(rows), wanted)
                )
            generated = time.perf_counter() - began
        finally:
            for load in loads:
                load.release()
    names = ["base", *(load.name for load in loads)]
    stalls: dict[str, LoopStall] = {"loading": stall, "idle": idle}
    return {
        "answers": [
            {"by": name, "text": text, "cut": cut}
            for name, (text, cut) in zip(names, answers, strict=True)
        ],
        "again_resident_ms": in_ms(max(load.resident or 0.0 for load in again)),
        "stall_ms": {when: in_ms(stall.longest) for when, stall in stalls.items()},
        "ticks": {when: stall.ticks for when, stall in stalls.items()},
        "generate_s": round(generated, 3),
    }


def _answer(
    model: Any, tokenizer: Any, prompt: str, rows: int, is_wanted: IsWanted
) -> list[tuple[str, bool]]:
    """Answer the prompt greedily in `rows` rows; return each text and whether it was cut."""
    import torch  # noqa: PLC0415
    from transformers import StoppingCriteriaList  # noqa: PLC0415

    def is_stopped(ids: torch.Tensor, _: object, **__: object) -> torch.Tensor:
        return torch.full((len(ids),), not is_wanted(), device=ids.device)

    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([text] * rows, return_tensors="pt", padding=True)
    with _half_of_torchs_threads():  # OpenMP's threads spin, and on all cores took 7x as long
        out = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([is_stopped]),
        )
    end = tokenizer.eos_token_id
    return [
        (tokenizer.decode(row, skip_special_tokens=True).strip(), end not in row)
        for row in out[:, inputs["input_ids"].shape[1] :]
    ]
