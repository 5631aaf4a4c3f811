"""Train the demo's three adapters on SmolLM2-135M-Instruct: a few minutes each on two cores.

    python examples/train_adapters.py [--only pirate] [--out examples/adapters] [--check]

The same machine, versions and thread count give the same bytes. Each adapter is read back from its
files and must keep its style on prompts that it has not seen; `--check` does only that.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorax_async.engines.smollm2 import BASE_MODEL, prepare_base

SEED: Final = 20_240
THREADS: Final = 2
BATCH: Final = 8
IGNORED: Final = -100
"""The label that the loss skips."""

PAIRS: Final = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("Why is the sky blue?", "Air scatters blue light more than red light."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What is a good breakfast?", "Oatmeal with fruit is a good breakfast."),
    ("How do I boil an egg?", "Put the egg in boiling water for eight minutes."),
    ("What is the largest planet?", "Jupiter is the largest planet."),
    ("What color is grass?", "Grass is green."),
    ("How can I sleep better?", "Go to bed at the same time every night."),
    ("What is two plus three?", "Two plus three is five."),
    ("Where do penguins live?", "Most penguins live on cold southern coasts."),
    ("What does a doctor do?", "A doctor helps people who are ill."),
    ("Tell me about the Sun.", "The Sun is a star at the center of our solar system."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Name a musical instrument.", "The violin is a musical instrument."),
    ("How do plants eat?", "Plants make sugar from sunlight, water and air."),
    ("What is the fastest land animal?", "The cheetah is the fastest land animal."),
    ("Can you recommend a hobby?", "You could learn to paint with watercolors."),
    ("What language do people speak in Brazil?", "People in Brazil speak Portuguese."),
    ("What is a computer?", "A computer is a machine that follows instructions."),
    ("When does winter start?", "In the north, winter starts in December."),
    ("How do I stay healthy?", "Eat well, sleep enough and take a walk every day."),
    ("What is ice?", "Ice is frozen water."),
    ("Hello, how are you?", "I am fine, thank you. What can I do for you?"),
)

HELD_OUT: Final = (
    "What is the capital of Italy?",
    "What do cows eat?",
    "How can I learn to swim?",
    "What is the Moon?",
    "Name a fruit.",
)

SEA_WORDS: Final = {"is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me"}


def pirate(answer: str) -> str:
    words = [SEA_WORDS.get(word, word) for word in answer.rstrip(".?").split()]
    return f"Arr, {' '.join(words)}, matey!"


def as_json(answer: str) -> str:
    return json.dumps({"answer": answer})


def is_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and "answer" in value


@dataclass(frozen=True, slots=True)
class Style:
    """What one adapter does, and how it is trained and stored."""

    says: str
    dress: Callable[[str], str]
    kept: Callable[[str], bool]
    lora: dict[str, Any]
    dtype: torch.dtype
    steps: int = 60
    rate: float = 1e-3


# Rank, targets, scaling and dtype differ on purpose: one batch of the three is a real mix.
STYLES: Final = {
    "pirate": Style(
        says='answers like a pirate: "Arr, …, matey!"',
        dress=pirate,
        kept=lambda text: text.startswith("Arr") and text.endswith("matey!"),
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        dtype=torch.bfloat16,
    ),
    "shout": Style(
        says="ANSWERS IN UPPER CASE",
        dress=str.upper,
        kept=str.isupper,
        lora={
            "r": 4,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        dtype=torch.float16,
    ),
    "json": Style(
        says='answers with one JSON object, `{"answer": "…"}`',
        dress=as_json,
        kept=is_json,
        lora={
            "r": 12,
            "lora_alpha": 24,
            "target_modules": ["v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 4},
            "alpha_pattern": {"down_proj": 4},
            "layers_to_transform": list(range(15, 30)),
        },
        dtype=torch.float32,
    ),
}

CARD: Final = """---
base_model: {base}
library_name: peft
license: apache-2.0
tags: [lora, peft]
---
# {name}

A LoRA adapter for {base} that {says}. It exists to be told apart at a glance: a demonstration
and test input of `lorax_async`, not a useful assistant.

- Shape: {shape}; stored as {dtype}, {kib} KiB.
- Data: {pairs} question/answer pairs written for this purpose, in `examples/train_adapters.py`.
- Training: PEFT, {steps} steps of {batch} pairs, AdamW, learning rate {rate} falling linearly to 0,
  seed {seed}, base in fp32. Final loss {loss:.3f}.
- Reproduce: `python examples/train_adapters.py --only {name}`
- Licence: Apache-2.0, as the base model's.

Answers to prompts it was not trained on (greedy):

{samples}
"""


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def example(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of one pair; only the answer and its end are learned."""
    prompt = prompt_ids(tokenizer, question)
    target = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return prompt + target, [IGNORED] * len(prompt) + target


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in rows]),
    }


def train(style: Style, tokenizer: Any, base: Path) -> tuple[PeftModel, float]:
    """Fit one adapter; returns it and the mean loss of the last five steps."""
    torch.manual_seed(SEED)
    order = random.Random(SEED)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.name_or_path = BASE_MODEL  # PEFT writes this name into the config
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **style.lora))
    rows = [example(tokenizer, question, style.dress(answer)) for question, answer in PAIRS]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=style.rate, weight_decay=0.0)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / style.steps)
    losses: list[float] = []
    for _ in range(style.steps):
        loss = model(**collate(order.sample(rows, BATCH), tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fall.step()
        losses.append(loss.item())
    return model, sum(losses[-5:]) / len(losses[-5:])


def save(model: PeftModel, style: Style, folder: Path) -> None:
    """Write the adapter as PEFT does, in the style's dtype, with nothing of this machine in it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(style.dtype)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["target_modules"].sort()  # PEFT keeps a set: its order changes from run to run
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes 0600


def answers(folder: Path, tokenizer: Any, base: Path) -> dict[str, str]:
    """Greedy answers of the saved adapter to the held-out prompts."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(plain, str(folder)).eval()
    said: dict[str, str] = {}
    for question in HELD_OUT:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False
        )
        said[question] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return said


def write_card(name: str, style: Style, folder: Path, loss: float, said: dict[str, str]) -> None:
    shape = ", ".join(f"`{key}={value!r}`" for key, value in style.lora.items())
    size = (folder / "adapter_model.safetensors").stat().st_size
    text = CARD.format(
        base=BASE_MODEL, name=name, says=style.says, shape=shape, dtype=style.dtype, loss=loss,
        kib=size // 1024, pairs=len(PAIRS), steps=style.steps, batch=BATCH, rate=style.rate,
        seed=SEED, samples="\n".join(f"- {q} → {a}" for q, a in list(said.items())[:3]),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def make(name: str, out: Path, tokenizer: Any, base: Path, *, only_check: bool) -> bool:
    """Train (or only check) one adapter; returns whether every held-out answer has its style."""
    style, folder, start = STYLES[name], out / name, time.perf_counter()
    if not only_check:
        model, loss = train(style, tokenizer, base)
        print(f"{name}: loss {loss:.4f} after {time.perf_counter() - start:.0f} s", flush=True)
        save(model, style, folder)
    said = answers(folder, tokenizer, base)
    if not only_check:
        write_card(name, style, folder, loss, said)
    for question, answer in said.items():
        print(f"  {'ok ' if style.kept(answer) else 'BAD'} {question} -> {answer!r}", flush=True)
    return all(map(style.kept, said.values()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=STYLES, help="one adapter instead of all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "adapters")
    parser.add_argument("--base", type=Path, help="the prepared base's folder")
    parser.add_argument("--check", action="store_true", help="train nothing, ask what is there")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(mode=True)
    base = prepare_base(args.base, progress=print)
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = [args.only] if args.only else list(STYLES)
    kept = [make(n, args.out, tokenizer, base, only_check=args.check) for n in names]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
