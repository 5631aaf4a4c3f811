"""A torch device for tests, "late": host memory whose streams work later than they were asked to.

The C++ beside this file is a PrivateUse1 backend. Code for an accelerator that is written on
`torch.Stream`, `torch.Event`, `torch.accelerator`, `Tensor.copy_` and pinned memory runs on it
unchanged, and a wait that it lacks shows as wrong bytes.

There are two devices, without copies between them. Each stream is a FIFO; `copy_`, `fill_` and
`zero_` are put on the current one. A copy from or to memory that is not pinned, or with
`non_blocking=False`, waits for its end; all other operators run on the CPU after what is on the
current stream: with the gate shut they block. An event that was never recorded is done.

Memory starts as bytes of `POISON`, and more than 1 GiB at once is out of memory. What is freed
becomes poison in the order of the stream it was allocated on; pinned memory lives until the copies
that use it are done. What is queued at exit is dropped. Nothing holds the GIL while it waits.
"""

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.backend_registration import rename_privateuse1_backend

POISON = 0xFB
DEVICES = 2

_SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in {".h", ".cpp"})
_UNLIMITED = -1
_EVERY_STREAM = -1


class NotBuilt(RuntimeError):
    """The late device cannot be built here; the text says why."""


class _DeviceModule(ModuleType):
    """What `torch.accelerator`, `torch.manual_seed` and `fork_rng` ask of `torch.late`.

    Random numbers come from the CPU's generator: there is no state beside it.
    """

    visible = 1

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.visible

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        pass


_MODULE = _DeviceModule("torch.late")


@cache
def load() -> None:
    """Register the device "late" in this process; build it first (10 s) if necessary."""
    _library()
    rename_privateuse1_backend("late")
    vars(torch)["_register_device_module"]("late", _MODULE)


def hold(stream: torch.Stream | None = None) -> None:
    """Let a stream, or all (None), start nothing more. Default streams are held as one."""
    allow(0, stream)


def release(stream: torch.Stream | None = None) -> None:
    allow(_UNLIMITED, stream)


def allow(items: int, stream: torch.Stream | None = None) -> None:
    """Let the stream start this many items (copies, fills, records, waits), then hold it."""
    _library().late_set_allowance(_EVERY_STREAM if stream is None else stream.stream_id, items)


@contextmanager
def held(stream: torch.Stream | None = None) -> Iterator[None]:
    hold(stream)
    try:
        yield
    finally:
        release(stream)


def fail_allocations(*, device: int = 0, pinned: int = 0) -> None:
    """Fail the next allocations: `torch.OutOfMemoryError`, pinned `torch.AcceleratorError`."""
    _library().late_fail_allocations(device, pinned)


def lose() -> None:
    """Drop queued work; streams and events raise `torch.AcceleratorError` until restored.

    This `RuntimeError` is what CUDA raises. Threads that wait are woken.
    """
    _library().late_set_lost(True)


def restore() -> None:
    _library().late_set_lost(False)


def show_devices(count: int) -> None:
    """Set the device count of `torch.accelerator`, 1 or 2. `fork_rng` warns if there are two."""
    _MODULE.visible = count


def pending() -> int:
    return int(_library().late_pending())


def reset() -> None:
    """Run queued work, then restore the state after `load`. For the end of a test."""
    restore()
    fail_allocations()
    show_devices(1)
    release()
    for device in range(DEVICES):
        torch.accelerator.synchronize(device)


@cache
def _library() -> ctypes.CDLL:
    built = library_path()
    library = ctypes.CDLL(str(built))  # its functions are called without the GIL
    library.late_set_allowance.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.late_fail_allocations.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.late_set_lost.argtypes = [ctypes.c_bool]
    library.late_pending.restype = ctypes.c_int64
    atexit.register(library.late_end)  # while the interpreter still is one
    return library


def library_path() -> Path:
    """Return the library in the cache; compile it if it is missing. Raises `NotBuilt`."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NotBuilt("the late device needs g++, or another compiler named by CXX")
    command = _command(compiler)
    target = _cache() / f"late-device-{_digest(command)}.so"
    if not target.exists():
        _compile(command, target)
    return target


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lorax-async"


def _command(compiler: str) -> list[str]:
    abi = int(torch.compiled_with_cxx11_abi())
    # torch.utils.cpp_extension knows these paths, and warns where it finds nvcc and no GPU.
    torch_folder = Path(torch.__file__).parent
    headers = torch_folder / "include", torch_folder / "include/torch/csrc/api/include"
    return [
        *(compiler, "-std=c++20", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(option for path in headers for option in ("-isystem", str(path))),
        *(str(path) for path in _SOURCES if path.suffix == ".cpp"),
        f"-L{torch_folder / 'lib'}",
        *("-lc10", "-ltorch_cpu", "-pthread"),
    ]


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256("\0".join([torch.__version__, *command]).encode())
    for path in _SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NotBuilt(f"the late device does not compile: {done.stderr[-2000:]}")
        made.replace(target)  # a concurrent build finds all of it or nothing
