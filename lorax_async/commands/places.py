"""Adapters as a command line names them: folders, and ids of what lies elsewhere.

Whoever runs a command is its operator: what he names is allowed, exactly as it is, and nothing else
but the redirects that every loader follows and what he adds by `--allow`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lorax_async.commands.arguments import SIZE_HELP, as_size
from lorax_async.config import Allow, HubCache
from lorax_async.errors import ConfigError, InvalidAdapterIdError, shorten
from lorax_async.identity import AdapterRef
from lorax_async.ids.folder_urls import DEFAULT_PORTS, parse_folder_url
from lorax_async.ids.hub import names_pull_request
from lorax_async.ids.parsing import parsed, reach_of
from lorax_async.settings.allow import Reach, is_address

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
    return _on_the_web(Reach(url.scheme, url.host, url.port, url.path[1:]))


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
    reach = reach_of(ref)
    if reach.scheme in DEFAULT_PORTS:
        return _on_the_web(reach)
    if reach.scheme == "hub":
        pull_requests = names_pull_request(ref.revision)
        return Allow("hub", prefix=reach.path, pull_requests=pull_requests)
    scheme: Any = reach.scheme
    return Allow(scheme, reach.host, prefix=reach.path)


def _on_the_web(reach: Reach) -> Allow:
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
