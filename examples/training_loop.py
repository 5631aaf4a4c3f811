"""Push the weights of a training loop to a server's model after each step: docs/training.md.

python examples/training_loop.py
"""

import asyncio
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from lorax_async import AdapterLoader, LoaderConfig, layouts
from lorax_async.engines.transformers import attach

torch.manual_seed(0)
CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
served: Any = LlamaForCausalLM(CONFIG)
base: Any = LlamaForCausalLM(CONFIG)
base.load_state_dict(served.state_dict())
learner = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
peft_config = learner.peft_config["default"]
optimizer = torch.optim.AdamW(learner.parameters(), lr=0.02)
text = torch.randint(0, 128, (4, 32))


def train_step() -> float:
    loss = learner(text, labels=text).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


@torch.no_grad()
def rollout(rows: int) -> torch.Tensor:
    logits: torch.Tensor = served(text[:rows]).logits  # a real one generates
    return logits


async def main() -> None:
    config = LoaderConfig(max_slots=4, memory_bytes="64MiB")  # room for two versions, and more
    async with AdapterLoader(layouts.from_module(served), config) as loader:
        with attach(served, loader) as attached:
            weights = get_peft_model_state_dict(learner)
            old = await loader.load_tensors("policy", weights, peft_config)
            for step in range(3):
                loss = await asyncio.to_thread(train_step)
                weights = get_peft_model_state_dict(learner)
                async with loader.replace("policy", weights, peft_config) as newer:
                    print(f"step {step}: loss {loss:.2f}, another version: {newer.key != old.key}")
            async with loader.load("policy") as policy:  # as a request would name it
                with attached.batch([old, policy]):  # both versions, in one batch
                    before, after = await asyncio.to_thread(rollout, 2)
            old.release()
    with torch.no_grad():
        expected = learner(text[:2]).logits
    print("as PEFT computes it:", torch.allclose(after, expected[1], atol=1e-5))
    print("the old handle kept its version:", not torch.allclose(before, expected[0], atol=1e-2))


if __name__ == "__main__":
    asyncio.run(main())
