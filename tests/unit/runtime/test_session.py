"""One ONNX Runtime session: the provider truly in use, what the file says of itself, runs side by side."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from app.artifact.datatypes import DTYPES
from app.artifact.manifest import TensorSpec
from app.errors import ArtifactError, ProviderError
from app.runtime.session import Session
from tests import onnx_models

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


@pytest.fixture
def mlp(tmp_path) -> Session:
    return Session.open(onnx_models.mlp(tmp_path / "mlp.onnx"), "cpu")


@pytest.fixture
def cuda_build(monkeypatch):
    """Makes this ONNX Runtime look like a build with CUDA, whose sessions end up on the providers given."""

    def pretend(used: list[str]) -> list[list[str]]:
        asked: list[list[str]] = []

        class FakeSession:
            def __init__(self, _path: str, _options: object, providers: list[str], **_: object) -> None:
                asked.append(providers)

            def get_providers(self) -> list[str]:
                return used

            def get_inputs(self) -> list:
                return []

            get_outputs = get_inputs

        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(ort, "InferenceSession", FakeSession)
        return asked

    return pretend


def test_a_model_runs_and_answers_by_output_name(tmp_path):
    session = Session.open(onnx_models.two_outputs(tmp_path / "m.onnx"), "cpu")
    outputs = session.run({"a": np.array([[1, 5]]), "b": np.array([[1, -9]], np.float32)})
    assert {name: array.tolist() for name, array in outputs.items()} == {"total": [[2, -4]], "largest": [0]}


def test_a_bound_on_memory_is_for_cuda_alone(cuda_build):
    asked = cuda_build([CUDA, CPU])
    Session.open(Path("m.onnx"), "cuda", gpu_memory_bytes=3 << 30)
    Session.open(Path("m.onnx"), "cuda")
    Session.open(Path("m.onnx"), "cpu", may_fall_back=True, gpu_memory_bytes=3 << 30)
    assert asked == [[(CUDA, {"gpu_mem_limit": str(3 << 30)}), CPU], [CUDA, CPU], [CPU]]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_run_has_the_threads_it_was_given(tmp_path, monkeypatch, threads):
    class FakeSession:
        def __init__(self, _path: str, options: ort.SessionOptions, **_: object) -> None:
            asked.append(options.intra_op_num_threads)

        def get_providers(self) -> list[str]:
            return [CPU]

        def get_outputs(self) -> list:
            return []

    asked: list[int] = []
    monkeypatch.setattr(ort, "InferenceSession", FakeSession)
    Session.open(tmp_path / "m.onnx", "cpu", threads=threads)
    assert asked == [threads]


def test_one_session_answers_several_threads_at_once(mlp):
    inputs = [np.full((1, 4), value, np.float32) for value in range(64)]
    expected = [mlp.run({"features": array})["scores"] for array in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda array: mlp.run({"features": array})["scores"], inputs))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("datatype", TYPES)
def test_every_datatype_of_the_protocol_is_known_and_comes_back_unchanged(tmp_path, datatype):
    session = Session.open(onnx_models.identity(tmp_path / "m.onnx", TYPES[datatype]), "cpu")
    assert session.specs() == ([TensorSpec("x", datatype, [-1, 2])], [TensorSpec("y", datatype, [-1, 2])])
    given = np.array([["a", "é"]], object) if datatype == "BYTES" else np.array([[1, 0]], DTYPES[datatype])
    found = session.run({"x": given})["y"]
    assert found.dtype == given.dtype
    assert np.array_equal(found, given)


def test_the_datatypes_tested_are_all_there_are():
    assert set(TYPES) == set(DTYPES)


def test_a_type_outside_the_protocol_is_refused_by_name(tmp_path):
    session = Session.open(onnx_models.identity(tmp_path / "m.onnx", TensorProto.BFLOAT16), "cpu")
    with pytest.raises(ArtifactError, match=r"m.onnx: 'x': type tensor\(bfloat16\) is not supported"):
        session.specs()


def test_an_output_that_is_no_tensor_is_refused_by_name(tmp_path):
    path = onnx_models.save(
        tmp_path / "m.onnx",
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [onnx_models.tensor("x", ["rows", 2])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )
    with pytest.raises(ArtifactError, match=r"'y': type seq\(tensor\(float\)\) is not supported"):
        Session.open(path, "cpu").specs()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x08" * 50, None], ids=["empty", "text", "protobuf", "absent"])
def test_a_file_that_is_no_model_is_refused_in_one_line_and_nothing_is_printed(tmp_path, capfd, content):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m.onnx: ONNX Runtime cannot load it: .+") as caught:
        Session.open(path, "cpu")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_file_whose_error_cannot_be_decoded_is_refused_and_nothing_is_printed(tmp_path, capfd):
    path = onnx_models.mlp(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"Relu", b"Re\xff\xfe"))
    with pytest.raises(ArtifactError, match=r"m.onnx: ONNX Runtime cannot load it"):
        Session.open(path, "cpu")
    # Standard output carries nothing but log lines.
    assert capfd.readouterr() == ("", "")


def test_a_file_whose_names_cannot_be_decoded_is_refused(tmp_path):
    path = onnx_models.mlp(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"scores", b"scor\xff\xfe"))
    with pytest.raises(ArtifactError, match=r"m.onnx"):
        Session.open(path, "cpu").specs()


@pytest.mark.parametrize(("provider", "may_fall_back"), [("cpu", False), ("cuda", True)])
def test_without_a_cuda_build_the_cpu_serves_where_it_is_asked_for_or_may(
    monkeypatch, tmp_path, provider, may_fall_back
):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["AzureExecutionProvider", CPU])
    path = onnx_models.mlp(tmp_path / "m.onnx")
    assert Session.open(path, provider, may_fall_back=may_fall_back).provider == "cpu"


def test_cuda_without_a_cuda_build_is_refused_and_says_what_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match=rf"^APP_PROVIDER=cuda: .*\['{CPU}'\]"):
        Session.open(onnx_models.mlp(tmp_path / "m.onnx"), "cuda")


@pytest.mark.parametrize("used", [[CPU], [], [CPU, CUDA]], ids=["cpu", "none", "cuda last"])
def test_cuda_that_silently_became_something_else_is_refused(cuda_build, tmp_path, used):
    cuda_build(used)
    with pytest.raises(ProviderError, match=rf"^APP_PROVIDER=cuda: expected {CUDA} first, found "):
        Session.open(tmp_path / "m.onnx", "cuda")


@pytest.mark.parametrize("may_fall_back", [False, True])
def test_cuda_is_asked_for_first_and_reported_when_it_is_in_use(cuda_build, tmp_path, may_fall_back):
    asked = cuda_build([CUDA, CPU])
    assert Session.open(tmp_path / "m.onnx", "cuda", may_fall_back=may_fall_back).provider == "cuda"
    assert asked == [[CUDA, CPU]]


def test_cuda_that_may_fall_back_says_that_it_did(cuda_build, tmp_path):
    cuda_build([CPU])
    assert Session.open(tmp_path / "m.onnx", "cuda", may_fall_back=True).provider == "cpu"


def test_the_cpu_is_used_when_asked_for_even_with_a_cuda_build(cuda_build, tmp_path):
    asked = cuda_build([CPU])
    assert Session.open(tmp_path / "m.onnx", "cpu").provider == "cpu"
    assert asked == [[CPU]]
