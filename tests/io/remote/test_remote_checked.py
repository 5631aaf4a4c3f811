"""What a source elsewhere says of its versions: checked, believed, mixed up with no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import Asked, Client
from remote_world import RemoteWorld, brought, opened, stocked
from source_inputs import CONFIG, weights

from lorax_async import FetchError, IntegrityError
from lorax_async.adapter import AdapterKey, RemoteKey
from lorax_async.io.ports import Demand
from lorax_async.io.remote.beginning import FIRST_BYTES

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


async def test_small_files_are_checked_before_they_are_used(tmp_path: Path) -> None:
    """The rest is on its way by then, and nothing is published yet."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)

        def other_config(asked: Asked, client: Client) -> None:
            data, etag = world.content(asked.target)
            world.answer(asked, client, data if asked.span else data[::-1], etag)

        world.server.behave = other_config
        with pytest.raises(IntegrityError, match=r"adapter_config.json has not the sha256"):
            await opened(world)


async def test_who_was_let_have_it_has_it_while_the_source_is_down(tmp_path: Path) -> None:
    """Not only who it was fetched for; and nobody else."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        first, second, stranger = (replace(world.ref("one"), token=token) for token in "abc")
        version = world.locator.there["one"].version
        for ref in (first, second):
            file = await world.source.open(await world.source.resolve(ref), Demand())
            await world.source.bring(file, [], lambda _: None, Demand())
            file.reader.close()
        world.locator.error = FetchError("it is down")
        for ref in (first, second):
            await world.source.resolve(replace(ref, revision=version))
        with pytest.raises(FetchError, match="it is down"):
            await world.source.resolve(replace(stranger, revision=version))


async def test_the_last_version_is_what_is_stale(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        keys: list[AdapterKey] = []
        for seed in (1, 2):
            world.put("one", CONFIG, weights(seed))
            keys.append(await world.source.resolve(world.ref("one")))
            (await brought(world)).reader.close()
        world.locator.error = FetchError("it is down")
        found = await world.source.resolve(replace(world.ref("one"), allow_stale=True))
        assert isinstance(found, RemoteKey)
        assert found.stale
        assert replace(found, stale=False) == keys[1] != keys[0]


async def test_another_version_is_not_stored_under_the_name_of_the_one(tmp_path: Path) -> None:
    """It is located anew when the places that the source told have expired."""
    now = 0.0
    with RemoteWorld(tmp_path / "cache", clock=lambda: now) as world:
        key = await world.source.resolve(world.put("one", CONFIG, weights(1)))
        now = 3600.0
        world.put("one", CONFIG, weights(2))
        with pytest.raises(IntegrityError, match="another version by now"):
            await world.source.open(key, Demand())


async def test_what_changes_between_two_answers_is_noticed(tmp_path: Path) -> None:
    """Of a header that does not come with the first bytes."""
    with RemoteWorld(tmp_path / "cache") as world:
        world.locator.promises = False
        world.put("one", CONFIG, weights(1, {"note": "long" * FIRST_BYTES}))

        def changing(asked: Asked, client: Client) -> None:
            data, etag = world.content(asked.target)
            again = asked.span is not None and asked.span[1] != FIRST_BYTES
            world.answer(asked, client, data, '"another"' if again else etag)

        world.server.behave = changing
        with pytest.raises(IntegrityError, match="changed while it was asked for"):
            await opened(world)
