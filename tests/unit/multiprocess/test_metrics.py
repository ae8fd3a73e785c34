"""Metrics and statistics of several processes as one."""

import dataclasses

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.multiprocess.metrics import Snapshot, add_up
from app.telemetry.metrics import Metrics, MetricsSource, Statistics


def counted() -> Metrics:
    return Metrics(["/predict"])


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def test_one_process_alone_shows_its_own():
    alone = MetricsSource(counted())
    alone.metrics.rejected.labels("late").inc(2)
    alone.metrics.statistics.succeeded = 4
    assert samples(await alone.render())[("inference_rejected_total", (("reason", "late"),))] == 2
    assert (await alone.statistics()).succeeded == 4


async def test_the_sum_of_one_snapshot_is_what_that_process_shows():
    alone = counted()
    alone.duration.labels("/predict").observe(0.02)
    shown = samples(await MetricsSource(alone).render())
    summed = samples(add_up([Snapshot.of(alone)]).render())
    ours = {key for key in shown if not key[0].startswith("process_")}
    assert {key: shown[key] for key in ours} == {key: summed[key] for key in ours}
    assert shown.keys() == summed.keys()


def test_counters_histograms_and_gauges_add_up():
    parts = [counted() for _ in range(3)]
    for number, part in enumerate(parts, 1):
        part.requests.labels("/predict", "200").inc(number)
        part.batch_rows.observe(number)
        part.in_flight.set(number)
    parts[1].info.labels("m", "1", "d", "cpu", "int8").set(1)
    found = samples(add_up([Snapshot.of(part) for part in parts]).render())
    assert found[("inference_requests_total", (("code", "200"), ("route", "/predict")))] == 6
    assert found[("inference_batch_rows_bucket", (("le", "2.0"),))] == 2
    assert found[("inference_batch_rows_sum", ())] == 6
    assert found[("inference_requests_in_flight", ())] == 6
    assert [value for (name, _), value in found.items() if name == "model_info"] == [1]


def test_what_cannot_be_added_is_the_first_process_own():
    parts = [Snapshot.of(counted()) for _ in range(2)]
    first = samples(parts[0].render())
    found = samples(add_up(parts).render())
    for name in ("process_start_time_seconds", "process_max_fds"):
        assert found[(name, ())] == first[(name, ())]
    assert found[("process_resident_memory_bytes", ())] == 2 * first[("process_resident_memory_bytes", ())]
    assert [value for (name, _), value in found.items() if name == "python_info"] == [1]


def test_statistics_add_up_and_the_last_moment_is_the_latest():
    parts = [counted() for _ in range(2)]
    names = [field.name for field in dataclasses.fields(Statistics)]
    for factor, part in enumerate(parts, 1):
        for number, name in enumerate(names, 1):
            setattr(part.statistics, name, number * factor)
    total = add_up([Snapshot.of(part) for part in parts]).statistics
    for number, name in enumerate(names, 1):
        assert getattr(total, name) == number * (2 if name == "last_unix_seconds" else 3)


@pytest.mark.parametrize("count", [1, 2])
def test_the_text_is_valid_and_names_each_metric_once(count):
    text = add_up([Snapshot.of(counted()) for _ in range(count)]).render().decode()
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types)) > 15
