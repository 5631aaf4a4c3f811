"""One adapter from several, computed when it is loaded, with PEFT's numbers: docs/merging.md.

python examples/merges.py
"""

import asyncio
from pathlib import Path

from lorax_async import AdapterLoader, LoaderConfig, Merge, layouts

adapters = Path(__file__).parent / "adapters"


async def main() -> None:
    layout = layouts.from_adapter(adapters / "shout")
    config = LoaderConfig(max_slots=4, local_roots=(adapters,))
    async with AdapterLoader(layout, config) as loader:
        both = Merge("linear", ["./pirate", "./shout"], [0.7, 0.3])
        async with loader.load(both) as handle:  # a merge is an id
            print(f"linear: rank {handle.rank}, of 8 and 4; {len(handle.modules)} modules")
        again = loader.try_acquire(both)  # an equal recipe is the same adapter
        print("on the device:", again is not None)
        if again is not None:
            again.release()


if __name__ == "__main__":
    asyncio.run(main())
