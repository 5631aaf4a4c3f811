"""Doubles for tests of your own server: no network, no GPU, no model.

    source = FakeSource()
    source.put("org/sql", config, weights)
    source.hold("org/sql")  # its layers arrive when the test allows them
    async with AdapterLoader(layout, LoaderConfig(device="simulated"), source=source) as loader:
        ...

`FakeSource` is a source of adapters in memory. `SimulatedDevice`, which `device="simulated"`
chooses, has a copy stream of its own and memory full of NaN, so a missing wait shows as wrong
numbers. `FakeDecoder` stands in for the model behind the server's engine.
"""

from lorax_async.io.devices.simulated import SimulatedDevice, SimulatedStream, SimulatedTicket
from lorax_async.testing.decoder import FakeDecoder, fake_logits
from lorax_async.testing.source import FakeHold, FakeReader, FakeSource, SourceCounts, Step, Version

__all__ = [
    "FakeDecoder",
    "FakeHold",
    "FakeReader",
    "FakeSource",
    "SimulatedDevice",
    "SimulatedStream",
    "SimulatedTicket",
    "SourceCounts",
    "Step",
    "Version",
    "fake_logits",
]
