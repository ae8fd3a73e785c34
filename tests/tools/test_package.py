"""`python -m model.package`: any ONNX model in, an artifact that passes the gate out, or nothing at all."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.artifact.manifest import MANIFEST
from app.runtime.loading import load_model
from app.runtime.session import Model, Session
from app.runtime.tasks.text_classification import TextClassification
from model.package.command import main
from tests import onnx_models
from tests.onnx_models import save, tensor
from tests.unit.runtime.tasks.test_text import word_tokenizer


@pytest.fixture
def package(command, tmp_path):
    """Runs the command for a model, into tmp_path/made/artifact unless told otherwise; returns its exit code."""

    def run(model: Path, *arguments: object) -> object:
        out = tmp_path / "made/artifact"
        return command(main, model, "--name", "mine", "--version", "3", "--out", out, *arguments)

    return run


@pytest.fixture
def made(tmp_path) -> Path:
    return tmp_path / "made" / "artifact"


def left_behind(tmp_path: Path) -> list[str]:
    """What a run left in its output's folder, hidden things too."""
    return [path.name for path in (tmp_path / "made").iterdir()] if (tmp_path / "made").exists() else []


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def answer(model: Model, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What the packaged model answers, by the serving path."""
    units = model.task.encode(inputs)
    return model.task.respond(units, [model.run([unit.payload])[0] for unit in units])


def relu(path: Path, shape: list, kind: int = TensorProto.FLOAT) -> Path:
    """x → y = max(x, 0), of one shape."""
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], [tensor("x", shape, kind)], [tensor("y", shape, kind)])


def across_rows(path: Path) -> Path:
    """x [rows, 2] → y [rows, 2], where each row's answer depends on the others."""
    node = helper.make_node("Softmax", ["x"], ["y"], axis=0)
    return save(path, [node], [tensor("x", ["rows", 2])], [tensor("y", ["rows", 2])])


def average(path: Path) -> Path:
    """x [rows, 2] → y [], one number for all rows."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)
    return save(path, [node], [tensor("x", ["rows", 2])], [tensor("y", [])])


def with_a_scalar(path: Path) -> Path:
    """x [rows, 2] and a scalar → y [rows, 2], their product."""
    node = helper.make_node("Mul", ["x", "scale"], ["y"])
    return save(path, [node], [tensor("x", ["rows", 2]), tensor("scale", [])], [tensor("y", ["rows", 2])])


def noise(path: Path) -> Path:
    """A model that never answers the same twice."""
    node = helper.make_node("RandomNormalLike", ["x"], ["y"])
    return save(path, [node], [tensor("x", ["rows", 2])], [tensor("y", ["rows", 2])])


def logarithm(path: Path) -> Path:
    node = helper.make_node("Log", ["x"], ["y"])
    return save(path, [node], [tensor("x", ["rows", 2])], [tensor("y", ["rows", 2])])


def needs_indices_below_5(path: Path) -> Path:
    """Fails on the larger ones of the integers that are generated."""
    node = helper.make_node("Gather", ["table", "index"], ["value"])
    inputs, outputs = [tensor("index", ["rows", 50], TensorProto.INT64)], [tensor("value", ["rows", 50])]
    return save(path, [node], inputs, outputs, table=np.arange(5, dtype=np.float32))


def typed(kind: int) -> Callable[[Path], Path]:
    return lambda path: onnx_models.identity(path, kind)


MODELS = {
    "mlp": (onnx_models.mlp, True, "fp32"),
    "image": (onnx_models.image, True, "fp32"),
    "two outputs": (onnx_models.two_outputs, True, "fp32"),
    "lookup": (onnx_models.lookup, True, "fp32"),
    "strings": (typed(TensorProto.STRING), True, "other"),
    "booleans": (typed(TensorProto.BOOL), True, "other"),
    "half floats": (typed(TensorProto.FLOAT16), True, "fp16"),
    "doubles": (typed(TensorProto.DOUBLE), True, "fp64"),
    "unsigned bytes": (typed(TensorProto.UINT8), True, "other"),
    "fixed batch": (lambda path: relu(path, [2, 3]), False, "fp32"),
    "no batch dimension": (lambda path: relu(path, []), False, "fp32"),
    "rows that depend on each other": (across_rows, False, "fp32"),
    "one answer for all rows": (average, False, "fp32"),
    "a scalar beside the rows": (with_a_scalar, False, "fp32"),
    "a classifier as plain tensors": (onnx_models.classifier, True, "fp32"),
}


@pytest.mark.parametrize(
    ("build", "batching", "precision"), MODELS.values(), ids=[key.replace(" ", "-") for key in MODELS]
)
def test_a_model_of_any_shape_becomes_an_artifact_that_passes(package, made, tmp_path, build, batching, precision):
    source = build(tmp_path / "source.onnx")
    assert package(source) == 0
    model = load_model(made)
    found = model.artifact.manifest
    assert (found.name, found.version, found.task, found.precision) == ("mine", "3", "tensors", precision)
    assert found.batching is batching
    session = Session.open(model.artifact.path(found.model_file), "cpu")
    assert (found.inputs, found.outputs) == session.specs()
    assert (made / "model.onnx").read_bytes() == source.read_bytes()
    assert set(found.files) == {"model.onnx", "golden.npz"}
    assert left_behind(tmp_path) == ["artifact"]


def test_the_packaged_model_answers_what_the_model_does(package, made, tmp_path):
    package(onnx_models.two_outputs(tmp_path / "source.onnx"))
    found = answer(load_model(made), a=np.array([[1, 5]] * 20), b=np.array([[1, -9]] * 20, np.float32))
    assert found["total"].tolist() == [[2, -4]] * 20
    assert found["largest"].tolist() == [0] * 20


def test_a_packaged_string_model_answers_strings(package, made, tmp_path):
    package(onnx_models.identity(tmp_path / "source.onnx", TensorProto.STRING))
    assert answer(load_model(made), x=np.array([["né", ""]], object))["y"].tolist() == [["né", ""]]


def test_packaging_twice_gives_the_same_artifact(package, made, tmp_path):
    source = onnx_models.image(tmp_path / "source.onnx")
    package(source)
    package(source, "--out", tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (made / MANIFEST).read_bytes()


def test_the_folder_has_the_models_name_if_no_other_is_given(monkeypatch, tmp_path):
    source = onnx_models.mlp(tmp_path / "source.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["model.package", str(source), "--name", "digits", "--version", "1"])
    main()
    assert load_model(tmp_path / "digits").artifact.manifest.name == "digits"


def test_a_model_that_fails_on_generated_inputs_is_packaged_with_given_ones(package, made, tmp_path, capsys):
    source = needs_indices_below_5(tmp_path / "source.onnx")
    assert package(source) == 3
    assert "generated inputs; give fitting ones with --inputs" in capsys.readouterr().err
    np.savez(tmp_path / "inputs.npz", index=np.array([[0, 1, 2, 3, 4] * 10] * 2, np.int32))
    assert package(source, "--inputs", tmp_path / "inputs.npz") == 0
    with np.load(made / "golden.npz") as golden:
        assert golden["output.value"].tolist() == [[0, 1, 2, 3, 4] * 10] * 2


def test_dimensions_that_may_vary_are_generated_in_the_size_asked_for(package, made, tmp_path):
    package(onnx_models.image(tmp_path / "source.onnx"), "--size", 20)
    with np.load(made / "golden.npz") as golden:
        assert golden["input.pixels"].shape == (3, 3, 20, 20)


def test_weights_beside_the_model_come_along_and_are_checked(package, made, tmp_path):
    model = onnx.load(onnx_models.mlp(tmp_path / "plain.onnx"))
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    assert package(tmp_path / "net.onnx") == 0
    assert set(manifest(made)["files"]) == {"model.onnx", "net.onnx.data", "golden.npz"}
    features = np.ones((1, 4), np.float32)
    package(tmp_path / "plain.onnx", "--out", tmp_path / "plain")
    expected = answer(load_model(tmp_path / "plain"), features=features)["scores"]
    assert np.array_equal(answer(load_model(made), features=features)["scores"], expected)


def test_the_tolerance_given_is_the_one_recorded(package, made, tmp_path):
    package(onnx_models.mlp(tmp_path / "source.onnx"), "--tolerance", "0.25")
    assert manifest(made)["golden"]["tolerance"] == 0.25


def test_a_model_that_answers_infinity_can_be_packaged(package, tmp_path, capsys):
    np.savez(tmp_path / "inputs.npz", x=np.array([[0, 1], [2, 0]], np.float32))
    assert package(logarithm(tmp_path / "source.onnx"), "--inputs", tmp_path / "inputs.npz") == 0, capsys.readouterr()


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def truncated(path: Path) -> Path:
    data = npz(path, features=np.ones((3, 4), np.float32)).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def single_array(path: Path) -> Path:
    with path.open("wb") as file:
        np.save(file, np.ones((3, 4), np.float32))
    return path


BAD_INPUTS: dict[str, Callable[[Path], Path]] = {
    "absent": lambda path: path,
    "not an archive": lambda path: written(path, b"1,2,3,4\n"),
    "empty": lambda path: written(path, b""),
    "truncated": truncated,
    "one bare array": single_array,
    "pickled": lambda path: npz(path, features=np.array([[{}] * 4], object)),
    "other names": lambda path: npz(path, pixels=np.ones((3, 4), np.float32)),
    "one name too many": lambda path: npz(path, features=np.ones((3, 4)), mask=np.ones(3)),
    "other shape": lambda path: npz(path, features=np.ones((3, 5), np.float32)),
    "other rank": lambda path: npz(path, features=np.ones(4, np.float32)),
    "text for numbers": lambda path: npz(path, features=np.full((3, 4), "x")),
}


@pytest.mark.parametrize("build", BAD_INPUTS.values(), ids=[key.replace(" ", "-") for key in BAD_INPUTS])
def test_inputs_that_do_not_fit_end_it_in_one_line_and_leave_nothing(package, tmp_path, capfd, build):
    inputs = build(tmp_path / "inputs.npz")
    assert package(onnx_models.mlp(tmp_path / "source.onnx"), "--inputs", inputs) == 3
    err = capfd.readouterr().err
    assert err.startswith("model.package: ")
    assert "inputs" in err
    assert len(err.splitlines()) == 1
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda path: path, "source.onnx"),
        (lambda path: written(path, b"junk"), "source.onnx: ONNX Runtime cannot load it"),
        (needs_indices_below_5, "source.onnx: does not run on generated inputs"),
        (typed(TensorProto.BFLOAT16), "type tensor(bfloat16) is not supported"),
        (noise, "outside tolerance"),
    ],
    ids=["absent", "does not parse", "does not run", "unsupported type", "not repeatable"],
)
def test_a_model_that_cannot_be_served_ends_it_in_one_line_and_leaves_nothing(package, tmp_path, capfd, build, says):
    assert package(build(tmp_path / "source.onnx")) == 3
    err = capfd.readouterr().err
    assert err.startswith("model.package: ")
    assert says in err
    assert len(err.splitlines()) == 1
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("arguments", [("--name", "a b"), ("--version", ""), ("--tolerance", "-1")], ids=" ".join)
def test_a_name_version_or_tolerance_that_no_manifest_takes_leaves_nothing(package, tmp_path, capfd, arguments):
    assert package(onnx_models.mlp(tmp_path / "source.onnx"), *arguments) == 3
    assert arguments[0].strip("-") in capfd.readouterr().err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_output_that_exists_is_left_as_it_is(package, made, tmp_path, kind):
    made.parent.mkdir()
    if kind == "file":
        made.write_text("kept")
    else:
        made.mkdir()
    if kind == "folder":
        (made / "precious").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    assert package(tmp_path / "absent.onnx") not in (0, None)
    assert package(onnx_models.mlp(tmp_path / "source.onnx")) not in (0, None)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "source.onnx"])


class TextModel:
    """Packages a small classifier with its tokenizer; `files` is the folder both lie in."""

    def __init__(self, files: Path, package: Callable[..., object]) -> None:
        self.files = files
        self.model = onnx_models.classifier(files / "classifier.onnx")
        self.tokenizer = word_tokenizer(files / "tokenizer.json")
        self._package = package

    def __call__(self, *arguments: object, labels: str | None = "no,yes") -> object:
        named = ("--labels", labels) if labels else ()
        return self._package(self.model, "--tokenizer", self.tokenizer, *named, "--max-tokens", 256, *arguments)


@pytest.fixture
def text_model(package, tmp_path) -> TextModel:
    (tmp_path / "source").mkdir()
    return TextModel(tmp_path / "source", package)


def test_a_classifier_with_its_tokenizer_becomes_a_text_artifact(text_model, made):
    assert text_model() == 0
    model = load_model(made)
    found = model.artifact.manifest
    assert (found.task, found.labels, found.scores, found.max_tokens) == (
        "text-classification",
        ["no", "yes"],
        "logits",
        256,
    )
    assert set(found.files) == {"model.onnx", "tokenizer.json"}
    assert len(found.golden.examples) > 3


def test_logits_are_served_as_probabilities(text_model, made):
    text_model()
    model = load_model(made)
    assert isinstance(model.task, TextClassification)
    (row,) = model.run([model.task.encode(["good day"])[0].payload])
    table = next(
        onnx.numpy_helper.to_array(weights)
        for weights in onnx.load(text_model.model).graph.initializer
        if weights.name == "table"
    )
    powers = np.exp(table[[2, 4, 7, 3]].sum(axis=0))
    assert np.allclose(row, powers / powers.sum(), atol=1e-6)


def test_golden_texts_can_be_given(text_model, made, tmp_path):
    (tmp_path / "texts").write_text("good day\nbad é\n")
    assert text_model("--texts", tmp_path / "texts") == 0
    assert [example["text"] for example in manifest(made)["golden"]["examples"]][:2] == ["good day", "bad é"]


def test_a_blank_line_among_golden_texts_does_no_harm_or_is_named(text_model, tmp_path, capfd):
    (tmp_path / "texts").write_text("good day\n\nbad\n")
    code = text_model("--texts", tmp_path / "texts")
    err = capfd.readouterr().err
    assert code == 0 or (code == 3 and "texts" in err and len(err.splitlines()) == 1)


def test_the_window_given_is_the_one_recorded_and_used(text_model, made):
    assert text_model("--max-tokens", 5) == 0
    model = load_model(made)
    assert isinstance(model.task, TextClassification)
    (unit,) = model.task.encode(["good bad fine day good"])
    assert (unit.length, unit.truncated) == (5, True)


def test_labels_come_from_the_config_beside_the_tokenizer(text_model, made):
    (text_model.files / "config.json").write_text('{"id2label": {"1": "up", "0": "down"}}')
    assert text_model(labels=None) == 0
    assert manifest(made)["labels"] == ["down", "up"]


@pytest.mark.parametrize(
    "config",
    [None, "{}", "not JSON", "[]", '{"id2label": ["a", "b"]}', '{"id2label": {"a": "0", "b": "1"}}', "\ud800"],
    ids=["absent", "no labels", "not JSON", "a list", "labels in a list", "labels unnumbered", "not UTF-8"],
)
def test_without_labels_anywhere_it_asks_for_them_and_leaves_nothing(text_model, tmp_path, capfd, config):
    if config is not None:
        (text_model.files / "config.json").write_bytes(config.encode(errors="surrogatepass"))
    assert text_model(labels=None) == 3
    err = capfd.readouterr().err
    assert "--labels" in err
    assert len(err.splitlines()) == 1
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "labels", "says"),
    [
        ((), "a,b,c", "expected"),
        ((), "a", "expected"),
        ((), "a,a", "expected"),
        (("--max-tokens", "0"), "no,yes", "max"),
        (("--max-tokens", "-1"), "no,yes", "max"),
        (("--texts", "{files}/absent.txt"), "no,yes", "absent.txt"),
        (("--texts", "{files}/latin1.txt"), "no,yes", "latin1.txt"),
        (("--texts", "{files}/empty.txt"), "no,yes", "expected at least one"),
        (("--tokenizer", "{files}/absent.json"), "no,yes", "absent.json"),
        (("--tokenizer", "{files}/broken.json"), "no,yes", "tokenizer does not load"),
    ],
    ids=[
        "too many labels",
        "too few labels",
        "equal labels",
        "no window",
        "negative window",
        "texts absent",
        "texts not UTF-8",
        "no texts",
        "tokenizer absent",
        "tokenizer broken",
    ],
)
def test_what_does_not_fit_a_text_model_ends_it_in_one_line_and_leaves_nothing(
    text_model, tmp_path, capfd, arguments, labels, says
):
    written(text_model.files / "latin1.txt", b"caf\xe9\n")
    written(text_model.files / "empty.txt", b"")
    written(text_model.files / "broken.json", b"{}")
    code = text_model(*(argument.format(files=text_model.files) for argument in arguments), labels=labels)
    err = capfd.readouterr().err
    assert code == 3
    assert err.startswith("model.package: ")
    assert says in err
    assert len(err.splitlines()) == 1
    assert left_behind(tmp_path) == []


def test_a_model_whose_vocabulary_is_smaller_than_the_tokenizers_is_refused(text_model, tmp_path, capfd):
    onnx_models.classifier(text_model.model, tokens=3)
    assert text_model() == 3
    assert "does not run on tokenised text" in capfd.readouterr().err
    assert left_behind(tmp_path) == []


def test_a_tensor_model_given_a_tokenizer_is_refused(text_model, tmp_path, capfd):
    onnx_models.mlp(text_model.model)
    assert text_model(labels="a,b,c") == 3
    assert "expected input_ids" in capfd.readouterr().err
    assert left_behind(tmp_path) == []
