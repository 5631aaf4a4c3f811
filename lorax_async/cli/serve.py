"""`lorax-async serve`: an OpenAI-compatible server whose requests name adapters."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_async.cli.arguments import (
    ID_HELP,
    OK,
    SIZE_HELP,
    TOKENS,
    AddParser,
    add_base,
    add_caches,
    add_command,
    as_place,
    as_size,
    as_source,
    number_from,
    opened,
    sources_of,
)
from lorax_async.cli.measure import run_on_uvloop
from lorax_async.cli.terminal import Terminal
from lorax_async.config import DTYPES, Limits, LoaderConfig
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.errors import AdapterError, ConfigError
from lorax_async.ids.parsing import parse_place
from lorax_async.sources.local_folder import CONFIG, find_adapter
from lorax_async.types import AdapterId, AdapterRef

if TYPE_CHECKING:
    from lorax_async.server.server_settings import ServerSettings
    from lorax_async.server.service import ServedModel, ServerCapacity


ADMIN_TOKEN = "LORAX_ADMIN_TOKEN"  # noqa: S105 - the variable's name
PORT = 8000
SWITCH_SECONDS = 0.0005
"""How long a thread may hold the GIL while the event loop waits: Python's 5 ms are a token's whole
budget of bookkeeping, and several threads wait in turn."""


def add_to(add: AddParser) -> None:
    about = "serve a base model and its adapters to OpenAI's clients"
    more = (
        "A request's `model` is the base's name, a name given here, or an id below a --source;"
        " no other id is asked for anywhere."
        f" Calls that load and unload need the token in {ADMIN_TOKEN}. {TOKENS}"
    )
    parser = add_command(add, "serve", about, _serve, more)
    add_base(parser, required=True)
    _add_adapters(parser)
    _add_place(parser)
    _add_room(parser)
    add_caches(parser)


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help="adapters that requests call by name: an adapter's folder, a folder of such folders,"
        f" or {ID_HELP}; without NAME it is the last part of the path",
    )
    parser.add_argument(
        "--source",
        action="append",
        type=as_source,
        default=[],
        metavar="PLACE",
        help="where requests may take adapters from, by their ids: a URL that ends with / (https,"
        " http, s3, gs, az), or a folder; repeatable. hub is all of the hub, asked without a token;"
        " hub:ORG/ is one organisation, asked with yours. Without it requests name --adapters only",
    )
    parser.add_argument(
        "--offline",
        action="store_true",
        help="ask no source: adapters come from folders and from what the caches have",
    )
    parser.add_argument(
        "--warm",
        type=Path,
        metavar="FILE",
        help="keep a list of the adapters on the device there, and begin with those that it names",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="to listen at (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=number_from(0, 65535),
        default=PORT,
        metavar="N",
        help="0 is any (default: %(default)s)",
    )
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="names and addresses by which clients may call the server: *.NAME is all below it, *"
        " is all (default: this machine's own where it listens to this machine alone, else all)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (default: float32 on cpu, bfloat16 on cuda)"
    )


def _add_room(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device-bytes",
        type=as_size,
        default="256MiB",
        metavar="N",
        help=f"the room for adapters: {SIZE_HELP} (default: %(default)s)",
    )
    parser.add_argument(
        "--max-slots", type=int, default=8, metavar="N", help="adapters on the device at a time"
    )
    parser.add_argument(
        "--max-sequences",
        type=int,
        default=16,
        metavar="N",
        help="sequences under way at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-share",
        type=as_share,
        default=0.5,
        metavar="X",
        help="of these, what one adapter and one client has at most while others wait, above 0 and"
        " up to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of a sequence, the new ones included (default: %(default)s)",
    )


def as_share(text: str) -> float:
    """Parse a share, for argparse."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; it is above 0 and at most 1")
    return share


def _serve(arguments: argparse.Namespace, terminal: Terminal) -> int:
    try:
        from lorax_async.server.server_settings import ServerSettings  # noqa: PLC0415
        from lorax_async.server.service import ServedModel, ServerCapacity  # noqa: PLC0415 - of the extra `serve`
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lorax-async[serve]'") from error
    cuda = arguments.device == "cuda"
    dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    adapters = named(arguments.adapters)
    allowed_hosts = _require_ready(arguments)
    settings = ServerSettings(
        base="smollm2" if arguments.base == "smollm2" else Path(arguments.base).resolve().name,
        adapters=adapters,
        sources=opened(arguments),
        admin_token=os.environ.get(ADMIN_TOKEN) or None,
        allowed_hosts=allowed_hosts,
    )
    config = LoaderConfig(
        dtype=dtype,
        device=arguments.device,
        device_bytes=arguments.device_bytes,
        max_slots=arguments.max_slots,
        **sources_of(
            arguments, [each for each in adapters.values() if isinstance(each, AdapterRef)]
        ),
    )
    capacity = ServerCapacity(
        sequences=arguments.max_sequences,
        length=arguments.max_length,
        share=arguments.max_share,
    )
    with terminal.steps() as report:
        base = arguments.base
        folder = prepare_base(progress=report) if base == "smollm2" else Path(base)
        report("loading the base model")
        loaded = ServedModel.load(folder, dtype=dtype, device=arguments.device)
    as_application()
    run_on_uvloop(_run(arguments, terminal, loaded, config, settings, capacity))
    return OK


def _require_ready(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Return the names by which the server may be called; None is any.

    Raise `ConfigError` for faults that would otherwise show after the base model was loaded.
    """
    from lorax_async.server.warm_list import read_warm_list  # noqa: PLC0415

    if arguments.warm is not None:
        read_warm_list(arguments.warm)
    with _listener(arguments) as listener:
        return hosts_of(listener, arguments.host, arguments.allowed_hosts)


def hosts_of(
    listener: socket.socket, host: str, given: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Return `given`, or this machine's own names if only this machine can connect.

    A page in a browser of this machine could use another name (DNS rebinding).
    """
    from lorax_async.server.server_settings import LOOPBACK  # noqa: PLC0415

    if given is not None:
        return tuple(given)
    if not ip_address(listener.getsockname()[0]).is_loopback:
        return None
    return (*LOOPBACK, host.encode("idna").decode())


def _listener(arguments: argparse.Namespace) -> socket.socket:
    from lorax_async.server.serving import listen  # noqa: PLC0415

    try:
        return listen(arguments.host, arguments.port)
    except OSError as error:
        raise ConfigError(f"{arguments.host}:{arguments.port}: {error}") from error


def as_application() -> None:
    """Make settings of the whole process: the command owns it."""
    import torch  # noqa: PLC0415

    sys.setswitchinterval(SWITCH_SECONDS)
    # Leave cores to the event loop and the loader's threads, or tokens wait for them.
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    # Exempt the libraries from collections, which would stop the loop for tenths of a second.
    gc.collect()
    gc.freeze()


async def _run(
    arguments: argparse.Namespace,
    terminal: Terminal,
    base: ServedModel,
    config: LoaderConfig,
    settings: ServerSettings,
    capacity: ServerCapacity,
) -> None:
    from lorax_async.server.service import open_service  # noqa: PLC0415
    from lorax_async.server.serving import serve  # noqa: PLC0415

    with _listener(arguments) as listener:
        async with open_service(base, config, settings, capacity, arguments.warm) as service:
            await serve(
                service, listener, ready=lambda: _tell(listener, settings, arguments.json, terminal)
            )


def _tell(
    listener: socket.socket, settings: ServerSettings, as_json: bool, terminal: Terminal
) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if as_json:
        told: dict[str, Any] = {"url": url, "models": [settings.base, *settings.adapters]}
        terminal.json(told)
        return
    terminal.say(f"serving {', '.join([settings.base, *settings.adapters])} at {url}", "bold")
    terminal.say(curl(url, next(iter(settings.adapters), settings.base)))


def how_to_serve(adapters: Path) -> tuple[str, str]:
    """Return two shell commands for this folder: serve the demo's adapters, and ask one."""
    program = os.path.relpath(Path(sys.executable).with_name("lorax-async"))
    serving = shlex.join([program, "serve", "--base", "smollm2", "--adapters", str(adapters)])
    return serving, curl(f"http://127.0.0.1:{PORT}", "pirate")


def curl(url: str, model: str) -> str:
    """Return a shell command that asks a model."""
    asked = {"model": model, "messages": [{"role": "user", "content": "What is ice?"}]}
    return shlex.join(
        [
            *("curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"),
            *("-d", json.dumps(asked)),
        ]
    )


def named(given: Sequence[str]) -> dict[str, AdapterId]:
    """Return the adapters of `--adapters` by name. Raise `ConfigError`."""
    found: dict[str, AdapterId] = {}
    for text in given:
        name, separator, place = text.partition("=")
        if not separator or "/" in name:
            name, place = "", text
        for each, adapter in _places(name, place):
            if each in found:
                raise ConfigError(f"two adapters are called {each!r}; name one: NAME=PATH")
            found[each] = adapter
    return found


def _places(name: str, place: str) -> list[tuple[str, AdapterId]]:
    folder = Path(place)
    if folder.is_dir() and not (folder / CONFIG).exists() and not name:
        below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if not below:
            raise ConfigError(f"{folder} is no adapter, and holds none")
        for path in below:
            _require_adapter(path)
        return [(path.name, path.resolve()) for path in below]
    try:
        ref = as_place(place)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--adapters: {error}") from None
    if isinstance(ref.id, Path):
        _require_adapter(ref.id)
        return [(name or ref.id.resolve().name, ref.id.resolve())]
    return [(name or ref.text.rstrip("/").rpartition("/")[2].partition("@")[0], ref)]


def _require_adapter(folder: Path) -> None:
    """Raise `ConfigError` for a folder without an adapter's files, which are not read."""
    if not folder.is_dir():
        raise ConfigError(
            f"--adapters: there is no folder {folder}; an adapter on the hub is org/name"
        )
    try:
        find_adapter(parse_place(AdapterRef(folder.absolute()), ()), (), Limits())
    except AdapterError as error:
        raise ConfigError(f"--adapters: {folder}: {error.problem}") from error
