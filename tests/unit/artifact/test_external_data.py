"""Where an ONNX file keeps its weights: found in every place that the format has for them."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from app.artifact.external_data import FIELDS, external_data, verify_external_data
from app.artifact.manifest import read_artifact
from app.errors import ArtifactError
from app.runtime.loading import load_model
from model.package import file_entry
from tests.onnx_models import mlp
from tests.text_model import text_model


def outside(location: str, **more: str) -> TensorProto:
    """A tensor whose values are in a file."""
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in {"offset": "0", "location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(location: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=outside(location), indices=outside(location + ".indices"), dims=[1])


def graph(nodes=(), tensors=()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "test", [], [], list(tensors))


def node(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Anything", [], [], **attributes)


def test_every_place_where_a_file_may_keep_weights_is_looked_at(tmp_path: Path) -> None:
    deep = graph([node(body=graph([node(value=outside("deep"))], [outside("inner")]))])
    model = helper.make_model(
        graph(
            [
                node(value=outside("attribute")), node(values=[outside("first"), outside("second")]),
                node(body=deep), node(bodies=[graph(tensors=[outside("listed")])]),
                node(sparse=sparse("sparse")), node(sparses=[sparse("sparse list")]),
            ],
            [outside("weights/one.bin"), outside("weights/one.bin", offset="4"), outside("größe")],
        )
    )  # fmt: skip
    model.graph.sparse_initializer.append(sparse("sparse initializer"))
    function = model.functions.add(name="f", domain="d")
    function.node.append(node(value=outside("function")))
    function.attribute_proto.append(helper.make_attribute("default", outside("default")))
    training = model.training_info.add()
    training.algorithm.CopyFrom(graph(tensors=[outside("algorithm")]))
    training.initialization.CopyFrom(graph(tensors=[outside("initialization")]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    names = {"sparse", "sparse list", "sparse initializer"}
    assert set(external_data(tmp_path / "model.onnx")) == {
        "deep", "inner", "attribute", "first", "second", "listed", "weights/one.bin", "größe", "function", "default",
        "algorithm", "initialization", *names, *(name + ".indices" for name in names),
    }  # fmt: skip


def test_no_place_of_the_format_was_added_since() -> None:
    """Every message type that leads to a tensor, as the installed `onnx` describes them."""

    def leads(kind, seen=frozenset()) -> bool:
        fields = [field.message_type for field in kind.fields if field.message_type is not None]
        return kind.name == "TensorProto" or any(
            leads(each, seen | {kind.name}) for each in fields if each.name not in seen
        )

    reached, todo = set(), [onnx.ModelProto.DESCRIPTOR]
    while todo:
        kind = todo.pop()
        if kind.name in reached or kind.name == "TensorProto":
            continue
        reached.add(kind.name)
        ways = {field.number for field in kind.fields if field.message_type is not None and leads(field.message_type)}
        mine = FIELDS.get(kind.name.removesuffix("Proto").removesuffix("Info"), {})
        assert ways == set(mine), kind.name
        todo += [field.message_type for field in kind.fields if field.number in ways]
    assert {"ModelProto", "GraphProto", "FunctionProto", "TrainingInfoProto", "SparseTensorProto"} <= reached


def test_a_file_without_any_names_none(tmp_path: Path) -> None:
    assert external_data(mlp(tmp_path / "model.onnx")) == []
    assert external_data(text_model() / "model.onnx") == []


@settings(max_examples=300, derandomize=True)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_whatever_bytes_come_the_answer_is_names_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    raw = bytearray(mlp(folder / "model.onnx").read_bytes())
    raw[place % len(raw)] = byte
    (folder / "model.onnx").write_bytes(raw[: place % len(raw)] if cut else raw)
    with suppress(ArtifactError):
        external_data(folder / "model.onnx")


@pytest.fixture
def artifact(package: Callable[..., Path]) -> Path:
    """An artifact of a model with its weights in a file `weights.bin`, which the manifest does not list."""
    folder = package(mlp)
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    relist(folder, "model.onnx")
    return folder


def relist(folder: Path, *names: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("checksum", None)
    for name in names:
        entry = file_entry(folder / name)
        manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_weights_that_the_manifest_does_not_list_are_not_loaded(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest.json: `files`: expected 'weights.bin'.*package the model again"):
        load_model(artifact)
    relist(artifact, "weights.bin")
    load_model(artifact)
    (artifact / "weights.bin").write_bytes(bytes((artifact / "weights.bin").stat().st_size))
    with pytest.raises(ArtifactError, match=r"weights.bin: sha256 mismatch"):
        load_model(artifact)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "sub/../weights.bin", ""])
def test_a_place_outside_the_folder_or_written_in_another_way_is_refused(artifact: Path, location: str) -> None:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for pair in model.graph.initializer[0].external_data:
        if pair.key == "location":
            pair.value = location
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    relist(artifact, "model.onnx", "weights.bin")
    with pytest.raises(ArtifactError, match="`files`: expected"):
        verify_external_data(read_artifact(artifact))
