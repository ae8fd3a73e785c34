"""GPU metrics, with a double of NVML: no GPU is needed, and none is asked for its numbers."""

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.telemetry import gpu
from app.telemetry.gpu import GpuSampler

GIB = 2**30


class NvmlError(Exception):
    """What NVML raises for all that goes wrong."""


class FakeNvml:
    """The part of `pynvml` that is used. `readings` by device; a missing one raises, as an unsupported one does."""

    NVMLError = NvmlError

    def __init__(self, *readings: dict[str, float], init_error: Exception | None = None) -> None:
        self.readings = readings
        self.init_error = init_error
        self.opened = self.closed = 0
        self.sampled = threading.Semaphore(0)

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.readings)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def _read(self, device: int, name: str) -> float:
        if name not in self.readings[device]:
            raise NvmlError("Not Supported")
        return self.readings[device][name]

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=self._read(device, "percent"), memory=99)

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(
            used=self._read(device, "used"), total=self._read(device, "total"), free=self._read(device, "total")
        )

    def nvmlDeviceGetPowerUsage(self, device: int) -> float:
        self.sampled.release()
        return self._read(device, "milliwatts")


FIRST = {"percent": 25, "used": 3 * GIB, "total": 80 * GIB, "milliwatts": 123_400}
SECOND = {"percent": 100, "used": 79 * GIB, "total": 80 * GIB, "milliwatts": 700_000}


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    text = generate_latest(registry).decode()
    return {
        (sample.name, sample.labels["gpu"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def start(monkeypatch: pytest.MonkeyPatch, nvml: Any, registry: CollectorRegistry) -> GpuSampler | None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return GpuSampler.start(registry)


def test_every_gpu_is_read_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    sampler = start(monkeypatch, FakeNvml(FIRST, SECOND), registry)
    assert sampler is not None
    sampler.stop()
    assert samples(registry) == {
        ("gpu_utilization_ratio", "0"): 0.25,
        ("gpu_utilization_ratio", "1"): 1.0,
        ("gpu_memory_used_bytes", "0"): 3 * GIB,
        ("gpu_memory_used_bytes", "1"): 79 * GIB,
        ("gpu_memory_total_bytes", "0"): 80 * GIB,
        ("gpu_memory_total_bytes", "1"): 80 * GIB,
        ("gpu_power_watts", "0"): 123.4,
        ("gpu_power_watts", "1"): 700.0,
    }


def test_a_reading_that_a_device_does_not_support_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    slice_of_a_gpu = {"used": GIB, "total": 10 * GIB}
    sampler = start(monkeypatch, FakeNvml(slice_of_a_gpu), registry)
    assert sampler is not None
    sampler.stop()
    found = samples(registry)
    assert found[("gpu_memory_used_bytes", "0")] == GIB
    assert found[("gpu_memory_total_bytes", "0")] == 10 * GIB
    assert not {name for name, _ in found} & {"gpu_utilization_ratio", "gpu_power_watts"}, "nothing made up"


@pytest.mark.parametrize(
    "error", [NvmlError("Driver Not Loaded"), OSError("libnvidia-ml.so.1"), RuntimeError("anything")]
)
def test_without_a_driver_there_are_no_gpu_metrics(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    registry = CollectorRegistry()
    assert start(monkeypatch, FakeNvml(FIRST, init_error=error), registry) is None
    assert b"gpu_" not in generate_latest(registry)


def test_without_the_library_there_are_no_gpu_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    # What an import of a module that is not installed does.
    assert start(monkeypatch, None, registry) is None
    assert b"gpu_" not in generate_latest(registry)


def test_a_driver_without_gpus_gives_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    sampler = start(monkeypatch, FakeNvml(), registry)
    if sampler is not None:
        sampler.stop()
    assert samples(registry) == {}


def test_sampling_goes_on_in_a_thread_of_its_own_until_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERVAL_SECONDS", 0.001)
    registry, nvml = CollectorRegistry(), FakeNvml(dict(FIRST))
    sampler = start(monkeypatch, nvml, registry)
    assert sampler is not None
    nvml.readings[0]["milliwatts"] = 50_000
    for _ in range(5):
        assert nvml.sampled.acquire(timeout=30)
    sampler.stop()
    assert samples(registry)[("gpu_power_watts", "0")] == 50
    assert "gpu-sampler" not in {thread.name for thread in threading.enumerate()}
    assert (nvml.opened, nvml.closed) == (1, 1)


def test_a_gpu_that_stops_answering_does_not_end_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERVAL_SECONDS", 0.001)
    registry, nvml = CollectorRegistry(), FakeNvml(dict(FIRST), dict(SECOND))
    sampler = start(monkeypatch, nvml, registry)
    assert sampler is not None
    nvml.readings[0].clear()
    nvml.readings[1]["milliwatts"] = 60_000
    for _ in range(8):
        assert nvml.sampled.acquire(timeout=30)
    sampler.stop()
    assert samples(registry)[("gpu_power_watts", "1")] == 60
