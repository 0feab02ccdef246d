"""A worker's /metrics, parsed."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.support.workers import Running

Labels = frozenset[tuple[str, str]]


class Scrape(dict[str, dict[Labels, float]]):
    """Values by name of the sample (``byoc_errors_total``, ``..._bucket``), then by labels. ``families`` has the names
    of all metrics, also of those that have no sample yet."""

    def __init__(self) -> None:
        super().__init__()
        self.families: set[str] = set()

    def value(self, name: str, **labels: str) -> float:
        return self[name][frozenset(labels.items())]

    def lines(self) -> dict[str, set[Labels]]:
        """What there is, whatever its value."""
        return {name: set(series) for name, series in self.items()}

    def labels(self, name: str) -> set[str]:
        """Names of the labels that samples of this name have."""
        return {key for labels in self[name] for key, _ in labels}


async def scrape(r: Running) -> Scrape:
    async with r.session.get(r.url + "/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    found = Scrape()
    for family in text_string_to_metric_families(text):
        found.families.add(family.name + ("_total" if family.type == "counter" else ""))
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found
