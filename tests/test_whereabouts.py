"""Where adapters are: all of them, the nearest, and one."""

from __future__ import annotations

from pathlib import Path

from tiny_loaders import ONE
from tiny_sources import over, stocked


async def test_one_adapter(tmp_path: Path) -> None:
    source = stocked(tmp_path, "org/one")
    async with over(source) as loader:
        assert loader.whereabouts("org/one") is None
        async with await loader.load("org/one"):
            where = loader.whereabouts("org/one")
            assert where is not None
            assert where == next(iter(loader.residency().values()))
            assert (where.tier, where.device_bytes, where.leases) == ("device", ONE, 1)
            assert where.layers == (4, 4)
        await loader.unload("org/one")
        where = loader.whereabouts("org/one")
        assert where is not None
        assert (where.tier, where.slot, where.layers) == ("disk", None, None)


async def test_the_nearest(tmp_path: Path) -> None:
    """Device, host, disk; more than there are is all."""
    names = ["org/disk", "org/host", "org/device"]
    source = stocked(tmp_path, *names, holdable=True)
    async with over(source, host_bytes=1 << 20) as loader:
        for name in names[:2]:
            (await loader.load(name)).release()
            await loader.unload(name)
        await loader.prefetch(["org/host"], tier="host")
        (await loader.load("org/device")).release()
        for count in range(4):
            found = loader.residency(nearest=count)
            assert [where.tier for where in found.values()] == ["device", "host", "disk"][:count]
        assert loader.residency(nearest=9).items() == loader.residency().items()
