"""The samples of a scrape, read by Prometheus' own parser."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lorax_async.loader import AdapterLoader
from lorax_async.metrics import LoaderCollector

Samples = dict[str, float]


def parsed(text: str) -> Samples:
    """Return each sample by its name with labels, as written."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in found
            found[name] = sample.value
    return found


def scraped(registry: CollectorRegistry) -> Samples:
    return parsed(generate_latest(registry).decode())


def registered(collector: LoaderCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def of(samples: Samples, name: str) -> Samples:
    """Return the samples of one family, by labels."""
    return {
        key[len(name) + 1 : -1]: value
        for key, value in samples.items()
        if key.startswith(f"{name}{{")
    }


async def loaded(there: AdapterLoader, *names: str) -> None:
    for name in names:
        (await there.load(name)).release()
