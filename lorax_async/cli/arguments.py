"""Exit statuses, options and argument types that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lorax_async import layouts
from lorax_async.cli.terminal import Terminal
from lorax_async.config import HubCache
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.errors import ConfigError, InvalidAdapterIdError, shorten
from lorax_async.ids import (
    Allow,
    HubRepository,
    LocalFolder,
    RemotePlace,
    WebFolder,
    names_pull_request,
    parse_ref,
)
from lorax_async.planning.layout import ModelLayout
from lorax_async.types import AdapterRef
from lorax_async.urls import InvalidUrlError, is_address, parse_folder_url

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses. argparse exits with `REFUSED` on wrong usage."""

AddParser = Callable[..., argparse.ArgumentParser]
Command = Callable[[argparse.Namespace, Terminal], int]

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE_HELP = "a number, or one with KiB, MiB or GiB"


def add_command(
    add: AddParser, name: str, about: str, command: Command, more: str = ""
) -> argparse.ArgumentParser:
    """Add a command with `--json`. `more` appears only in the command's own help."""
    parser = add(name, help=about, description=f"{about[0].upper()}{about[1:]}. {more}".rstrip())
    parser.set_defaults(command=command)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def add_base(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--base",
        required=required,
        metavar="DIR",
        help="the base model's folder (its config.json suffices), or smollm2 for the demo's",
    )


def as_size(text: str) -> int:
    """Parse a number of bytes, for argparse."""
    digits = text.rstrip("KMGiB")
    unit = text[len(digits) :]
    if not digits.isascii() or not digits.isdecimal() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 1000000, 64MiB or 1GiB")
    return int(digits) * UNITS[unit]


def integer_parser(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return a parser of integers in this range, for argparse."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of {minimum} or more")
        if maximum is not None and int(text) > maximum:
            raise argparse.ArgumentTypeError(f"{text} is over {maximum}")
        return int(text)

    return parse


def read_lines(path: Path) -> Iterator[str]:
    """Yield the stripped, non-empty lines of a text file.

    Raises `ConfigError` if it is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None


def read_layout(base: str, terminal: Terminal) -> ModelLayout:
    """Return the layout of the base model in a folder, or of "smollm2".

    Raises `ConfigError` if there is none.
    """
    with terminal.steps() as report:
        report("reading the base's config")
        folder = prepare_base(progress=report) if base == "smollm2" else Path(base)
        return layouts.from_pretrained(folder)


ID_HELP = "org/name[@revision] on the hub, s3://…, gs://…, az://…, or https://… of a folder"

TOKENS = (
    "The hub gets the token in HF_TOKEN, or the one that `hf auth login` stored; object stores get"
    " the environment's credentials. No option takes a token: other users can see command lines."
)


def as_id(text: str) -> AdapterRef:
    """Parse the id of a remote adapter, for argparse.

    The user chose the id, so the hub gets this machine's own token.
    """
    ref = _parse_id(text)
    if ref.source == "local":
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is already a local folder")
    return replace(ref, use_token=ref.source == "hub")


def as_place(text: str) -> AdapterRef:
    """Parse a folder or an id, for argparse. A folder `org/name` takes precedence over the hub."""
    is_url = "://" in text and not text.lower().startswith("file:")
    if is_url or (not Path(text).is_dir() and _is_hub_id(text)):
        return as_id(text)
    return AdapterRef(Path(text))


def is_local(ref: AdapterRef) -> bool:
    return isinstance(ref.id, Path)


def at_revision(ref: AdapterRef, revision: str | None) -> AdapterRef:
    """Return `ref` at `revision`, or unchanged if that is None.

    Raises `InvalidAdapterIdError` if the id has another revision.
    """
    if revision is None:
        return ref
    if ref.revision not in {None, revision}:
        raise InvalidAdapterIdError(
            "the id and --revision name different revisions; use one of them", id=ref.text
        )
    return parse_ref(AdapterRef(ref.id, ref.source, revision, use_token=ref.use_token))


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options for sources."""
    parser.add_argument(
        "--allow",
        action="append",
        type=as_allow,
        default=[],
        metavar="URL",
        help="also allow http(s)://HOST[:PORT]/PREFIX/, as a target of redirects to plain http or"
        " to addresses that are not public; repeatable. Ids on the command line are always allowed",
    )
    parser.add_argument(
        "--hub-endpoint", metavar="URL", help="the hub's URL (default: HF_ENDPOINT, if set)"
    )


def add_caches(parser: argparse.ArgumentParser) -> None:
    """Add the options for caches."""
    parser.add_argument(
        "--hub-cache",
        choices=get_args(HubCache),
        help="read the standard hub cache (read, the default) or ignore it (off)",
    )
    add_cache_folder(parser, "--cache-dir")
    parser.add_argument(
        "--cache-bytes",
        type=as_size,
        metavar="N",
        help=f"the adapter cache's budget: {SIZE_HELP} (default: 16GiB)",
    )


def add_cache_folder(parser: argparse.ArgumentParser, option: str) -> None:
    parser.add_argument(
        option,
        dest="cache_dir",
        metavar="DIR",
        help="the adapter cache (default: lorax-async in $XDG_CACHE_HOME, or else in ~/.cache)",
    )


def loader_settings(arguments: argparse.Namespace, refs: Sequence[AdapterRef]) -> dict[str, Any]:
    """Return these options as arguments of `LoaderConfig`, with `refs` allowed."""
    allow = [_allow_ref(ref) for ref in refs if not is_local(ref)]
    options = {
        name: value
        for name, value in vars(arguments).items()
        if name in _OPTIONS and value is not None
    }
    return options | {"allow": (*allow, *arguments.allow)}


_OPTIONS = ("hub_endpoint", "hub_cache", "cache_dir", "cache_bytes", "offline")


def as_allow(text: str) -> Allow:
    """Parse the URL of an allowed folder, for argparse.

    The error does not repeat the text, which may hold a secret.
    """
    try:
        AdapterRef(text)
        url = parse_folder_url(text)
    except InvalidAdapterIdError as error:
        raise argparse.ArgumentTypeError(error.problem) from None
    except InvalidUrlError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return _allow_folder(WebFolder.of(url))


def as_source(text: str) -> Allow | Path:
    """Parse a place with adapters, for argparse: a local folder, or an allowed remote one."""
    if text == "hub" or text.startswith("hub:"):
        try:
            return Allow("hub", prefix=text[4:], use_token=bool(text[4:]))
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.problem) from None
    if "://" not in text:
        if Path(text).is_dir():
            return Path(text)
        raise argparse.ArgumentTypeError(f"{shorten(text, 200)!r} is not a folder")
    return _allow_ref(_parse_id(text))


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


def request_sources(arguments: argparse.Namespace) -> tuple[Allow, ...]:
    """Return the remote places that `--source` opens to requests; folders are in `local_roots`."""
    return tuple(source for source in arguments.source if isinstance(source, Allow))


def _allow_ref(ref: AdapterRef) -> Allow:
    """Return the permission for `ref` and everything below it."""
    place = parse_ref(ref).place
    assert not isinstance(place, LocalFolder)
    return _allow_folder(place, ref.revision)


def _allow_folder(place: RemotePlace, revision: str | None = None) -> Allow:
    """Return the permission for a place; a host name on the web may have a private address."""
    on_web = isinstance(place, WebFolder)
    on_hub = isinstance(place, HubRepository)
    scheme: Any = place.scheme
    return Allow(
        scheme,
        place.host,
        place.port,
        place.path,
        pull_requests=on_hub and names_pull_request(revision),
        private=on_web and place.host != "localhost" and not is_address(place.host),
    )


def _parse_id(text: str) -> AdapterRef:
    try:
        ref = AdapterRef(text)
    except InvalidAdapterIdError as error:  # do not repeat the text: it may hold a secret
        raise argparse.ArgumentTypeError(error.problem) from None
    try:
        return parse_ref(ref)
    except InvalidAdapterIdError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text, 200)!r}: {error.problem}") from None


def _is_hub_id(text: str) -> bool:
    try:
        return parse_ref(AdapterRef(text)).source == "hub"
    except InvalidAdapterIdError:
        return False
