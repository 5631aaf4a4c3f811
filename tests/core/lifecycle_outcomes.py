"""What threads and devices answer in a world, one outcome at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from core.lifecycle_world import Action, World, forget_content, keys
from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Command
from lorax_async.core.life import Needs
from lorax_async.core.transitions import FileState
from lorax_async.errors import FetchError, TransferError


def outcomes(world: World) -> Iterator[Action]:
    for a in world.fetches:
        yield from _fetch_outcomes(world, a)
    for a in world.populating:
        yield ("populated", a)
        if world.setting.failures:
            yield ("lost", a)
    for a in world.releasing:
        yield ("released", a)
    for a in world.wiping:
        yield ("wiped", a)
    for (a, group), copy in world.copies.items():
        yield ("copy done", a, group)
        if world.setting.failures:
            yield ("copy failed", a, group)
            if not copy.warm and world.life(a).file in (FileState.PRESENT, FileState.ENDING):
                yield ("copy lost", a, group)


def _fetch_outcomes(world: World, a: int) -> Iterator[Action]:
    header, told, cancelled = world.fetches[a]
    if world.setting.failures or cancelled:
        yield ("fetch failed", a)
    if not header:
        yield ("header", a)
        return
    groups = len(world.setting.sizes[a])
    if world.setting.streaming:
        yield from (("span", a, g) for g in range(groups) if g not in told)
        if len(told) == groups:
            yield ("published", a)
    else:
        yield ("published", a)


def _key(world: World, a: int) -> AdapterKey:
    return keys(world.setting)[a]


def _attempt(world: World, a: int) -> int:
    return world.life(a).attempt


def _header(world: World, a: int) -> list[Command]:
    world.fetches[a] = (True, *world.fetches[a][1:])
    sizes = world.setting.sizes[a]
    needs = Needs(sizes, file_nbytes=sum(sizes), holdable=a in world.setting.holdable)
    return world.lifecycle.header_checked(_key(world, a), _attempt(world, a), needs)


def _span(world: World, a: int, group: int) -> list[Command]:
    header, told, cancelled = world.fetches[a]
    world.fetches[a] = (header, told | {group}, cancelled)
    world.readable[a] = world.readable.get(a, frozenset()) | {group}
    return world.lifecycle.span_fetched(_key(world, a), _attempt(world, a), group)


def _published(world: World, a: int) -> list[Command]:
    del world.fetches[a]
    world.readable[a] = frozenset(range(len(world.setting.sizes[a])))
    return world.lifecycle.published(_key(world, a), _attempt(world, a))


def _fetch_failed(world: World, a: int) -> list[Command]:
    _, _, cancelled = world.fetches.pop(a)
    if a in world.holder and not cancelled:
        world.dirty[a] = world.holder[a]
    forget_content(world, a)
    return world.lifecycle.fetch_failed(_key(world, a), _attempt(world, a), FetchError("ordered"))


def _populated(world: World, a: int) -> list[Command]:
    world.populating.discard(a)
    (world.held if a in world.setting.holdable else world.read_ahead).add(a)
    return world.lifecycle.populated(_key(world, a), _attempt(world, a))


def _lost(world: World, a: int) -> list[Command]:
    world.populating.discard(a)
    forget_content(world, a)
    return world.lifecycle.lost(_key(world, a), _attempt(world, a), FetchError("ordered"))


def _released(world: World, a: int) -> list[Command]:
    world.releasing.discard(a)
    world.held.discard(a)
    world.read_ahead.discard(a)
    return world.lifecycle.released(_key(world, a), _attempt(world, a))


def _copy_done(world: World, a: int, group: int) -> list[Command]:
    copy = world.copies.pop((a, group))
    if copy.image is not None:
        world.content[copy.image.offset] = (a, group)
    world.on_device[a] = world.on_device[a] | {group}
    if world.is_complete(a):
        world.resident_at[a] = world.now
    return world.lifecycle.copy_done(_key(world, a), group)


def _copy_failed(world: World, a: int, group: int) -> list[Command]:
    del world.copies[a, group]
    return world.lifecycle.copy_failed(_key(world, a), TransferError("ordered"))


def _copy_lost(world: World, a: int, group: int) -> list[Command]:
    del world.copies[a, group]
    forget_content(world, a)
    return world.lifecycle.copy_failed(_key(world, a), FetchError("ordered"), file_lost=True)


def _wiped(world: World, a: int) -> list[Command]:
    world.wiping.discard(a)
    del world.dirty[a]
    return world.lifecycle.wiped(_key(world, a))


OUTCOMES: dict[str, Callable[..., list[Command]]] = {
    "header": _header,
    "span": _span,
    "published": _published,
    "fetch failed": _fetch_failed,
    "populated": _populated,
    "lost": _lost,
    "released": _released,
    "copy done": _copy_done,
    "copy failed": _copy_failed,
    "copy lost": _copy_lost,
    "wiped": _wiped,
}
