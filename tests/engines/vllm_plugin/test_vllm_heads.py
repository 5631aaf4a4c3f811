"""The plug-in in a vLLM that classifies: adapters with a head of their own."""

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from lorax_async.engines.smollm2 import prepare_base
from vllm_stage import BASE, VllmServer

TEXTS = ("What is ice?", "Water that froze, and will melt again in spring.")
LABELS = 3
hf: Any = transformers


def write_base(folder: Path) -> Any:
    """A small model with random weights and the demo's tokenizer."""
    torch.manual_seed(0)
    config = hf.Qwen2Config(
        vocab_size=49_152,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        num_labels=LABELS,
        pad_token_id=2,
    )
    model = hf.Qwen2ForSequenceClassification(config).eval()
    for weight in model.parameters():
        weight.data.mul_(3)
    model.save_pretrained(folder)
    for file in prepare_base().glob("*token*"):
        shutil.copy(file, folder)
    return model


def write_adapter(base: Any, folder: Path, seed: int) -> None:
    """One whose A and B matter, as its own `score` does."""
    torch.manual_seed(seed)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    peft = get_peft_model(copy.deepcopy(base), lora)
    for name, weight in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.data.normal_(0, 0.2)
    peft.save_pretrained(str(folder))


def pefts(base: Any, adapter: Path | None, tokenizer: Any) -> torch.Tensor:
    model = copy.deepcopy(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    return torch.stack(rows).softmax(-1)


def classified(server: VllmServer, model: str) -> torch.Tensor:
    reply = server.post("/classify", model=model, input=list(TEXTS))
    assert reply.status == 200, reply.body
    rows: Sequence[Any] = reply.json["data"]
    return torch.tensor([row["probs"] for row in rows])


def test_heads_are_the_adapters_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    adapters = tmp_path / "adapters"
    for seed, name in enumerate(("one", "two")):
        write_adapter(base, adapters / name, seed)
    expected = {name: pefts(base, adapters / name, tokenizer) for name in ("one", "two")}
    expected[BASE] = pefts(base, None, tokenizer)
    assert min((expected["one"] - expected[name]).abs().max() for name in ("two", BASE)) > 0.1
    server = VllmServer(
        Path(os.environ["VLLM_PYTHON"]),
        tmp_path / "base",
        tmp_path / "log",
        plugin=True,
        arguments=["--runner", "pooling", "--dtype", "float32"],
        environment={
            "LORAX_ASYNC_SOURCES": str(adapters),
            "LORAX_ASYNC_CACHE_DIR": str(tmp_path / "cache"),
        },
    )
    with server:
        for name in (BASE, "one", "two", BASE, "one"):
            torch.testing.assert_close(classified(server, name), expected[name], atol=1e-4, rtol=0)
        assert set(server.adapters()) == {"one", "two"}
        missing = server.post("/classify", model="none", input="What is ice?")
        assert missing.status == 404
        assert server.is_alive
