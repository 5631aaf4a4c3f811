"""Fifty adapters on eight slots, sixteen requests at a time: docs/loading.md.

In a clone: python examples/fifty_on_eight.py
"""

import asyncio
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from lorax_async import AdapterLoader, LoaderConfig, layouts

pirate = Path("examples/adapters/pirate")
fifty = [Path(tempfile.mkdtemp()) / f"pirate-{number}" for number in range(50)]
for folder in fifty:
    shutil.copytree(pirate, folder)


async def main() -> None:
    config = LoaderConfig(max_slots=8, device_bytes="16MiB", timeout=60)
    sixteen, slots = asyncio.Semaphore(16), Counter[int]()

    async def answer(folder: Path) -> None:
        async with sixteen, loader.load(folder) as handle:
            await asyncio.sleep(0.001)  # the forward passes; the handle keeps its slot meanwhile
            slots[handle.slot.index] += 1

    async with AdapterLoader(layouts.from_adapter(pirate), config) as loader:
        await asyncio.gather(*(answer(folder) for folder in fifty * 2))
        evictions = sum(loader.statistics().evictions.values())
    print(f"{slots.total()} answers, {len(fifty)} adapters, {len(slots)} slots")
    print("evictions:", evictions)


if __name__ == "__main__":
    asyncio.run(main())
