"""Convert `adapter_model.bin`, a pickle, to safetensors, in a process of its own.

A pickle can run any code. The child process, which runs this module, unpickles with torch's
restricted unpickler (`weights_only`) under limits of memory, CPU time and file size. It gets the
two open files, none of this process's environment, and ends with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from tempfile import mkstemp
from typing import TYPE_CHECKING

from lorax_async.config import Limits
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    InternalError,
    LoraxError,
    UnsafeFileError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)
from lorax_async.files import code_of, locate, require_file, to_adapter_error
from lorax_async.formats.peft_names import PICKLE_FILE, PREFIX, WEIGHT_DTYPES, WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

SECONDS = 120.0
"""The default limit of time; 4 GiB take about 10 s."""

_FIXED_BYTES = 256 << 20
"""Memory for the unpickler and torch's work, beside four times the file's size: the map of the
file, the tensors, which may have shared their bytes, and the bytes that are written."""

_POLL_SECONDS = 0.05
_MAX_REPORT = 64 << 10
"""Bytes of a pipe: a child that writes more blocks until its time is over."""

_PR_SET_PDEATHSIG = 1
_ZIP = b"PK\x03\x04"
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REPORTED = (
    AdapterFormatError,
    FetchError,
    UnsafeFileError,
    UnsupportedAdapterError,
    InternalError,
)


def convert(
    folder: Path,
    limits: Limits | None = None,
    *,
    seconds: float = SECONDS,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Path:
    """Write the weights of a folder's pickle as safetensors beside it; return the new file. Blocks.

    The folder is trusted: links are followed. The file appears whole, by one link, and none is
    overwritten: `UsageError`. Raise `UnsafeFileError` for a pickle that holds more than tensors or
    goes over a limit, and as a load for one that is missing, malformed or not supported. Nothing
    else is left, also after an error or a cancellation (`FetchError`).
    """
    target = folder / WEIGHTS_FILE
    if target.exists():
        raise _exists_error(target)
    limits = limits or Limits()
    try:
        with locate(os.fspath(folder / PICKLE_FILE)) as file:
            require_file(PICKLE_FILE, file, limits.max_adapter_bytes)
            mode, pickled = stat.S_IMODE(file.status.st_mode), file.open()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterNotFoundError(f"there is no {PICKLE_FILE} in {folder}") from error
    except OSError as error:
        raise to_adapter_error(error, PICKLE_FILE) from error
    written, name = -1, None
    try:
        written, name = mkstemp(prefix=f".{WEIGHTS_FILE}-", dir=folder)
        _run(pickled, written, limits.max_adapter_bytes, seconds, is_cancelled)
        os.fchmod(written, mode & 0o666)
        os.fsync(written)
        os.link(name, target)  # a rename would overwrite a file that was saved meanwhile
    except FileExistsError:
        raise _exists_error(target) from None
    except OSError as error:
        raise _write_error(error) from error
    finally:
        if name is not None:
            os.unlink(name)
            os.close(written)
        os.close(pickled)
    with suppress(OSError):  # after a crash the pickle is still there
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)
    return target


def convert_open(pickled: int, limits: Limits, is_cancelled: Callable[[], bool]) -> int:
    """Convert an open pickle; return a descriptor of the safetensors, in memory. Blocks.

    Raise as `convert`. The caller closes both.
    """
    written = os.memfd_create(WEIGHTS_FILE)
    try:
        _run(pickled, written, limits.max_adapter_bytes, SECONDS, is_cancelled)
    except BaseException:
        os.close(written)
        raise
    return written


def _write_error(error: OSError) -> FetchError:
    return FetchError(
        f"{WEIGHTS_FILE} cannot be written ({code_of(error)}); check the disk and its folder, or"
        " convert a copy elsewhere"
    )


def _exists_error(target: Path) -> UsageError:
    return UsageError(
        f"{target} exists already, and loads read it in place of {PICKLE_FILE}; remove it to"
        " convert again"
    )


def _run(
    pickled: int, written: int, max_bytes: int, seconds: float, is_cancelled: Callable[[], bool]
) -> None:
    """Convert between two descriptors in a child process; raise what it reports."""
    # No token of ours, and no module from the current folder.
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.fspath(Path(__file__).parents[2]), environment.get("PYTHONPATH")
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    arguments = [pickled, written, max_bytes, max(1, round(seconds))]
    deadline = time.monotonic() + seconds
    with subprocess.Popen(  # noqa: S603 - this program and four numbers
        [sys.executable, "-P", "-m", __name__, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(pickled, written),
        env=environment,
        start_new_session=True,  # Ctrl-C ends this process, and this process the child
    ) as child:
        assert child.stdout is not None
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    status = child.wait(_POLL_SECONDS)
                    break
                if is_cancelled():
                    raise FetchError("no caller waits for the adapter any more")
                if time.monotonic() > deadline:
                    raise _over_limit(f"{seconds:g} s")
        except BaseException:
            child.kill()
            raise
        report = os.read(child.stdout.fileno(), _MAX_REPORT)
    if status < 0:
        raise _over_limit(f"time or memory (signal {-status})")
    if status or report:
        raise _error_of(report, status)


_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH")


def _over_limit(what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"reading {PICKLE_FILE} took more than the limit of {what}, which no adapter needs; get its"
        " weights as safetensors from its author"
    )


def _error_of(report: bytes, status: int) -> LoraxError:
    kinds = {kind.__name__: kind for kind in _REPORTED}
    with suppress(ValueError, KeyError, TypeError):
        kind, problem = json.loads(report)
        return kinds[kind](problem)
    return InternalError(f"the process that reads {PICKLE_FILE} ended with status {status}")


# -- the child ------------------------------------------------------------------------------------


def main(pickled: int, written: int, max_bytes: int, seconds: int) -> None:
    """Convert between two descriptors, and print the error, if any, as JSON."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        import torch  # noqa: PLC0415 - for the child only

        torch.set_num_threads(1)
        size = os.fstat(pickled).st_size
        with open("/proc/self/statm") as status:
            memory = int(status.read().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, memory + 4 * size + _FIXED_BYTES)
        _lower(resource.RLIMIT_CPU, seconds)
        _lower(resource.RLIMIT_FSIZE, max_bytes + Limits().max_header_bytes)
        _lower(resource.RLIMIT_CORE, 0)
        _save(_load(pickled), written, max_bytes)
    except LoraxError as error:
        problem = type(error).__name__, error.problem
    except MemoryError:
        problem = UnsafeFileError.__name__, _over_limit("memory").problem
    except Exception as error:  # noqa: BLE001 - reported
        problem = InternalError.__name__, f"{PICKLE_FILE} was not converted: {error!r}"
    else:
        return
    sys.stdout.write(json.dumps(problem))


def _lower(limit: int, value: int) -> None:
    """Lower a limit of this process for good."""
    known = (value, *resource.getrlimit(limit))
    least = min(number for number in known if number != resource.RLIM_INFINITY)
    resource.setrlimit(limit, (least, least))


def _load(pickled: int) -> object:
    """Return what the restricted unpickler makes of the file, whose bytes it maps."""
    import torch  # noqa: PLC0415

    if os.pread(pickled, len(_ZIP), 0) != _ZIP:
        raise AdapterFormatError(
            f"{PICKLE_FILE} is not in torch's zip format: it was not saved by torch.save, or by"
            " torch before 1.6; save the adapter again"
        )
    try:
        return torch.load(
            f"/proc/self/fd/{pickled}", map_location="cpu", weights_only=True, mmap=True
        )
    except UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        what = f"calls {shorten(found[1], 200)}" if found else "holds more than tensors"
        raise UnsafeFileError(
            f"the pickle in {PICKLE_FILE} {what}, which weights do not need, and was not run; do"
            " not load it anywhere, and get the weights as safetensors from their author"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):
            raise MemoryError from error
        first = shorten(str(error).partition("\n")[0], 200)
        raise AdapterFormatError(
            f"{PICKLE_FILE} is damaged ({first}); fetch or save the adapter again"
        ) from error


def _save(state: object, written: int, max_bytes: int) -> None:
    """Write the tensors as safetensors, each with memory of its own; refuse anything else."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save  # noqa: PLC0415

    if not isinstance(state, dict) or not state:
        raise AdapterFormatError(f"{PICKLE_FILE} does not hold tensors by name")
    for name, tensor in state.items():
        _require_weight(name, tensor)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if nbytes > max_bytes:
        raise _over_limit(f"{max_bytes:,} bytes")
    try:
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        content = save(tensors, metadata={"format": "pt"})
    except RuntimeError as error:
        raise MemoryError from error
    try:
        with open(written, "wb", closefd=False) as file:
            file.write(content)
    except OSError as error:
        raise _write_error(error) from error


def _require_weight(name: object, tensor: torch.Tensor | object) -> None:
    """Raise unless it is a plain tensor of weights under a name of PEFT's."""
    import torch  # noqa: PLC0415

    if not isinstance(name, str) or type(tensor) not in {torch.Tensor, torch.nn.Parameter}:
        raise AdapterFormatError(f"{PICKLE_FILE} holds more than tensors by name")
    assert isinstance(tensor, torch.Tensor)
    what = f"tensor {shorten(name, 200)!r} of {PICKLE_FILE}"
    if not name.startswith(PREFIX):
        raise UnsupportedAdapterError(
            f"{what} is not PEFT's: those begin with {PREFIX!r}; save the adapter again with PEFT"
        )
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype)
    if dtype not in WEIGHT_DTYPES or tensor.is_sparse or tensor.device.type != "cpu":
        raise UnsupportedAdapterError(
            f"{what} is {tensor.dtype}, {tensor.layout}; save it as {', '.join(WEIGHT_DTYPES)}"
        )
    if tensor.ndim not in {1, 2} or 0 in tensor.shape:
        raise UnsupportedAdapterError(
            f"{what} has shape {list(tensor.shape)}; A, B and vectors have one or two positive"
            " dimensions"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
