"""`lorax-async serve`: run an OpenAI-compatible server whose requests name adapters."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from lorax_async.cli.command_line import (
    ABOUTS,
    ID_HELP,
    OK,
    SIZE_HELP,
    TOKENS,
    AddParser,
    Terminal,
    adapter_folders,
    add_base,
    add_caches,
    add_command,
    add_device,
    as_folder_or_id,
    as_size,
    as_source,
    base_folder,
    format_size,
    integer_parser,
    loader_settings,
    repeated,
    run_on_uvloop,
)
from lorax_async.config import (
    MAX_SLOTS,
    Checking,
    Eviction,
    Limits,
    LoaderConfig,
    LocalRoot,
    MiB,
    Root,
)
from lorax_async.errors import AdapterError, ConfigError, install_command
from lorax_async.formats.safetensors import header_size
from lorax_async.ids import Allow
from lorax_async.sources.local import CONFIG, WEIGHTS, find_trusted_adapter
from lorax_async.types import MAX_SECONDS, AdapterId, AdapterRef

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
    about = ABOUTS["serve"]
    more = (
        "A request's `model` is the base's name, a name in --adapters, or an id below a --source;"
        " other ids are refused without a look-up."
        f" Calls that load and unload need the token in {ADMIN_TOKEN}, and if {API_KEY} is set,"
        f" OpenAI's calls need that key. {TOKENS}"
    )
    parser = add_command(add, "serve", about, _serve, more)
    add_base(parser, required=True)
    _add_models(parser)
    _add_listening(parser)
    _add_capacity(parser)
    _add_loading(parser)
    add_caches(parser)
    _add_logging(parser)


def _add_models(parser: argparse.ArgumentParser) -> None:
    """Add what requests may name, and how it answers."""
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
        "--immutable-root",
        action="append",
        type=as_immutable_root,
        default=[],
        metavar="DIR",
        help="a --source DIR whose files are never changed in place nor cut short, so that they may"
        " stay mapped, within --host-bytes; repeatable",
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
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the base's name in requests (default: the last part of --base)",
    )
    parser.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="where requests do not say how to sample: as the base's generation_config.json does"
        " (auto, the default), or as OpenAI does (none)",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a chat template (Jinja) in place of the base's",
    )


def _add_listening(parser: argparse.ArgumentParser) -> None:
    """Add where it listens, and to whom."""
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
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="the path below which a proxy has the server, as /llm",
    )


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    """Add the device and what fits on it."""
    add_device(parser, "to compute in (default: float32 on cpu, bfloat16 on cuda)")
    share = "share of these that one adapter, or one client, may use while others wait: above 0,"
    length = "most tokens of a sequence,"
    count = integer_parser(1)
    for option, kind, default, about in (
        ("--max-slots", integer_parser(1, MAX_SLOTS), 8, "adapters on the device at a time"),
        ("--max-sequences", count, 16, "most sequences at a time (default: %(default)s)"),
        (
            "--max-share",
            number_parser(1, "a share"),
            0.5,
            f"{share} up to 1 (default: %(default)s)",
        ),
        ("--max-length", count, 2048, f"{length} new ones included (default: %(default)s)"),
    ):
        parser.add_argument(option, type=kind, default=default, metavar="N", help=about)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """Add settings of the loader that have no option of their own elsewhere."""
    parser.add_argument(
        "--eviction",
        choices=get_args(Eviction),
        help="which adapter goes when another needs its room (default: lru)",
    )
    parser.add_argument(
        "--verify",
        choices=get_args(Checking),
        help="when digests are checked: beside the load (stream, the default), before its use, at"
        " each load (always), or not (none)",
    )
    parser.add_argument(
        "--convert-bin",
        action="store_true",
        help="convert weights that are adapter_model.bin only, a pickle, once into the adapter"
        " cache, in a process with limits of memory and time (default: refuse them)",
    )
    for option, about in (
        ("--device-bytes", "device memory for adapters (default: a quarter of what is free)"),
        ("--host-bytes", "host memory for files of adapters that left the device"),
        ("--pinned-bytes", "page-locked memory for adapters that left the device; not on cpu"),
    ):
        parser.add_argument(option, type=as_size, metavar="N", help=f"{about}: {SIZE_HELP}")
    seconds = number_parser(MAX_SECONDS, "a number of seconds")
    help = "seconds to load an adapter (default: 300)"
    parser.add_argument("--timeout", type=seconds, metavar="S", help=help)
    parser.add_argument(
        "--max-rank",
        type=integer_parser(1),
        metavar="N",
        help="highest rank of an adapter that is accepted (default: 256)",
    )


def number_parser(maximum: float, kind: str) -> Callable[[str], float]:
    """Return a parser of numbers above 0 and up to `maximum`, for argparse."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if 0 < float(text) <= maximum:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind} above 0 and up to {maximum:g}")

    return parse


def as_immutable_root(text: str) -> LocalRoot:
    """Parse a folder whose files stay as they are, for argparse."""
    try:
        return LocalRoot(text, immutable=True)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.problem) from None


def request_sources(arguments: argparse.Namespace) -> tuple[Allow, ...]:
    """Return the remote locations that `--source` opens to requests, without folders."""
    return tuple(source for source in arguments.source if isinstance(source, Allow))


def server_loader_settings(
    arguments: argparse.Namespace, refs: Sequence[AdapterRef]
) -> dict[str, Any]:
    """Return `--source` and the cache options as arguments of `LoaderConfig`, with `refs` allowed.

    All of the hub is allowed: the operator may load any adapter later. Requests are limited to
    `request_sources`.
    """
    folders: list[Root] = [source for source in arguments.source if isinstance(source, Path)]
    arguments.allow = [*request_sources(arguments), Allow("hub")]
    roots = (*folders, *getattr(arguments, "immutable_root", ()))
    return loader_settings(arguments, refs) | {"local_roots": roots}


def _serve(arguments: argparse.Namespace, terminal: Terminal) -> int:
    with _logging_to(sys.stderr, arguments.log_level, arguments.log_format):
        with _log_step("importing the server"):
            try:
                importlib.import_module("lorax_async.server.app")
            except ImportError as error:  # of the extra `serve`
                raise ConfigError(f"{error}; {install_command('serve')}") from error
        with _log_step("reading adapters and settings"):
            settings, config, capacity = _read_settings(arguments)
        folder = Path(arguments.base)
        if arguments.base == "smollm2" or not folder.is_dir():
            with _log_step("preparing the base model"):
                folder = base_folder(
                    *(arguments.base, lambda _: None),
                    endpoint=config.hub_endpoint,
                    offline=config.offline,
                )
        with _log_step("loading the base model"):
            model = _load_base(arguments, folder, config)
        if arguments.device_bytes is None:
            config = replace(config, device_bytes=choose_device_bytes(model.model, config))
        tune_process()
        run_on_uvloop(_run(arguments, terminal, model, config, settings, capacity))
    return OK


def _read_settings(
    arguments: argparse.Namespace,
) -> tuple[ServerSettings, LoaderConfig, ServerCapacity]:
    """Raise `ConfigError` for what would otherwise fail once the base model is loaded."""
    from lorax_async.layouts import is_hub_id  # noqa: PLC0415
    from lorax_async.server.server_settings import ServerSettings  # noqa: PLC0415
    from lorax_async.server.service import ServerCapacity  # noqa: PLC0415
    from lorax_async.server.warm_list import read_warm_list  # noqa: PLC0415

    base, device = arguments.base, arguments.device
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    adapters = find_adapters(arguments.adapters)
    name = "smollm2" if base == "smollm2" else Path(base).resolve().name
    if base != "smollm2" and not Path(base).is_dir():
        if not is_hub_id(base):
            raise ConfigError(f"--base: there is no folder {base}")
        name = base.partition("@")[0].rpartition("/")[2]
    if arguments.warm is not None:
        read_warm_list(arguments.warm)
    if arguments.chat_template is not None:
        _read_template(arguments.chat_template)
    with _listener(arguments) as listener:
        allowed_hosts = choose_hosts(listener, arguments.host, arguments.allowed_hosts)
    settings = ServerSettings(
        base=name if arguments.served_model_name is None else arguments.served_model_name,
        adapters=adapters,
        sources=request_sources(arguments),
        admin_token=os.environ.get(ADMIN_TOKEN) or None,
        api_keys=_api_keys(arguments),
        allowed_hosts=allowed_hosts,
        root_path=arguments.root_path,
    )
    refs = [id for id in adapters.values() if isinstance(id, AdapterRef)]
    names = ("eviction", "verify", "host_bytes", "pinned_bytes", "timeout", "device_bytes")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.max_rank is not None:
        given["limits"] = Limits(max_rank=arguments.max_rank)
    config = LoaderConfig(
        dtype=dtype,
        device=device,
        max_slots=arguments.max_slots,
        convert_bin=arguments.convert_bin,
        **server_loader_settings(arguments, refs) | given,
    )
    capacity = ServerCapacity(
        sequences=arguments.max_sequences, length=arguments.max_length, share=arguments.max_share
    )
    return settings, config, capacity


def _load_base(arguments: argparse.Namespace, folder: Path, config: LoaderConfig) -> ServedModel:
    from lorax_async.server.engine import Sampling  # noqa: PLC0415
    from lorax_async.server.server_log import log_event  # noqa: PLC0415
    from lorax_async.server.service import ServedModel  # noqa: PLC0415

    model = ServedModel.load(folder, dtype=str(config.dtype), device=config.device)
    plain = Sampling()
    if arguments.chat_template is not None:
        model.tokenizer.chat_template = _read_template(arguments.chat_template)
        _require_template(model.tokenizer, arguments.chat_template)
    if arguments.generation_config == "none":
        model = replace(model, sampling=plain)
    if model.sampling != plain:
        values = {
            name: value for name, value in asdict(model.sampling).items() if value is not None
        }
        log_event("sampling by generation_config.json", **values)
    return model


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--chat-template: {path} cannot be read: {reason}") from error


def _require_template(tokenizer: Any, path: Path) -> None:
    """Raise `ConfigError` if the chat template is no Jinja; it may refuse the conversation here."""
    from jinja2 import TemplateError, TemplateSyntaxError  # noqa: PLC0415

    try:
        with suppress(TypeError, ValueError):
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"--chat-template: {path}, line {error.lineno}: {error}") from error
    except TemplateError:
        pass


# -- memory ---------------------------------------------------------------------------------------

SHARE_OF_FREE = 4
"""Adapters may have this part of the memory that the base model leaves free."""

USUAL_RANK = 64
"""Every slot has room for an adapter of this rank: more is seldom used, and takes time to claim."""


def choose_device_bytes(model: Any, config: LoaderConfig) -> int:
    """Return a quarter of the device's free memory, or less if the slots need less.

    That is room for adapters of `USUAL_RANK` in all slots, and for one of the highest rank.
    """
    from lorax_async.layouts import from_module  # noqa: PLC0415

    layout, highest = from_module(model), config.limits.max_rank
    width = sum(module.in_features + module.out_features for module in layout.modules)
    per_rank = width * (4 if config.dtype == "float32" else 2)
    ranks = max(highest, config.max_slots * min(highest, USUAL_RANK))
    return max(MiB, min(free_bytes(config.device) // SHARE_OF_FREE, per_rank * ranks))


def free_bytes(device: str, root: Path = Path("/")) -> int:
    """Return the free memory of a device; for "cpu", within the limits of its control groups.

    Raise `ConfigError` if the system below `root` does not say.
    """
    if device != "cpu":
        import torch  # noqa: PLC0415

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        fields = _read_fields(root / "proc/meminfo")
        free = int(fields["MemAvailable:"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        problem = "the system does not say how much memory is free; give --device-bytes"
        raise ConfigError(problem) from None
    return min([free, *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yield what each memory limit of the process's control groups, version 2 or 1, leaves."""
    lines = list[str]()
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        total = "total_" if controllers else ""
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            with suppress(OSError, ValueError, KeyError):  # no limit, or not in this container
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                fields = _read_fields(folder / "memory.stat")
                files = (fields[f"{total}{state}_file"] for state in ("active", "inactive"))
                yield max(0, limit - used + sum(map(int, files)))  # caches of files give way


def _read_fields(path: Path) -> dict[str, str]:
    """Return the values by name of a file of lines "name value"."""
    pairs = (line.split(None, 1) for line in path.read_text().splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


# -- serving --------------------------------------------------------------------------------------


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
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python adds the address
        remedy = "; choose another --port, or 0 for a free one"
        raise ConfigError(
            f"{arguments.host}:{arguments.port}: {reason}"
            + (remedy if error.errno == errno.EADDRINUSE else "")
        ) from error


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
    from lorax_async.server.server_log import log_event  # noqa: PLC0415
    from lorax_async.server.service import open_service  # noqa: PLC0415

    with _listener(arguments) as listener:
        size = format_size(config.device_bytes)
        async with AsyncExitStack() as stack:
            with _log_step(f"opening {config.max_slots} slots in {size} on {config.device}"):
                opened = open_service(model, config, settings, capacity, arguments.warm)
                service = await stack.enter_async_context(opened)
            announce = partial(_announce, arguments, listener, settings, terminal)
            await serve(service, listener, ready=announce)
    log_event("stopped")


def _announce(
    arguments: argparse.Namespace,
    listener: socket.socket,
    settings: ServerSettings,
    terminal: Terminal,
) -> None:
    from lorax_async.server.server_log import log_event  # noqa: PLC0415

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = "needed" if settings.api_keys else "not needed"
    log_event("serving", url=url, names=1 + len(settings.adapters), api_key=key)
    if not (settings.api_keys or ip_address(host).is_loopback):
        open_to_all = f"other machines may use this server without a key; {API_KEY} sets one"
        log_event(open_to_all, level=logging.WARNING)
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
        if not text:  # of an unset variable; Path("") is the current folder
            raise ConfigError("--adapters: '' is not a folder or an id")
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
            ref = as_folder_or_id(place)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--adapters: {error}") from None
        if ref.source == "hub" and any(folder.parent.glob(f"*/{CONFIG}")):
            raise ConfigError(f"--adapters: there is no folder {place} beside the adapters there")
        if not isinstance(ref.id, Path):
            last = ref.text.rstrip("/").rpartition("/")[2]
            return [(name or last.partition("@")[0], ref)]
        paths, names = [ref.id], [name or ref.id.resolve().name]
    for path in paths:  # read the first bytes of their files only
        if not path.is_dir():
            raise ConfigError(
                f"--adapters: there is no folder {path}; an adapter on the hub is org/name"
            )
        try:
            find_trusted_adapter(path.absolute(), Limits())
            if (path / WEIGHTS).exists():
                with (path / WEIGHTS).open("rb") as file:
                    header_size(file.read(64), os.fstat(file.fileno()).st_size)
        except AdapterError as error:
            raise ConfigError(f"--adapters: {path}: {error.problem}") from error
    return [(name, path.resolve()) for name, path in zip(names, paths, strict=True)]


# -- the log --------------------------------------------------------------------------------------

LEVELS = ("debug", "info", "warning", "error")
PULSE_SECONDS = 4.0
"""A step of the start that takes longer is logged again, and again."""

_logger = logging.getLogger("lorax_async.server")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event or message, and the record's values."""

    def format(self, record: logging.LogRecord) -> str:
        values = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if "event" not in values:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | values, default=str, ensure_ascii=False)


def _add_logging(parser: argparse.ArgumentParser) -> None:
    """Add --log-level and --log-format."""
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        help="least level of lines on stderr: debug has probes, too (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="a line is text, or a JSON object (default: %(default)s)",
    )


@contextmanager
def _logging_to(stream: TextIO, level: str, form: str) -> Iterator[None]:
    """Write the process's log to `stream`: our lines from `level` on, warnings of all others."""
    handler = logging.StreamHandler(stream)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    root, ours = logging.getLogger(), logging.getLogger("lorax_async")
    before = ours.level
    root.addHandler(handler)
    ours.setLevel(level.upper())
    try:
        yield
    finally:
        ours.setLevel(before)
        root.removeHandler(handler)


@contextmanager
def _log_step(step: str) -> Iterator[None]:
    """Log a step of the start: that it begins, that it goes on, and how long it took."""
    began = time.monotonic()

    def log(what: str) -> None:
        seconds = round(time.monotonic() - began, 1)
        extra = {"event": "starting", "step": step, "state": what, "seconds": seconds}
        message = f"starting: {step}" + ("" if what == "began" else f", {what}, {seconds} s")
        _logger.info("%s", message, extra=extra)

    log("began")
    with repeated(lambda: log("goes on"), PULSE_SECONDS):
        yield
    log("done")
