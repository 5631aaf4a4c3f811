"""Requests become batches while their adapters load: docs/scheduler.md.

python examples/scheduler.py
"""

import asyncio
import time
from pathlib import Path

from lorax_async import AdapterLoader, AdapterScheduler, Batch, LoaderConfig, Request, layouts

adapters = Path(__file__).parent / "adapters"


def compute(batch: Batch) -> None:
    """Stand in for the model's forward pass over `batch.rows`."""
    names = sorted({row.handle.id if row.handle else "the base" for row in batch.rows})
    print(f"{len(batch.rows)} rows of {', '.join(Path(name).name for name in names)}")
    time.sleep(0.002)


async def serve(scheduler: AdapterScheduler) -> None:
    async for batch in scheduler.batches(max_tokens=256, max_sequences=8):
        await asyncio.to_thread(compute, batch)
        scheduler.complete(batch)


async def main() -> None:
    layout = layouts.from_adapter(adapters / "shout")
    config = LoaderConfig(max_slots=2)
    async with AdapterLoader(layout, config) as loader, AdapterScheduler(loader) as scheduler:
        engine = asyncio.create_task(serve(scheduler))
        names = [adapters / "pirate", adapters / "shout", None]  # None: the base
        tickets = [scheduler.submit(Request(name, 16, max_new_tokens=4)) for name in names]
        print("tokens:", *await asyncio.gather(*tickets))
        engine.cancel()


if __name__ == "__main__":
    asyncio.run(main())
