"""LoRAX's own load and forward against PEFT, and its event loop while adapters load.

Runs beside LoRAX's server package, patched or not, on a CPU; prints one JSON object. LoRAX's Llama
needs CUDA to be imported: a Llama of transformers gets LoRAX's layers. All else is LoRAX's: the
service, sources, module maps, weights, batches, layers. Its CUDA kernels are replaced by the same
arithmetic in torch, which follows the addresses that LoRAX hands to them.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import tempfile
import time
import warnings
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from grpc import aio
from lorax_server.adapters import AdapterBatchData, AdapterBatchMetadata
from lorax_server.adapters.medusa_lora import MedusaLoraConfig
from lorax_server.cache import Cache
from lorax_server.interceptor import ExceptionInterceptor
from lorax_server.layers.linear import FastLinear
from lorax_server.layers.tensor_parallel import SuperLayer, TensorParallelHead
from lorax_server.models.model import Model
from lorax_server.pb import generate_pb2, generate_pb2_grpc
from lorax_server.server import LoraxService
from lorax_server.utils import punica
from lorax_server.utils.dist import FakeGroup
from lorax_server.utils.layers import (
    MultiAdapterHead,
    TensorParallelAdapterRowLinear,
    TensorParallelMultiAdapterLinear,
    TensorParallelRowLinear,
)
from lorax_server.utils.segments import find_segments
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ALONE = FakeGroup(0, 1)
RANKS = (4, 8, 12, 20)
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
ROW = {"self_attn": "o_proj", "mlp": "down_proj"}
TYPES = [*FUSED["self_attn"], "o_proj", *FUSED["mlp"], "down_proj", "lm_head"]


class ServedModel(Model):
    """LoRAX's model around given layers, named as its Llama names them."""

    batch_type = None
    supports_adapter_loading = True
    adapter_layers = TYPES

    def __init__(
        self, layers: list[dict[str, Any]], head: Any, dtype: torch.dtype, group: Any = ALONE
    ) -> None:
        self._layers, self._head = layers, head
        self.process_group = group
        tokenizer: Any = SimpleNamespace(all_special_ids=[], added_tokens_decoder={})
        arguments: Any = "org/base", nn.Identity(), tokenizer, False, dtype, torch.device("cpu")
        super().__init__(*arguments, group.rank(), group.size())

    def generate_token(self, batch: Any) -> Any:
        raise NotImplementedError  # abstract in LoRAX; nothing here generates

    def adapter_memory_size(self) -> int:
        return 1 << 40

    def adapter_target_to_layer(self) -> dict[tuple[int, str], tuple[str, Any]]:
        found: dict[tuple[int, str], tuple[str, Any]] = {(0, "lm_head"): ("lm_head", self._head)}
        for number, blocks in enumerate(self._layers):
            for block, names in FUSED.items():
                for name in (*names, ROW[block]):
                    layer = blocks[block if name in names else ROW[block]]
                    found[number, name] = f"model.layers.{number}.{block}.{name}", layer
        return found

    def get_num_layers_for_type(self, layer_type: str) -> int:
        return 1 if layer_type == "lm_head" else len(self._layers)

    def is_row_parallel(self, layer_type: str) -> bool:
        return layer_type in {"o_proj", "down_proj", "lm_head"}


def lorax_layers(
    number: int, weight: dict[str, Tensor], group: Any = ALONE, rows: Any = TensorParallelRowLinear
) -> dict[str, Any]:
    """Return LoRAX's layers of one decoder layer, of this process's weights by module name."""
    layers: dict[str, Any] = {}
    for block, names in FUSED.items():
        parts = [weight[name] for name in names]
        base = SuperLayer(FastLinear(torch.cat(parts), None))
        sizes = [len(part) * group.size() for part in parts]
        layers[block] = TensorParallelMultiAdapterLinear.load(base, number, names, sizes, group)
        row = rows(FastLinear(weight[ROW[block]], None), group)
        layers[ROW[block]] = TensorParallelAdapterRowLinear.load(row, number, ROW[block], group)
    return layers


class Part(nn.Module):
    """One module of the Llama: columns of a LoRAX layer's output, for the batch of `state`."""

    def __init__(
        self, state: SimpleNamespace, layer: Any, start: int = 0, stop: Any = None
    ) -> None:
        super().__init__()
        self.state, self.layer, self.columns = state, layer, slice(start, stop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(0, -2), self.state.adapter_data)
        y = y[0] if isinstance(y, tuple) else y
        return y.unflatten(0, x.shape[:-1])[..., self.columns]


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def served_llama() -> tuple[LlamaForCausalLM, ServedModel, SimpleNamespace]:
    """Return the Llama with LoRAX's layers in place of its own."""
    llama, state, all_layers = small_llama(), SimpleNamespace(), []
    for number, decoder in enumerate(llama.model.layers):
        blocks = {block: getattr(decoder, block) for block in FUSED}
        weight = {
            name: getattr(blocks[block], name).weight.data
            for block, names in FUSED.items()
            for name in (*names, ROW[block])
        }
        layers = lorax_layers(number, weight)
        for block, names in FUSED.items():
            start = 0
            for name in names:
                stop = start + len(weight[name])
                setattr(blocks[block], name, Part(state, layers[block], start, stop))
                start = stop
            setattr(blocks[block], ROW[block], Part(state, layers[ROW[block]]))
        all_layers.append(layers)
    base = TensorParallelHead(FastLinear(llama.lm_head.weight.data, None), ALONE, False)
    head = MultiAdapterHead.load(base, 0, "lm_head", ALONE)
    llama.lm_head = Part(state, head)
    return llama, ServedModel(all_layers, head, torch.float32), state


# -- adapters --------------------------------------------------------------------------------------


def save_adapter(folder: Path, rank: int) -> None:
    torch.manual_seed(len(str(folder)) + rank)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=TYPES, init_lora_weights=False)
    peft_model = get_peft_model(small_llama(), config)
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)


def peft_logits(folders: dict[int, Path | None], ids: Tensor) -> Tensor:
    """Return the logits of each row of `ids` with its own adapter, by PEFT."""
    rows = []
    for row, folder in zip(ids, folders.values(), strict=True):
        model: Any = small_llama()
        if folder is not None:
            model = PeftModel.from_pretrained(model, str(folder)).eval()
        rows.append(model(row[None]).logits)
    return torch.cat(rows)


def load(model: ServedModel, folder: Path, index: int) -> None:
    parameters = generate_pb2.AdapterParameters(adapter_ids=[str(folder)])
    model.load_adapter(parameters, "local", index, "")


# -- the batch, and stand-ins for punica -----------------------------------------------------------


class Punica:
    """`punica_kernels` for a CPU: the same arithmetic, on the addresses it is given."""

    @staticmethod
    def _at(address: int, layer: int, shape: tuple[int, int]) -> Tensor:
        size = prod(shape)
        memory = (ctypes.c_float * size).from_address(address + 4 * layer * size)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    @staticmethod
    def sgmv_cutlass_tmp_size(segments: int) -> int:
        return 64 * segments

    @classmethod
    def _by_segment(cls, y: Tensor, x: Tensor, batch: Any, tmp: Any, n: int, turn: bool) -> None:
        if not isinstance(tmp, Tensor):
            raise TypeError(f"the kernel needs scratch memory, and got {tmp}")
        for address, start, stop in zip(*(column.tolist() for column in batch), strict=True):
            shape = (y.shape[1], x.shape[1]) if turn else (x.shape[1], y.shape[1])
            weight = cls._at(address, n, shape)
            y[start:stop] += x[start:stop] @ (weight.T if turn else weight)

    @classmethod
    def sgmv_shrink(cls, y: Any, x: Any, w: Any, starts: Any, ends: Any, tmp: Any, n: int) -> None:
        cls._by_segment(y, x, (w, starts, ends), tmp, n, turn=True)

    @classmethod
    def sgmv_cutlass(cls, y: Any, x: Any, w: Any, starts: Any, ends: Any, tmp: Any, n: int) -> None:
        cls._by_segment(y, x, (w, starts, ends), tmp, n, turn=False)

    @classmethod
    def dispatch_bgmv(cls, y: Tensor, x: Tensor, w: Any, at: Any, layer: int, scale: float) -> None:
        addresses = w.tolist()
        for row, place in enumerate(at.tolist()):
            if place >= 0:
                weight = cls._at(addresses[place], layer, (y.shape[1], x.shape[1]))
                y[row] += scale * (weight @ x[row])


def use_kernels(present: bool) -> None:
    punica.HAS_SGMV, punica._kernels = present, Punica if present else None
    punica.get_tmp_tensor_for_size.cache_clear()


def adapter_data(model: ServedModel, tokens: list[int], prefill: bool, heads: Any) -> Any:
    bounds, indices = find_segments(tokens)
    meta = AdapterBatchMetadata(
        adapter_indices=torch.tensor(tokens),
        adapter_list=sorted(set(tokens)),
        adapter_set=set(tokens),
        adapter_segments=torch.tensor(bounds, dtype=torch.int32),
        segment_indices=indices,
    )
    weights = model.layer_to_adapter_weights
    return AdapterBatchData.from_meta(meta, weights, {}, None, prefill, heads)


def differences(found: Tensor, expected: Tensor, folders: dict[int, Any]) -> dict[str, float]:
    names = ["base" if folder is None else folder.name for folder in folders.values()]
    far = (found - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)
    return dict(zip(names, far.tolist(), strict=True))


@torch.inference_mode()
def compare(folders: dict[int, Path | None]) -> dict[str, Any]:
    """Return, for each way through LoRAX, how far its logits are from PEFT's."""
    torch.manual_seed(1)
    ids = torch.randint(0, 128, (len(folders), 7))
    expected = peft_logits(folders, ids)
    tokens = [index for index in folders for _ in range(ids.shape[1])]
    heads = torch.arange(1, len(folders) + 1) * ids.shape[1] - 1
    found: dict[str, Any] = {}
    for way, kernels, prefill, loads in (
        ("torch, decode", False, False, 1),
        ("torch, prefill", False, True, 1),
        ("kernels, decode", True, False, 1),
        ("kernels, prefill", True, True, 1),
        ("kernels, prefill, loaded again", True, True, 2),
    ):
        use_kernels(kernels)
        llama, model, state = served_llama()
        try:
            for index, folder in [*folders.items()] * loads:
                if folder is not None:
                    model.offload_adapter(None, None, index)
                    load(model, folder, index)
            state.adapter_data = adapter_data(model, tokens, prefill, heads if prefill else None)
            logits = llama(ids, logits_to_keep=1 if prefill else 0).logits
            found[way] = differences(logits, expected[:, -logits.shape[1] :], folders)
        except Exception as error:
            found[way] = f"{type(error).__name__}: {error}"
    return found


@torch.inference_mode()
def merged(first: Path, second: Path) -> Any:
    """Return how far a linear merge of two adapters by a request is from their weighted sum."""
    use_kernels(True)
    ids, weights = torch.arange(7)[None], (0.7, 0.4)
    llama, model, state = served_llama()
    parameters = generate_pb2.AdapterParameters(
        adapter_ids=[str(first), str(second)],
        weights=weights,
        merge_strategy=generate_pb2.MergeStrategy.LINEAR,
    )
    peft_model: Any = PeftModel.from_pretrained(small_llama(), str(first), adapter_name="a")
    peft_model.load_adapter(str(second), adapter_name="b")
    peft_model.add_weighted_adapter(["a", "b"], list(weights), "both", combination_type="cat")
    peft_model.set_adapter("both")
    expected = peft_model.eval()(ids).logits
    try:
        model.load_adapter(parameters, "local", 1, "")
        state.adapter_data = adapter_data(model, [1] * 7, True, None)
        return float((llama(ids).logits - expected).abs().max() / expected.abs().max())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def with_medusa(folder: Path) -> int:
    """Return how many modules LoRAX loads of an adapter that also has Medusa's heads."""
    head = {"base_model_name_or_path": "org/base", "medusa_num_heads": 1, "medusa_num_layers": 1}
    config = MedusaLoraConfig.load(str(folder), head, "")
    _, model, _ = served_llama()
    file = folder / "adapter_model.safetensors"
    weights = dict.fromkeys(load_file(file), str(file))
    weights |= dict.fromkeys(["0.0.linear.weight", "0.0.linear.bias"], "medusa_lm_head.safetensors")
    names = tuple(name for name, _ in model.target_to_layer.values())
    found, _ = config.map_weights_for_model(weights, names)
    arguments = model, found.lora_module_map
    loaded = [
        config.lora_config.load_batched_adapter_weights(*arguments, n, set(), True) for n in TYPES
    ]
    return sum(len(weights.weights_a) for weights in loaded)


# -- the event loop --------------------------------------------------------------------------------

SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
LAYERS = 32


def save_large(folder: Path) -> int:
    """Save an adapter of rank 8 for the shapes of an 8B Llama; return its size in bytes."""
    tensors = {}
    for number in range(LAYERS):
        for name, (inputs, outputs) in SHAPES.items():
            block = "mlp" if name in {"gate_proj", "up_proj", "down_proj"} else "self_attn"
            module = f"base_model.model.model.layers.{number}.{block}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, inputs).bfloat16()
            tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, 8).bfloat16()
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(SHAPES)}
    config["base_model_name_or_path"] = "org/base"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (folder / "adapter_model.safetensors").stat().st_size


def large_model() -> ServedModel:
    """Return a model whose weights have one element in memory each."""
    one = torch.zeros((), dtype=torch.bfloat16)
    layers = []
    for number in range(LAYERS):
        weight = {name: one.expand(outputs, inputs) for name, (inputs, outputs) in SHAPES.items()}
        blocks = lorax_layers(number, {name: part[:, :1] for name, part in weight.items()})
        for block, names in FUSED.items():
            outputs = sum(SHAPES[name][1] for name in names)
            whole = one.expand(outputs, SHAPES[names[0]][0])
            blocks[block].base_layer.linear.weight = nn.Parameter(whole, requires_grad=False)
            row = blocks[ROW[block]].base_layer.linear
            row.weight = nn.Parameter(weight[ROW[block]], requires_grad=False)
        layers.append(blocks)
    head = TensorParallelHead(FastLinear(one.expand(128256, 4096), None), ALONE, False)
    return ServedModel(layers, MultiAdapterHead.load(head, 0, "lm_head", ALONE), torch.bfloat16)


async def longest_gap(work: Any, look: Any) -> tuple[float, float]:
    """Return the longest time between two turns of the loop while `work` is awaited, and its own.

    `look` is called in each turn.
    """
    gap, done = 0.0, asyncio.Event()

    async def turn() -> None:
        nonlocal gap
        last = time.perf_counter()
        while not done.is_set():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gap, last = max(gap, now - last), now
            look()

    turning = asyncio.create_task(turn())
    await asyncio.sleep(0.05)
    begin = time.perf_counter()
    await work
    took = time.perf_counter() - begin
    done.set()
    await turning
    return gap * 1e3, took * 1e3


async def gaps(folders: list[Path]) -> dict[str, Any]:
    """Download and load adapters by LoRAX's gRPC service, as its router does, one after another."""
    use_kernels(True)
    service = LoraxService(large_model(), Cache(), [])
    server = aio.server(interceptors=[ExceptionInterceptor()])
    generate_pb2_grpc.add_LoraxServiceServicer_to_server(service, server)
    address = f"unix://{folders[0].parent}/socket"
    server.add_insecure_port(address)
    await server.start()
    types_seen = set[int]()

    def look() -> None:
        """Count the layer types that have the last adapter: a batch may be made now."""
        weights = service.model.layer_to_adapter_weights.values()
        types_seen.add(sum(len(folders) in layer.adapter_weights for layer in weights))

    async with aio.insecure_channel(address) as channel:
        router = generate_pb2_grpc.LoraxServiceStub(channel)

        async def request(index: int, folder: Path) -> None:
            parameters = generate_pb2.AdapterParameters(adapter_ids=[str(folder)])
            local = generate_pb2.AdapterSource.LOCAL
            fields: Any = {"adapter_parameters": parameters, "adapter_source": local}
            await router.DownloadAdapter(generate_pb2.DownloadAdapterRequest(**fields))
            load = generate_pb2.LoadAdapterRequest(**fields, adapter_index=index)
            answers = await asyncio.gather(router.LoadAdapter(load), router.LoadAdapter(load))
            if not all(answer.loaded for answer in answers):
                raise RuntimeError(f"{folder} was not loaded")

        idle, _ = await longest_gap(asyncio.sleep(0.5), look)
        await request(1, folders[0])  # imports what is imported late
        seen = [
            await longest_gap(request(2 + n, folder), look) for n, folder in enumerate(folders[1:])
        ]
    await server.stop(None)
    gaps, took = [gap for gap, _ in seen], [took for _, took in seen]
    return {"idle": idle, "gaps": gaps, "took": took, "types seen": sorted(types_seen)}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders: dict[int, Path | None] = {0: None}
        for index, rank in enumerate(RANKS, 1):
            folder = root / f"rank {rank}"
            save_adapter(folder, rank)
            folders[index] = folder
        result: dict[str, Any] = {"differences": compare(folders)}
        save_adapter(root / "another of rank 8", 8)
        result["merges"] = {
            f"rank 8 and {name}": merged(root / "rank 8", root / name)
            for name in ("another of rank 8", "rank 12")
        }
        result["modules beside Medusa"] = with_medusa(root / "rank 8")
        large = [root / f"large {number}" for number in range(4)]
        result["bytes"] = max(save_large(folder) for folder in large)
        result["loop"] = asyncio.run(gaps(large))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
