"""The benchmark's arithmetic: figures beside their targets and limits, as a table."""

from argparse import ArgumentTypeError

import pytest

from loadtest.benchmark.server import text_artifact
from loadtest.benchmark.targets import CONNECTIONS, OVERLOADS, client_cpu_ms, queue_p99_ms, table, targets
from tests import onnx_models
from tests.text_model import text_model


@pytest.fixture
def report():
    load = {
        "requests_per_second": 95.0,
        "server_cpu_ms_per_request": 2.0,
        "engine_cpu_ms_per_request": 2.0,
        "p50_ms": 10.0,
        "p99_ms": 20.0,
        "goodput_250ms_per_second": 95.0,
        "goodput_100ms_per_second": 95.0,
        "refusal_p99_ms": 2.0,
        "refused_per_second": 5.0,
        "client_cpu_share": 0.1,
    }
    ceiling = {"with_tokenising": {"per_second": 100.0, "cpu_ms": 1.9}, "single_ms": [8.0, 9.0, 10.0]}
    return {
        "cpus": 2,
        "ceiling_before": ceiling,
        "ceiling_after": ceiling,
        "floor": {1: {**load, "p50_ms": 1.0}, 64: {**load, "requests_per_second": 1000.0}},
        "free_model": {1: {**load, "requests_per_second": 500.0}, 2: load},
        "closed": dict.fromkeys(CONNECTIONS, load),
        "open": dict.fromkeys(OVERLOADS, load),
        "open_100": {2.0: load},
        "half_load": load,
        "open_capacity": 100.0,
        "open_100_capacity": 100.0,
        "start_seconds": 0.7,
        "peak_bytes": 150e6,
        "plain_1": load,
        "plain_2": load,
    }


def test_only_a_text_model_is_measured_and_another_is_one_line(package, tmp_path):
    assert text_artifact(str(text_model())) == text_model()
    for folder, says in ((package(onnx_models.mlp), "found tensors"), (tmp_path / "nowhere", "nowhere")):
        with pytest.raises(ArgumentTypeError, match=says):
            text_artifact(str(folder))


def test_targets_are_ratios_within_the_run(report):
    found = {target.name: target for target in targets(report)}
    through = found["throughput at 64 connections / ceiling with tokenisation"]
    assert (through.value, through.met) == (0.95, True)
    assert found["p50 at 1 connection / (run + tokenise + web floor)"].value == 1.0
    report["peak_bytes"] = 10**9
    assert "peak memory, MB" in [target.name for target in targets(report) if not target.met]
    assert "MISSED" in table(report)


def test_limits_leave_room_for_the_client_and_the_web_floor_alone(report):
    report["open"][5.0] = report["open"][5.0] | {"refused_per_second": 705.0}
    found = {target.name: target for target in targets(report)}
    # Of 1.9 + 2.0 + 2.0 * 0.1 / 0.9 milliseconds for a request, the model's are 1.9.
    limit = found["throughput at 256 connections / ceiling"].limit
    assert limit == pytest.approx(1.9 / (1.9 + 2.0 + 2.0 / 9))
    # 800 requests/s cost client and web side 1,778 ms of two CPUs' 2,000; the model gets what is left.
    limit = found["goodput within 250 ms at 5x / capacity"].limit
    assert limit == pytest.approx((2000 - 800 * (2.0 + 2.0 / 9)) / 1.9 / 100)


def test_the_clients_cpu_time_follows_from_its_share():
    load = {"server_cpu_ms_per_request": 3.0, "client_cpu_share": 0.25}
    assert client_cpu_ms(load) == 1.0


def test_a_queue_without_load_takes_as_long_as_service_and_one_at_half_load_longer():
    times = [1.0] * 98 + [4.0] * 2
    assert queue_p99_ms(times, 0.001, 1) == 4.0
    # M/D/1 at half load: p99 of the wait is about 3.6 times of service.
    assert 4.0 < queue_p99_ms([1.0], 500, 1) < 5.0
    assert queue_p99_ms([1.0], 1000, 2) < queue_p99_ms([1.0], 500, 1)
