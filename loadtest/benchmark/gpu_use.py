"""What the driver says of the GPUs here: memory, utilisation, what is missing. Knows no model.

Sums over all GPUs that NVML shows: whichever of them CUDA takes, a difference of two readings is what was added.
"""

import ctypes
import threading
from contextlib import redirect_stdout
from pathlib import Path
from types import TracebackType

INTERVAL_SECONDS = 0.05


class Unmeasured(Exception):
    """This cannot be measured here; the message says why."""


class Gpus:
    """All GPUs; within `with`, also the most that they used meanwhile. Raises Unmeasured where NVML does not answer."""

    def __init__(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        # Its exceptions cannot be named where the module is missing.
        except Exception as error:
            raise Unmeasured(f"NVML: {error}") from None
        self._nvml = pynvml
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes, self.peak_utilization_percent = 0, 0

    def names(self) -> list[str]:
        """Of the GPUs, then the driver's version."""
        return [*map(self._nvml.nvmlDeviceGetName, self._handles), self._nvml.nvmlSystemGetDriverVersion()]

    def used_bytes(self) -> int:
        return sum(int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles)

    def utilization_percent(self) -> int | None:
        """Of the busiest; None if none of them tells, as with MIG."""
        found = []
        for handle in self._handles:
            try:
                found.append(int(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
            except self._nvml.NVMLError:
                continue
        return max(found, default=None)

    def __enter__(self) -> "Gpus":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.used_bytes())
        self.peak_utilization_percent = max(self.peak_utilization_percent, self.utilization_percent() or 0)


def create_context() -> None:
    """A CUDA context of this process on the first GPU, which lasts as long as it. Raises OSError."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    code = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    code = code or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if code:
        raise OSError(f"the CUDA driver answers {code}")


def missing() -> list[str]:
    """What CUDA needs and this machine lacks, as far as can be seen from here."""
    import onnxruntime as ort

    lacks = []
    if not list(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        lacks.append("an NVIDIA device (/dev/nvidia0)")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        lacks.append("the driver (libcuda.so.1)")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        lacks.append("the onnxruntime-gpu wheel (extra gpu)")
        return lacks
    with redirect_stdout(None):
        ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        lacks.append(f"libraries ({error})")
    return lacks
