"""What `import lorax_async` and loads import, and where; that it leaves the process as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

HEAVY = {
    *("peft", "transformers", "triton", "uvloop", "rich", "safetensors", "huggingface_hub"),
    *("obstore", "fastapi", "starlette", "uvicorn", "pydantic", "aiohttp", "matplotlib"),
    *("prometheus_client", "opentelemetry"),
}
PROGRAM = """
import asyncio, gc, json, logging, os, random, signal, sys, threading, warnings
from pathlib import Path
import torch

def state():
    return {
        "handlers": [repr(h) for h in logging.root.handlers],
        "log levels": [logging.root.level, logging.root.manager.disable],
        "policy": repr(asyncio.get_event_loop_policy()),
        "environment": dict(os.environ),
        "threads": sorted(t.name for t in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "hooks": [repr(h) for h in (sys.excepthook, sys.unraisablehook, threading.excepthook)],
        "paths": [os.getcwd(), sys.path, [repr(f) for f in sys.meta_path]],
        "signals": [repr(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
        "warnings": [repr(f) for f in warnings.filters],
        "garbage": [gc.isenabled(), *gc.get_threshold(), sys.getswitchinterval()],
        "random": [hash(random.getstate()), torch.initial_seed()],
        "torch": [torch.get_num_threads(), torch.get_num_interop_threads(),
                  torch.is_grad_enabled(), str(torch.get_default_dtype())],
    }

asyncio.get_event_loop_policy()
torch_modules = set(sys.modules)
before = state()
import lorax_async
lorax_async.AdapterLoader
after = state()
ours = logging.getLogger("lorax_async")
print(json.dumps({
    "before": before,
    "after": after,
    "modules": sorted(set(sys.modules) - torch_modules),
    "ours": [[type(h).__name__ for h in ours.handlers], ours.level, ours.propagate],
    "others": sorted(
        name for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith("lorax_async.") and getattr(logger, "handlers", None)
    ),
    "loop": asyncio.events._get_running_loop() is not None,
}))
"""


def test_an_import_brings_little_and_leaves_the_process_as_it_was() -> None:
    """In a fresh interpreter, where warnings are errors; and it logs where the program asks."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=25, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1, "nothing is printed"
    imported = json.loads(done.stdout)
    assert "lorax_async.loader" in imported["modules"]
    assert not {module.split(".")[0] for module in imported["modules"]} & HEAVY
    # The engine adapters, the server and the command line are imported by those who use them.
    optional = ("lorax_async.engines", "lorax_async.server", "lorax_async.cli")
    assert not [name for name in imported["modules"] if name.startswith(optional)]
    before, after = imported["before"], imported["after"]
    assert len(before) == 14
    assert {name: after[name] for name in before if after[name] != before[name]} == {}
    assert imported["ours"] == [["NullHandler"], 0, True], "levels and handlers are the program's"
    assert (imported["others"], imported["loop"]) == ([], False)


LOADS = """
import asyncio, json, pathlib, sys, threading
import tiny
from hub_stand_in import HubStandIn
from lorax_async import AdapterLoader, Allow, LoaderConfig
from lorax_async.adapters import Recipe, merge_folders

folder, imported = pathlib.Path(sys.argv[1]), {}

class Recorder:
    def find_spec(self, name, *_):
        on_loop = threading.current_thread() is threading.main_thread()
        imported.setdefault(on_loop, []).append(name)

async def load(hub, *ids):
    host, port = hub.store_netloc.split(":")
    config = LoaderConfig(
        hub_endpoint=hub.endpoint, allow=[Allow("hub", use_token=True), Allow("http", host, int(port))],
        cache_dir=folder / "cache", hub_cache_dir=folder / "hub", device_bytes=1 << 20,
    )
    async with AdapterLoader(tiny.layout(), config) as loader:
        recipe = Recipe("ties", [1, 1], density=0.5)
        merged = await asyncio.to_thread(merge_folders, [one, two], recipe, tiny.layout())
        (await loader.load_tensors("both", *merged)).release()
        loads = await asyncio.gather(*map(loader.load, ids), return_exceptions=True)
        for handle in loads[:-1]:
            handle.release()
        return type(loads[-1]).__name__

one, two = (tiny.write(folder / name, seed) for seed, name in enumerate(("one", "two")))
files = dict(zip(("adapter_config.json", "adapter_model.safetensors"), tiny.files(one)))
with HubStandIn() as hub:
    hub.put("org/one", files)
    sys.meta_path.insert(0, Recorder())
    ids = one, "org/one", "org/missing"
    print(json.dumps([asyncio.run(load(hub, *ids)), imported, "peft" in sys.modules]))
"""


def test_loads_import_nothing_on_the_event_loop(tmp_path: Path) -> None:
    """A folder's, a merge's and the hub's; the thread that uses a package imports it."""
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=paths, check=True
    )
    missing, imported, has_peft = json.loads(done.stdout)
    assert (missing, list(imported)) == ("AccessDeniedError", ["false"])
    assert not has_peft, "a merge runs one file of it: all of it takes seconds"
    assert {"peft", "huggingface_hub", "httpx2"} <= set(imported["false"])
