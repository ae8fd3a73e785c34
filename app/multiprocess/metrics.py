"""Metrics and statistics of several processes: what each counted, added up, and asked of the engine for a scrape."""

from collections.abc import Iterator, Sequence
from dataclasses import fields

from msgspec import Struct
from prometheus_client import Metric, generate_latest

from app.telemetry.metrics import Encode, Metrics, Statistics

# Of these a sum says nothing: the first process's own.
NOT_SUMMED = ("python_info", "process_start_time_seconds", "process_max_fds")


class Family(Struct, array_like=True):
    """One metric: its samples are (name, labels, value)."""

    name: str
    documentation: str
    type: str
    samples: list[tuple[str, dict[str, str], float]]


class Snapshot(Struct):
    """What one process counted."""

    families: list[Family]
    statistics: Statistics

    @classmethod
    def of(cls, metrics: Metrics) -> "Snapshot":
        """What this process counted so far."""
        families = [
            Family(each.name, each.documentation, each.type, [(s.name, s.labels, s.value) for s in each.samples])
            for each in metrics.registry.collect()
        ]
        return cls(families, metrics.statistics)

    def collect(self) -> Iterator[Metric]:
        """As a Prometheus collector."""
        for family in self.families:
            metric = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                metric.add_sample(*sample)
            yield metric

    def render(self, encode: Encode = generate_latest) -> bytes:
        """Prometheus text format, or another."""
        return encode(self)


def add_up(snapshots: Sequence[Snapshot]) -> Snapshot:
    """One snapshot of all: samples of the same name and labels added, families in the order of the first."""
    families: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], float]] = {}
    for snapshot in snapshots:
        for family in snapshot.families:
            families.setdefault(family.name, family)
            sums = values.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = (name, frozenset(labels.items()))
                if key not in sums:
                    sums[key] = value
                elif not name.endswith("_created") and name not in NOT_SUMMED:
                    sums[key] += value
    total = Statistics()
    for field in fields(Statistics):
        parts = [getattr(snapshot.statistics, field.name) for snapshot in snapshots]
        setattr(total, field.name, max(parts) if field.name.startswith("last") else sum(parts))
    summed = []
    for f in families.values():
        samples = [(name, dict(labels), value) for (name, labels), value in values[f.name].items()]
        summed.append(Family(f.name, f.documentation, f.type, samples))
    return Snapshot(summed, total)
