"""What commands have in common: options, exit codes, and how adapters are named."""

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
from lorax_async.ids.allow import Allow, OriginPlace, is_address
from lorax_async.ids.grammar import DEFAULT_PORTS, names_pull_request, parse_folder_url
from lorax_async.ids.parsing import parsed, place_of
from lorax_async.planning.layout import ModelLayout
from lorax_async.types import AdapterRef

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses; argparse has `REFUSED` for wrong usage."""

AddParser = Callable[..., argparse.ArgumentParser]
Command = Callable[[argparse.Namespace, Terminal], int]

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE_HELP = "a number, or one with KiB, MiB or GiB"


def add_command(
    add: AddParser, name: str, about: str, command: Command, more: str = ""
) -> argparse.ArgumentParser:
    """A parser for one command, with `--json`; `more` is told by its own help only."""
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
    """Bytes, for argparse."""
    digits = text.rstrip("KMGiB")
    unit = text[len(digits) :]
    if not digits.isascii() or not digits.isdecimal() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 1000000, 64MiB or 1GiB")
    return int(digits) * UNITS[unit]


def number_from(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number in this range, for argparse."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        if most is not None and int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is over {most}")
        return int(text)

    return number


def lines_of(path: Path) -> Iterator[str]:
    """Of a text file, without blanks around them and without empty ones.

    Raises
    ------
    ConfigError
        It is no text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8") from None


def layout_of(base: str, terminal: Terminal) -> ModelLayout:
    """Of the base in a folder, or of the demo's. Raises `ConfigError` where there is none."""
    with terminal.steps() as report:
        report("reading the base's config")
        folder = prepare_base(progress=report) if base == "smollm2" else Path(base)
        return layouts.from_pretrained(folder)


ID_HELP = "org/name[@revision] on the hub, s3://…, gs://…, az://…, or https://… of a folder"

TOKENS = (
    "The hub is asked with the token in HF_TOKEN, or what `hf auth login` left; stores with the"
    " credentials of the environment. No token is taken on the command line: others see it there."
)


def as_id(text: str) -> AdapterRef:
    """An id of what lies elsewhere, in its one spelling; for argparse.

    The user names it, so the hub is asked for it with this machine's own token.
    """
    found = _parsed(text)
    if found.source == "local":
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is a local folder, and here already")
    return replace(found, use_token=found.source == "hub")


def as_place(text: str) -> AdapterRef:
    """A folder, or an id; for argparse. `org/name` is a folder where there is one of that name."""
    is_url = "://" in text and not text.lower().startswith("file:")
    if is_url or (not Path(text).is_dir() and _is_hub_id(text)):
        return as_id(text)
    return AdapterRef(Path(text))


def is_local(ref: AdapterRef) -> bool:
    return isinstance(ref.id, Path)


def at_revision(ref: AdapterRef, revision: str | None) -> AdapterRef:
    """`ref` in that revision, if one is given.

    Raises `InvalidAdapterIdError` where the id has another.
    """
    if revision is None:
        return ref
    if ref.revision not in {None, revision}:
        raise InvalidAdapterIdError(
            "the id has one revision and --revision another; give one", id=ref.text
        )
    return parsed(replace(ref, revision=revision))


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Options about where adapters come from."""
    parser.add_argument(
        "--allow",
        action="append",
        type=as_allow,
        default=[],
        metavar="URL",
        help="http(s)://HOST[:PORT]/PREFIX/ may be asked too, where redirects lead to plain http or"
        " to addresses that are not public; repeatable. What is named as an adapter needs none",
    )
    parser.add_argument("--hub-endpoint", metavar="URL", help="the hub's (default: HF_ENDPOINT's)")


def add_caches(parser: argparse.ArgumentParser) -> None:
    """Options about where they are kept."""
    parser.add_argument(
        "--hub-cache",
        choices=get_args(HubCache),
        help="use what the standard hub cache has (read, the default) or not (off)",
    )
    add_cache_folder(parser, "--cache-dir")
    parser.add_argument(
        "--cache-bytes", type=as_size, metavar="N", help=f"its budget: {SIZE_HELP} (default: 16GiB)"
    )


def add_cache_folder(parser: argparse.ArgumentParser, option: str) -> None:
    parser.add_argument(
        option,
        dest="cache_dir",
        metavar="DIR",
        help="the adapter cache (default: lorax-async in $XDG_CACHE_HOME, or else in ~/.cache)",
    )


def settings_of(arguments: argparse.Namespace, refs: Sequence[AdapterRef]) -> dict[str, Any]:
    """What these options said, and that `refs` are allowed, as `LoaderConfig` has it."""
    named = [_allowing(ref) for ref in refs if not is_local(ref)]
    said = {name: value for name, value in vars(arguments).items() if name in _OPTIONS}
    given = {name: value for name, value in said.items() if value is not None}
    return given | {"allow": (*named, *arguments.allow)}


_OPTIONS = ("hub_endpoint", "hub_cache", "cache_dir", "cache_bytes", "offline")


def as_allow(text: str) -> Allow:
    """For argparse. What is refused is not repeated: it may hold a secret."""
    try:
        AdapterRef(text)
        url = parse_folder_url(text)
    except InvalidAdapterIdError as error:
        raise argparse.ArgumentTypeError(error.problem) from None
    return _on_the_web(OriginPlace(url.scheme, url.host, url.port, url.path[1:]))


def as_source(text: str) -> Allow | Path:
    """What adapters lie below, for argparse: a folder, or what is allowed."""
    if text == "hub" or text.startswith("hub:"):
        try:
            return Allow("hub", prefix=text[4:], use_token=bool(text[4:]))
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.problem) from None
    if "://" not in text:
        if Path(text).is_dir():
            return Path(text)
        raise argparse.ArgumentTypeError(f"{shorten(text, 200)!r} is no folder")
    return _allowing(_parsed(text))


def sources_of(arguments: argparse.Namespace, refs: Sequence[AdapterRef]) -> dict[str, Any]:
    """What `--source` and the options about caches said, and that `refs` are allowed.

    The operator may name all of the hub, later too. `opened` is what requests may name.
    """
    folders = tuple(each for each in arguments.source if isinstance(each, Path))
    arguments.allow = [*opened(arguments), Allow("hub")]
    return settings_of(arguments, refs) | {"local_roots": folders}


def opened(arguments: argparse.Namespace) -> tuple[Allow, ...]:
    """Return the places that `--source` opens to requests; `local_roots` has the folders."""
    return tuple(each for each in arguments.source if isinstance(each, Allow))


def _allowing(ref: AdapterRef) -> Allow:
    """What allows this one, and what lies below it."""
    reach = place_of(ref)
    if reach.scheme in DEFAULT_PORTS:
        return _on_the_web(reach)
    if reach.scheme == "hub":
        pull_requests = names_pull_request(ref.revision)
        return Allow("hub", prefix=reach.path, pull_requests=pull_requests)
    scheme: Any = reach.scheme
    return Allow(scheme, reach.host, prefix=reach.path)


def _on_the_web(reach: OriginPlace) -> Allow:
    """A host that is named may be a machine of the house."""
    scheme: Any = reach.scheme
    private = reach.host != "localhost" and not is_address(reach.host)
    return Allow(scheme, reach.host, reach.port, reach.path, private=private)


def _parsed(text: str) -> AdapterRef:
    try:
        ref = AdapterRef(text)
    except InvalidAdapterIdError as error:  # the text may hold a secret: it is not repeated
        raise argparse.ArgumentTypeError(error.problem) from None
    try:
        return parsed(ref)
    except InvalidAdapterIdError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text, 200)!r}: {error.problem}") from None


def _is_hub_id(text: str) -> bool:
    try:
        return parsed(AdapterRef(text)).source == "hub"
    except InvalidAdapterIdError:
        return False
