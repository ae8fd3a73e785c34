"""One ONNX Runtime session, on the provider that was asked for; and the model it makes with an artifact and a task.

The only module that imports ONNX Runtime, when it opens a session: a process that has none does not pay for it.
Knows nothing of requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from app.artifact.datatypes import ONNX_TYPES, Tensors
from app.artifact.manifest import Artifact, TensorSpec
from app.errors import ArtifactError, ProviderError
from app.runtime.tasks import Task

Provider = Literal["cpu", "cuda"]
PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session:
    """A loaded model. `run` may be called from several threads at once; the weights exist once.

    provider: "cpu" or "cuda", what is truly in use.
    """

    def __init__(self, session: Any, path: Path, provider: Provider, output_names: list[str]) -> None:
        self._session = session
        self._path = path
        self.provider = provider
        self.output_names = output_names

    @classmethod
    def open(
        cls, path: Path, provider: Provider, *, may_fall_back: bool = False, threads: int = 1, gpu_memory_bytes: int = 0
    ) -> "Session":
        """Loads the model at `path`. may_fall_back: on the CPU if `provider` does not work here. threads: of one run.
        gpu_memory_bytes: that CUDA may take for weights and runs; 0: without a bound.

        Raises ProviderError if `provider` is not truly in use and must be, ArtifactError if the file does not load.
        """
        import onnxruntime as ort

        wanted = _providers(ort, provider, may_fall_back)
        if gpu_memory_bytes and wanted[0] == PROVIDERS["cuda"]:
            wanted[0] = (wanted[0], {"gpu_mem_limit": str(gpu_memory_bytes)})
        ort.set_default_logger_severity(4)
        try:
            session = ort.InferenceSession(str(path), _options(ort, threads), providers=wanted, enable_fallback=0)
            # Here, because a name that is not UTF-8 fails only when it is read.
            output_names = [node.name for node in session.get_outputs()]
        # ONNX Runtime's exceptions share no base class below Exception.
        except Exception as error:
            raise ArtifactError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}") from None
        # ONNX Runtime falls back to the CPU without an error when a provider fails to start (a missing driver, say).
        used = session.get_providers()
        if used[:1] != [PROVIDERS[provider]] and not may_fall_back:
            raise ProviderError(
                f"APP_PROVIDER={provider}: expected {PROVIDERS[provider]} first, found {used}; check the driver and "
                "libraries"
            )
        return cls(session, path, "cuda" if used[0] == PROVIDERS["cuda"] else "cpu", output_names)

    def specs(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """The file's own inputs and outputs, -1 for dimensions that vary. Raises ArtifactError on other types."""
        try:
            return self._specs(self._session.get_inputs()), self._specs(self._session.get_outputs())
        except UnicodeDecodeError:
            raise ArtifactError(f"{self._path}: an input or output has a name that is not UTF-8") from None

    def _specs(self, nodes: Sequence[Any]) -> list[TensorSpec]:
        specs = []
        for node in nodes:
            if node.type not in ONNX_TYPES:
                raise ArtifactError(f"{self._path}: {node.name!r}: type {node.type} is not supported; only tensors are")
            shape = [size if isinstance(size, int) else -1 for size in node.shape]
            specs.append(TensorSpec(node.name, ONNX_TYPES[node.type], shape))
        return specs

    def run(self, inputs: Tensors) -> Tensors:
        """Every output of one run, by name. Raises what ONNX Runtime raises; its message may quote the input."""
        return dict(zip(self.output_names, self._session.run(None, inputs), strict=True))


@dataclass(slots=True)
class Model:
    """An artifact, its task, and the session's `run` as `infer`; with what loading it found out. Times in seconds.

    provider: what is truly in use. runners, batch_rows, batch_tokens: for that provider.
    """

    artifact: Artifact
    task: Task
    provider: Provider
    infer: Callable[[Tensors], Tensors]
    runners: int
    batch_rows: int
    batch_tokens: int
    tokens_per_second: float = 1.0
    overhead_tokens: float = inf
    stage_seconds: dict[str, float] = field(default_factory=dict)
    golden_error: float = 0.0

    def run(self, payloads: Sequence[Any]) -> list[Any]:
        """One batch, from payloads to results: the function that the batcher calls in its threads."""
        return self.task.split(payloads, self.infer(self.task.assemble(payloads)))


def _providers(ort: Any, provider: Provider, may_fall_back: bool) -> list[Any]:
    available = ort.get_available_providers()
    if provider == "cpu" or (may_fall_back and PROVIDERS[provider] not in available):
        return [PROVIDERS["cpu"]]
    if PROVIDERS[provider] not in available:
        raise ProviderError(f"APP_PROVIDER={provider}: this ONNX Runtime has only {available}; install the `gpu` extra")
    # The CUDA libraries come as wheels beside this one; without this call only a system-wide CUDA would be found.
    ort.preload_dlls()
    return [PROVIDERS[provider], PROVIDERS["cpu"]]


def _options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    # Parallelism comes from runs side by side: one thread each scales better than one run on every core.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning worker steals the core that the event loop needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Errors reach us as exceptions; a run's own log lines could quote the input.
    options.log_severity_level = 4
    return options


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__
