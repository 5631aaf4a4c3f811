"""A loader's numbers for Prometheus, beside the program's own: docs/metrics.md.

python examples/prometheus.py
"""

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from lorax_async import AdapterLoader, LoaderConfig, layouts
from lorax_async.metrics import LoaderCollector

pirate = Path(__file__).parent / "adapters" / "pirate"


async def main() -> None:
    registry = CollectorRegistry()  # or the program's own
    layout, config = layouts.from_adapter(pirate), LoaderConfig(max_slots=4)
    async with AdapterLoader(layout, config) as loader, loader.load(pirate):
        with LoaderCollector(loader) as collector:
            registry.register(collector)
            # A server answers GET /metrics with this text.
            text = (await asyncio.to_thread(generate_latest, registry)).decode()
    print(*(line for line in text.splitlines() if line.startswith("lorax_moved")), sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
