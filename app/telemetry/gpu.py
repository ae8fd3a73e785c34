"""Samples GPU utilisation, memory and power through NVML, off the request path. Silent where there is no GPU."""

import threading
from typing import Any

from prometheus_client import CollectorRegistry

from app.telemetry.metrics import GpuMetrics

INTERVAL_SECONDS = 5.0


class GpuSampler:
    """A thread that fills `GpuMetrics`. nvml: the `pynvml` module, or a double of it."""

    def __init__(self, nvml: Any, registry: CollectorRegistry) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        self._metrics = GpuMetrics(registry)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="gpu-sampler", daemon=True)

    @classmethod
    def start(cls, registry: CollectorRegistry) -> "GpuSampler | None":
        """Starts sampling; None where NVML or a GPU is missing."""
        try:
            import pynvml

            sampler = cls(pynvml, registry)
        except Exception:
            return None
        sampler.sample()
        sampler._thread.start()
        return sampler

    def sample(self) -> None:
        """Reads every GPU once. A reading that a device does not support (MIG has no utilisation) is left out."""
        for index, handle in enumerate(self._handles):
            gpu = str(index)
            readings = (
                (self._metrics.utilization, lambda h: self._nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100),
                (self._metrics.memory_used, lambda h: self._nvml.nvmlDeviceGetMemoryInfo(h).used),
                (self._metrics.memory_total, lambda h: self._nvml.nvmlDeviceGetMemoryInfo(h).total),
                (self._metrics.power, lambda h: self._nvml.nvmlDeviceGetPowerUsage(h) / 1000),
            )
            for gauge, read in readings:
                try:
                    value = read(handle)
                except self._nvml.NVMLError:
                    continue
                gauge.labels(gpu).set(value)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(1)
        self._nvml.nvmlShutdown()

    def _loop(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.sample()
