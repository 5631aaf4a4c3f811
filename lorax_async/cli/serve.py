"""`lorax-async serve`: run an OpenAI-compatible server whose requests name adapters."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_async.cli.command_line import (
    ID_HELP,
    OK,
    TOKENS,
    AddParser,
    Terminal,
    adapter_folders,
    add_base,
    add_caches,
    add_command,
    add_device,
    add_device_bytes,
    allow_below,
    as_id,
    as_place,
    base_folder,
    integer_parser,
    loader_settings,
    run_on_uvloop,
)
from lorax_async.config import Limits, LoaderConfig
from lorax_async.errors import AdapterError, ConfigError, shorten
from lorax_async.ids import Allow
from lorax_async.sources.local import CONFIG, find_trusted_adapter
from lorax_async.types import AdapterId, AdapterRef

if TYPE_CHECKING:
    from lorax_async.server.server_settings import ServerSettings
    from lorax_async.server.service import ServedModel, ServerCapacity

ADMIN_TOKEN = "LORAX_ADMIN_TOKEN"  # noqa: S105 - the variable's name
API_KEY = "LORAX_API_KEY"
PORT = 8000
SWITCH_SECONDS = 0.0005
"""Python's switch interval for threads that wait for the GIL. The default of 5 ms is longer than a
token's bookkeeping may take, and several threads wait in turn."""


def add_to(add: AddParser) -> None:
    about = "serve a base model and its adapters to OpenAI clients"
    more = (
        "A request's `model` is the base's name, a name in --adapters, or an id below a --source;"
        " other ids are refused without a look-up."
        f" Calls that load and unload need the token in {ADMIN_TOKEN}, and if {API_KEY} is set,"
        f" OpenAI's calls need that key. {TOKENS}"
    )
    parser = add_command(add, "serve", about, _serve, more)
    add_base(parser, required=True)
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help="adapters that requests call by name: an adapter's folder, a folder of such folders,"
        f" or {ID_HELP}; NAME defaults to the last part of the path",
    )
    parser.add_argument(
        "--source",
        action="append",
        type=as_source,
        default=[],
        metavar="PLACE",
        help="a place whose adapters requests may name by id: a URL that ends with / (https, http,"
        " s3, gs, az), or a folder; repeatable. hub is all of the hub, without a token; hub:ORG/ is"
        " one organisation, with your token. Without it, requests can name --adapters only",
    )
    parser.add_argument(
        "--offline",
        action="store_true",
        help="use no network: take adapters from folders and caches only",
    )
    parser.add_argument(
        "--warm",
        type=Path,
        metavar="FILE",
        help="load the adapters listed in FILE at the start, and keep the list up to date",
    )
    parser.add_argument("--host", default="127.0.0.1", help="listen at (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=integer_parser(0, 65535),
        default=PORT,
        metavar="N",
        help="0 chooses a free port (default: %(default)s)",
    )
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="host names and addresses that requests may use: *.NAME is any name below NAME, * any"
        " host (default: this machine's own if only this machine can connect, else any)",
    )
    parser.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help=f"OpenAI's calls need one of these keys (default: {API_KEY}, which other users of the"
        " machine cannot see; without either, no key)",
    )
    _add_capacity(parser)
    add_caches(parser)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    """Add the device and what fits on it."""
    add_device(parser, "to compute in (default: float32 on cpu, bfloat16 on cuda)")
    add_device_bytes(parser)
    share = "share of these that one adapter, or one client, may use while others wait: above 0,"
    length = "most tokens of a sequence,"
    for option, kind, default, about in (
        ("--max-slots", int, 8, "adapters on the device at a time"),
        ("--max-sequences", int, 16, "most sequences at a time (default: %(default)s)"),
        ("--max-share", as_share, 0.5, f"{share} up to 1 (default: %(default)s)"),
        ("--max-length", int, 2048, f"{length} new ones included (default: %(default)s)"),
    ):
        metavar = "X" if kind is as_share else "N"
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=about)


def as_share(text: str) -> float:
    """Parse a share, for argparse."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and up to 1")
    return share


def as_source(text: str) -> Allow | Path:
    """Parse a place with adapters, for argparse: a local folder, or an allowed remote one."""
    if text == "hub" or text.startswith("hub:"):
        try:
            return Allow("hub", prefix=text[4:], use_token=bool(text[4:]))
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.problem) from None
    if "://" in text:
        return allow_below(as_id(text))
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{shorten(text, 200)!r} is not a folder")
    return Path(text)


def request_sources(arguments: argparse.Namespace) -> tuple[Allow, ...]:
    """Return the remote places that `--source` opens to requests; folders are in `local_roots`."""
    return tuple(source for source in arguments.source if isinstance(source, Allow))


def server_loader_settings(
    arguments: argparse.Namespace, refs: Sequence[AdapterRef]
) -> dict[str, Any]:
    """Return `--source` and the cache options as arguments of `LoaderConfig`, with `refs` allowed.

    All of the hub is allowed: the operator may load any adapter later. Requests are limited to
    `request_sources`.
    """
    folders = tuple(source for source in arguments.source if isinstance(source, Path))
    arguments.allow = [*request_sources(arguments), Allow("hub")]
    return loader_settings(arguments, refs) | {"local_roots": folders}


def _serve(arguments: argparse.Namespace, terminal: Terminal) -> int:
    try:
        from lorax_async.server.server_settings import ServerSettings  # noqa: PLC0415
        from lorax_async.server.service import ServedModel, ServerCapacity  # noqa: PLC0415 - of the extra `serve`
        from lorax_async.server.warm_list import read_warm_list  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"{error}; run: pip install 'lorax-async[serve]'") from error
    base, device = arguments.base, arguments.device
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    adapters = find_adapters(arguments.adapters)
    # Faults that would otherwise appear after the base model is loaded:
    if arguments.warm is not None:
        read_warm_list(arguments.warm)
    with _listener(arguments) as listener:
        allowed_hosts = choose_hosts(listener, arguments.host, arguments.allowed_hosts)
    settings = ServerSettings(
        base="smollm2" if base == "smollm2" else Path(base).resolve().name,
        adapters=adapters,
        sources=request_sources(arguments),
        admin_token=os.environ.get(ADMIN_TOKEN) or None,
        api_keys=_api_keys(arguments),
        allowed_hosts=allowed_hosts,
    )
    refs = [id for id in adapters.values() if isinstance(id, AdapterRef)]
    config = LoaderConfig(
        dtype=dtype,
        device=device,
        device_bytes=arguments.device_bytes,
        max_slots=arguments.max_slots,
        **server_loader_settings(arguments, refs),
    )
    capacity = ServerCapacity(
        sequences=arguments.max_sequences, length=arguments.max_length, share=arguments.max_share
    )
    with terminal.steps() as report:
        folder = base_folder(base, report)
        report("loading the base model")
        model = ServedModel.load(folder, dtype=dtype, device=device)
    tune_process()
    run_on_uvloop(_run(arguments, terminal, model, config, settings, capacity))
    return OK


def _api_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys of --api-key, or else the variable's. Raise `ConfigError`."""
    if arguments.api_key is not None:
        return tuple(arguments.api_key)
    key = os.environ.get(API_KEY)
    if key == "":  # a secret that was not filled in must not open the server
        raise ConfigError(f"{API_KEY} is empty; set a key, or unset it to need none")
    return () if key is None else (key,)


def choose_hosts(
    listener: socket.socket, host: str, names: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Return `names`, or by default this machine's own names if only this machine can connect.

    Otherwise a page in a browser of this machine could call the server (DNS rebinding).
    """
    from lorax_async.server.server_settings import LOOPBACK  # noqa: PLC0415

    if names is not None:
        return tuple(names)
    if not ip_address(listener.getsockname()[0]).is_loopback:
        return None
    return (*LOOPBACK, host.encode("idna").decode())


def _listener(arguments: argparse.Namespace) -> socket.socket:
    from lorax_async.server.app import listen  # noqa: PLC0415

    try:
        return listen(arguments.host, arguments.port)
    except OSError as error:
        raise ConfigError(f"{arguments.host}:{arguments.port}: {error}") from error


def tune_process() -> None:
    """Change settings of the whole process, which belongs to the command."""
    import torch  # noqa: PLC0415

    sys.setswitchinterval(SWITCH_SECONDS)
    # Leave cores to the event loop and the loader's threads: tokens would wait for them.
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    # Exempt imported libraries from collections, which would stop the loop for tenths of a second.
    gc.collect()
    gc.freeze()


async def _run(
    arguments: argparse.Namespace,
    terminal: Terminal,
    model: ServedModel,
    config: LoaderConfig,
    settings: ServerSettings,
    capacity: ServerCapacity,
) -> None:
    from lorax_async.server.app import serve  # noqa: PLC0415
    from lorax_async.server.service import open_service  # noqa: PLC0415

    with _listener(arguments) as listener:
        async with open_service(model, config, settings, capacity, arguments.warm) as service:
            announce = partial(_announce, arguments, listener, settings, terminal)
            await serve(service, listener, ready=announce)


def _announce(
    arguments: argparse.Namespace,
    listener: socket.socket,
    settings: ServerSettings,
    terminal: Terminal,
) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if arguments.json:
        terminal.json({"url": url, "models": [settings.base, *settings.adapters]})
        return
    terminal.say(f"serving {', '.join([settings.base, *settings.adapters])} at {url}", "bold")
    model = next(iter(settings.adapters), settings.base)
    terminal.say(curl_command(url, model, with_key=bool(settings.api_keys)))


def serve_commands(adapters: Path) -> tuple[str, str]:
    """Return two shell commands: serve the demo's adapters in this folder, and query one."""
    program = os.path.relpath(Path(sys.executable).with_name("lorax-async"))
    serve = shlex.join([program, "serve", "--base", "smollm2", "--adapters", str(adapters)])
    return serve, curl_command(f"http://127.0.0.1:{PORT}", "pirate")


def curl_command(url: str, model: str, *, with_key: bool = False) -> str:
    """Return a shell command that queries a model; `with_key`, with the key in the environment."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is ice?"}]}
    key = [f'-H "Authorization: Bearer ${API_KEY}"'] if with_key else []
    return " ".join(
        [
            shlex.join(["curl", f"{url}/v1/chat/completions"]),
            *key,
            shlex.join(["-H", "Content-Type: application/json", "-d", json.dumps(body)]),
        ]
    )


def find_adapters(texts: Sequence[str]) -> dict[str, AdapterId]:
    """Return the adapters of `--adapters` by name. Raises `ConfigError`."""
    adapters: dict[str, AdapterId] = {}
    for text in texts:
        prefix, separator, place = text.partition("=")
        if not separator or "/" in prefix:
            prefix, place = "", text
        for name, adapter in _find_in(prefix, place):
            if name in adapters:
                raise ConfigError(f"two adapters are named {name!r}; rename one: NAME=PATH")
            adapters[name] = adapter
    return adapters


def _find_in(name: str, place: str) -> list[tuple[str, AdapterId]]:
    """Return the adapter at `place`, under `name` if given, or all adapters in that folder."""
    folder = Path(place)
    if folder.is_dir() and not (folder / CONFIG).exists() and not name:
        paths = adapter_folders(folder)
        names = [path.name for path in paths]
    else:
        try:
            ref = as_place(place)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--adapters: {error}") from None
        if not isinstance(ref.id, Path):
            last = ref.text.rstrip("/").rpartition("/")[2]
            return [(name or last.partition("@")[0], ref)]
        paths, names = [ref.id], [name or ref.id.resolve().name]
    for path in paths:  # do not read their files
        if not path.is_dir():
            raise ConfigError(
                f"--adapters: there is no folder {path}; an adapter on the hub is org/name"
            )
        try:
            find_trusted_adapter(path.absolute(), Limits())
        except AdapterError as error:
            raise ConfigError(f"--adapters: {path}: {error.problem}") from error
    return [(name, path.resolve()) for name, path in zip(names, paths, strict=True)]
