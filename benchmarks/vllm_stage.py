"""vLLM's server without a GPU, with and without the plug-in; adapters for it; and its clients."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
BASE = "base"
START_SECONDS = 400.0

# SmolLM2-135M's, (in, out) features.
LAYERS = 30
MODULES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}


def write_adapter(
    folder: Path, *, rank: int, seed: int, layers: int = LAYERS, hidden: int = 576
) -> Path:
    """Write an adapter of random weights in bf16 for SmolLM2, or for a base of other sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {576: hidden}
    tensors = {}
    for layer in range(layers):
        for name, (inputs, outputs) in MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shapes = (rank, sizes.get(inputs, inputs)), (sizes.get(outputs, outputs), rank)
            for part, shape in zip("AB", shapes, strict=True):
                weight = torch.randn(shape, generator=generator) * 0.04
                tensors[f"{prefix}.lora_{part}.weight"] = weight.to(torch.bfloat16)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.rpartition(".")[2] for name in MODULES],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Stream:
    """The tokens of one streamed answer, and when each came."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    error: str | None = None

    def gaps(self, start: float = 0.0, stop: float = float("inf")) -> list[float]:
        """Seconds between two tokens, for those that ended between two moments."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [after - before for before, after in pairs if start <= after and before <= stop]


class VllmServer:
    """vLLM's OpenAI server on SmolLM2, as processes of `python`. Closes with `with`.

    `engine_cores` are those of the engine and its workers, `other_cores` those of the API server.
    """

    def __init__(
        self,
        python: Path,
        base: Path,
        log: Path,
        *,
        plugin: bool,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        extension: str | None = None,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.log = log
        command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)),
            *("--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "1024"),
            *("--max-num-seqs", "8", "--enable-lora", "--max-lora-rank", "128"),
            *arguments,
        ]
        if extension is None and plugin:
            extension = "lorax_async.engines.vllm.worker.WorkerExtension"
        if extension:
            command += ["--worker-extension-cls", extension]
        paths = [ROOT, ROOT / "kernels", ROOT / "benchmarks"]
        settings = {
            "PYTHONPATH": ":".join(map(str, paths)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_PLUGINS": "lorax_async" if plugin else "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        inherited = {name: text for name, text in os.environ.items() if "LORAX" not in name}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=inherited | settings | dict(environment or {}),
                cwd=log.parent,  # which `-m` puts first on the path
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        stop = time.monotonic() + START_SECONDS
        while time.monotonic() < stop and self._process.poll() is None:
            try:
                if self.get("/health").status == 200:
                    return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-4_000:]}")

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None and self.get("/health").status == 200

    def pin(self, engine: Iterable[int], others: Iterable[int]) -> None:
        """Pin the engine with its workers, and the API server, to cores of their own."""
        for pid in _descendants(self._process.pid):
            is_engine = b"VLLM::" in Path(f"/proc/{pid}/cmdline").read_bytes()
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), set(engine if is_engine else others))

    # -- calls ------------------------------------------------------------------------------------

    def get(self, path: str) -> Reply:
        return self._call("GET", path, None)

    def post(self, path: str, **body: Any) -> Reply:
        return self._call("POST", path, body)

    def _call(self, method: str, path: str, body: object) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return Reply(reply.status, dict(reply.getheaders()), reply.read().decode())
        finally:
            connection.close()

    def chat(self, model: str, prompt: str = "What is ice?", tokens: int = 20) -> Reply:
        messages = [{"role": "user", "content": prompt}]
        return self.post(
            "/v1/chat/completions", model=model, messages=messages, max_tokens=tokens, temperature=0
        )

    def text(self, model: str, prompt: str = "What is ice?", tokens: int = 20) -> str:
        reply = self.chat(model, prompt, tokens)
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {reply.body}")
        content: str = reply.json["choices"][0]["message"]["content"]
        return content

    def stream(self, model: str, prompt: str = "What is ice?", tokens: int = 20) -> Stream:
        """Stream an answer to its end; `tokens` are as many as asked for."""
        stream = Stream()
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "min_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            self._receive(connection.getresponse(), stream)
        finally:
            connection.close()
        return stream

    def _receive(self, reply: http.client.HTTPResponse, stream: Stream) -> None:
        if reply.status != 200:
            stream.error = reply.read().decode()
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                stream.error = chunk["error"]["message"]
                continue
            choice = chunk["choices"][0]
            stream.text += choice["delta"].get("content") or ""
            stream.times.append(perf_counter())

    def adapters(self) -> dict[str, dict[str, Any]]:
        """What the plug-in tells of each adapter, by name."""
        rows: list[dict[str, Any]] = self.get("/v1/lorax/adapters").json["data"]
        return {row["name"]: row for row in rows}


def _descendants(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [pid, *(each for child in text.split() for each in _descendants(int(child)))]


@dataclass(slots=True)
class Arrival:
    """Another request's tokens, calm and while an adapter came."""

    calm: Stream
    busy: Stream
    began: float
    ended: float
    seconds: float

    @property
    def calm_gap(self) -> float:
        return max(self.calm.gaps()[2:])

    @property
    def busy_gap(self) -> float:
        return max(self.busy.gaps(self.began, self.ended))


def watch_arrival(server: VllmServer, load: Any, *, tokens: int) -> Arrival:
    """Stream an answer of the base, calm; and again while `load()` brings an adapter."""
    prompt = "Write a long story."
    calm = server.stream(BASE, prompt, tokens)
    result: list[Stream] = []
    watcher = threading.Thread(target=lambda: result.append(server.stream(BASE, prompt, tokens)))
    watcher.start()
    time.sleep(1.0)
    began = perf_counter()
    load()
    ended = perf_counter()
    watcher.join()
    return Arrival(calm, result[0], began, ended, ended - began)


def require_vllm(python: Path) -> None:
    """Exit, saying so, if `python` has no vLLM."""
    check = subprocess.run([python, "-c", "import vllm"], capture_output=True, check=False)
    if check.returncode:
        sys.exit(f"no vLLM in {python}: nothing was run")
