"""SGLang's own TokenizerManager, LoRAManager and LoRA layers on CPU, in the venv of `make sglang`.

Stand-ins are: the messages between the two managers, pinned memory, and the rotary kernel.
"""

import asyncio
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft_adapters import llama, save

from link import Link

if find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]

ATTENTION = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj"]}
REMOTE = ("one", "two", "three", "four", "five")
NOBODY = "http://127.0.0.1:9/"


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which requests may name adapters."""
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    root = tmp_path_factory.mktemp("remote")
    folders = {name: save(llama(), ATTENTION, root / name, seed=4) for name in REMOTE}
    files = {f"{name}/{file.name}": file for name in REMOTE for file in folders[name].iterdir()}
    with Link(files, rate=0, delay=0.02) as link:
        yield link


@pytest.fixture(scope="session")
def arguments(local: Path, origin: Link, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """SGLang's arguments, published; its plug-ins are loaded as it loads them."""
    root = tmp_path_factory.mktemp("sglang")
    config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(root)
    rotary = ModuleType("vllm._custom_ops")
    rotary.rotary_embedding = None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's own
        patch.setenv("SGLANG_PLUGINS", "lorax_async")
        patch.setenv("LORAX_ASYNC_SOURCES", f"{local} {origin.url('')} {NOBODY}")
        patch.setenv("LORAX_ASYNC_CACHE_DIR", str(root / "cache"))
        patch.setenv("LORAX_ASYNC_CACHE_BYTES", "55000")  # four of the remote ones, not five
        patch.setenv("LORAX_ASYNC_TIMEOUT", "10")
        patch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        patch.setitem(sys.modules, "vllm._custom_ops", rotary)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        for name in ("tensor", "empty", "zeros"):
            patch.setattr(torch, name, _without_pins(getattr(torch, name)))
        from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
        from sglang.srt.plugins import load_plugins
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import ServerArgs

        lora = {"enable_lora": True, "lora_backend": "torch_native", "max_lora_rank": 16}
        lora |= {"max_loras_per_batch": 2, "max_loaded_loras": 2, "lora_target_modules": ["all"]}
        on_cpu = {"device": "cpu", "dtype": "float32", "attention_backend": "torch_native"}
        arguments = ServerArgs(str(root), skip_tokenizer_init=True, **lora, **on_cpu)
        publish(arguments, role="tokenizer", ranks=SpawnRanks(world_rank=0))
        init_distributed_environment(1, 0, f"file://{root / 'rendezvous'}", 0, backend="gloo")
        initialize_model_parallel()
        load_plugins()
        yield arguments


def _without_pins(make: Any) -> Any:
    def made(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return make(*args, **options)

    return made


@dataclass
class Server:
    """SGLang's two managers of adapters. `loads` are the paths that the second one loads."""

    requests: Any
    weights: Any
    loads: list[str] = field(default_factory=list)
    partly: bool = False
    """Whether a second rank fails to load."""

    async def resolve(self, *names: str | None) -> Any:
        """Do what SGLang does with a request before it is tokenized; return the adapters' ids."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        paths = names[0] if len(names) == 1 else list(names)
        request = GenerateReqInput(input_ids=[[1]] * len(names), lora_path=paths)
        await self.requests._validate_and_resolve_lora(request)  # noqa: SLF001
        return request.lora_id

    async def serve(self, name: str) -> str:
        """Begin and end a request; return where SGLang has the adapter from."""
        lora_id = await self.resolve(name)
        await self.requests.lora_registry.release(lora_id)
        return str(self.weights.lora_refs[lora_id].lora_path)

    async def tell(self, request: Any) -> list[Any]:
        """Carry one message to the second manager, as a scheduler does between two steps."""
        await asyncio.sleep(0.01)
        if "Unload" in type(request).__name__:
            return [self.weights.unload_lora_adapter(request.to_ref())]
        self.loads.append(request.lora_path)
        result = self.weights.load_lora_adapter(request.to_ref())
        failed = self.weights.create_lora_update_result(success=False, error_message="no room")
        return [result, failed] if self.partly else [result]


@pytest.fixture
async def server(arguments: Any) -> Any:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.models.llama import LlamaForCausalLM
    from sglang.srt.server_args import PortArgs

    config = llama().config
    base = LlamaForCausalLM(config)
    for parameter in base.parameters():
        parameter.data.zero_()
    given = base, config, 2, LoadConfig(), torch.float32, arguments
    weights = LoRAManager(*given, "torch_native", 16, {"all"})
    requests = TokenizerManager(arguments, PortArgs.init_new(arguments))
    requests.auto_create_handle_loop = lambda: None  # it reads from another process
    server = Server(requests, weights)
    requests.update_lora_adapter_communicator = server.tell
    yield server
    if getattr(requests, "lorax_async", None) is not None:
        await requests.lorax_async.close()
    requests.recv_from_detokenizer.context.destroy(linger=0)
