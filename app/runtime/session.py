"""One ONNX Runtime session: opens it on the provider that was asked for, checks its schema, runs it.

The only module that imports ONNX Runtime. Knows nothing of requests or batches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from app.artifact.datatypes import ONNX_TYPES, Tensors
from app.artifact.manifest import TensorSpec
from app.errors import ArtifactError, ProviderError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# On a CPU padding is the whole cost and a large batch only adds latency; a GPU wants large ones.
BATCH_LIMITS = {"cpu": (8, 512), "cuda": (128, 16384)}


class Session:
    """A loaded model. `run` may be called from several threads at once; the weights exist once.

    provider: "cpu" or "cuda", what is truly in use.
    """

    def __init__(self, session: ort.InferenceSession, path: Path, provider: str, output_names: list[str]) -> None:
        self._session = session
        self._path = path
        self.provider = provider
        self.output_names = output_names

    @classmethod
    def open(cls, path: Path, provider: str) -> "Session":
        """Loads the model at `path` on `provider`: "cpu", "cuda", or "auto" (CUDA if it works, else CPU).

        Raises ProviderError if "cuda" is asked for and not truly in use, ArtifactError if the file does not load.
        """
        wanted = _providers(provider)
        ort.set_default_logger_severity(4)
        try:
            session = ort.InferenceSession(str(path), _options(), providers=wanted, enable_fallback=0)
            # Here, because a name that is not UTF-8 fails only when it is read.
            output_names = [node.name for node in session.get_outputs()]
        # ONNX Runtime's exceptions share no base class below Exception.
        except Exception as error:
            raise ArtifactError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}") from None
        # ONNX Runtime falls back to the CPU without an error when a provider fails to start (a missing driver, say).
        used = session.get_providers()
        cuda = PROVIDERS["cuda"]
        if provider == "cuda" and (not used or used[0] != cuda):
            raise ProviderError(
                f"APP_PROVIDER=cuda: expected {cuda} first, found {used}; check the driver and libraries"
            )
        return cls(session, path, "cuda" if used[0] == cuda else "cpu", output_names)

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

    def check_schema(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raises ArtifactError unless the file has the manifest's names, datatypes, ranks and fixed sizes."""
        found_inputs, found_outputs = self.specs()
        for kind, expected, found in (("input", inputs, found_inputs), ("output", outputs, found_outputs)):
            names = sorted(spec.name for spec in found)
            if sorted(spec.name for spec in expected) != names:
                listed = sorted(spec.name for spec in expected)
                raise ArtifactError(f"{self._path}: {kind}s: expected {listed} as in the manifest, found {names}")
            by_name = {spec.name: spec for spec in found}
            for spec in expected:
                other = by_name[spec.name]
                if spec.datatype != other.datatype:
                    raise _mismatch(self._path, kind, spec.name, "datatype", spec.datatype, other.datatype)
                if len(spec.shape) != len(other.shape):
                    raise _mismatch(self._path, kind, spec.name, "rank", len(spec.shape), len(other.shape))
                if any(a != b and -1 not in (a, b) for a, b in zip(spec.shape, other.shape, strict=True)):
                    raise _mismatch(self._path, kind, spec.name, "shape", spec.shape, other.shape)

    def run(self, inputs: Tensors) -> Tensors:
        """Every output of one run, by name. Raises what ONNX Runtime raises; its message may quote the input."""
        return dict(zip(self.output_names, self._session.run(None, inputs), strict=True))


def _mismatch(path: Path, kind: str, name: str, what: str, expected: object, found: object) -> ArtifactError:
    return ArtifactError(f"{path}: {kind} {name!r}: {what}: expected {expected} as in the manifest, found {found}")


def _providers(provider: str) -> list[str]:
    available = ort.get_available_providers()
    if provider == "cpu" or (provider == "auto" and PROVIDERS["cuda"] not in available):
        return [PROVIDERS["cpu"]]
    if PROVIDERS["cuda"] not in available:
        raise ProviderError(f"APP_PROVIDER=cuda: this ONNX Runtime has only {available}; install the `gpu` extra")
    # The CUDA libraries come as wheels beside this one; without this call only a system-wide CUDA would be found.
    ort.preload_dlls()
    return [PROVIDERS["cuda"], PROVIDERS["cpu"]]


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    # Parallelism comes from runs side by side: one thread each scales better than one run on every core.
    options.intra_op_num_threads = 1
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
