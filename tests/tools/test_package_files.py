"""`python -m model.package` for tensors and images, and what it says of files that cannot be served."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from app.artifact.manifest import MANIFEST
from app.runtime.loading import load_model
from model.package.command import argument_parser
from tests import onnx_models
from tests.onnx_models import save, tensor
from tests.process import ROOT
from tests.tools.packaging import Command, folder


@pytest.fixture
def command(monkeypatch, capfd, tmp_path) -> Command:
    return Command(monkeypatch, capfd, tmp_path)


def linear_classifier(
    path: Path, *, zipmap: bool, declared: object = "rows", names: tuple[str, ...] = ("no", "yes")
) -> Path:
    """features [rows, 4] → label and probabilities, as converters of scikit-learn write it; declared: the first size
    that the file says label has."""
    ml = {"domain": "ai.onnx.ml"}
    nodes = [
        helper.make_node(
            "LinearClassifier", ["features"], ["label", "raw"], coefficients=[0.5, -1, 2, 0.1, -0.5, 1, -2, -0.1],
            intercepts=[0.1, -0.1], classlabels_strings=names, post_transform="SOFTMAX", multi_class=0, **ml
        ),
        helper.make_node("ZipMap", ["raw"], ["probabilities"], classlabels_strings=names, **ml)
        if zipmap
        else helper.make_node("Identity", ["raw"], ["probabilities"]),
    ]  # fmt: skip
    outputs = [tensor("label", [declared], TensorProto.STRING), tensor("probabilities", ["rows", 2])]
    if zipmap:
        value = helper.make_sequence_type_proto(
            helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        )
        outputs[1] = helper.make_value_info("probabilities", value)
    graph = helper.make_graph(nodes, "table", [tensor("features", ["rows", 4])], outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_a_list_of_dictionaries_becomes_a_tensor_of_probabilities(command, tmp_path):
    found = command.manifest(linear_classifier(tmp_path / "with.onnx", zipmap=True))
    assert "ZipMap" in command.out
    assert [(spec["name"], spec["shape"]) for spec in found["outputs"]] == [("label", [-1]), ("probabilities", [-1, 2])]
    assert found["batching"] is True
    with np.load(command.made / "golden.npz") as taken_out:
        arrays = dict(taken_out)
    command.made.rename(tmp_path / "with")
    command.manifest(linear_classifier(tmp_path / "without.onnx", zipmap=False))
    with np.load(command.made / "golden.npz") as plain:
        assert all(np.array_equal(arrays[name], plain[name]) for name in plain.files)


def test_without_onnx_the_error_says_how_to_convert_it_otherwise(command, tmp_path, monkeypatch):
    model = linear_classifier(tmp_path / "source.onnx", zipmap=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    error = command.refused(model)
    assert "'zipmap': False" in error
    assert "pip install onnx" in error


def test_an_output_that_has_more_rows_than_its_file_declares_is_batched(command, tmp_path):
    found = command.manifest(linear_classifier(tmp_path / "source.onnx", zipmap=False, declared=1))
    assert found["batching"] is True
    assert found["outputs"][0]["shape"] == [-1]


def test_answers_to_given_rows_are_recorded_for_comparison(command, tmp_path):
    np.savez(tmp_path / "rows.npz", features=np.eye(4, dtype=np.float32))
    model = linear_classifier(tmp_path / "source.onnx", zipmap=False)
    record = command.manifest(model, "--inputs", tmp_path / "rows.npz")["evaluation"]["reference"]
    assert (record["inputs"], record["rows"]) == ("given", 4)
    assert record["outputs"]["label"]["counts"] == {"no": 3, "yes": 1}
    assert len(record["outputs"]["probabilities"]["deciles"]) == 11


def stamped(path: Path, *, opset: int = 17, ir: int = 8) -> Path:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [tensor("x", ["n"])], [tensor("y", ["n"])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), path)
    return path


def without_inputs(path: Path) -> Path:
    return save(path, [helper.make_node("Identity", ["c"], ["y"])], [], [tensor("y", [2])], c=np.zeros(2, np.float32))


def without_elements(path: Path) -> Path:
    node = helper.make_node("Concat", ["x", "past"], ["y"], axis=1)
    return save(path, [node], [tensor("x", ["rows", 2]), tensor("past", ["rows", 0])], [tensor("y", ["rows", 2])])


def foreign_operator(path: Path) -> Path:
    node = helper.make_node("Mine", ["x"], ["y"], domain="com.example")
    graph = helper.make_graph([node], "g", [tensor("x", ["n"])], [tensor("y", ["n"])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def weights_lost(path: Path) -> Path:
    model = onnx.load(onnx_models.mlp(path))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.with_name("weights.bin").unlink()
    return path


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda path: stamped(path, opset=99), ["opset_version=17", "newer onnxruntime"]),
        (lambda path: stamped(path, ir=99), ["ir_version", "newer onnxruntime"]),
        (without_inputs, ["no inputs"]),
        (without_elements, ["'past'", "no elements"]),
        (foreign_operator, ["another library"]),
        (weights_lost, ["'weights.bin'", "beside the file"]),
        (lambda path: path, ["File doesn't exist\n"]),
    ],
    ids=["opset too new", "IR too new", "no inputs", "no elements", "operator unknown", "weights lost", "absent"],
)
def test_a_file_that_cannot_be_served_is_an_error_that_says_what_to_change(command, tmp_path, build, says):
    error = command.refused(build(tmp_path / "source.onnx"))
    assert "source.onnx" in error
    assert all(part in error for part in says)


def test_weights_under_any_name_come_along(command, tmp_path):
    model = onnx.load(onnx_models.mlp(tmp_path / "plain.onnx"))
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="anything.bin", size_threshold=0)
    assert "anything.bin" in command.manifest(tmp_path / "net.onnx")["files"]


@pytest.mark.parametrize(
    ("option", "value"), [("--name", "a b"), ("--name", ".x"), ("--version", "1/2"), ("--version", "")]
)
def test_a_name_that_is_not_allowed_is_explained_in_words(command, tmp_path, option, value):
    error = command.refused(onnx_models.mlp(tmp_path / "source.onnx"), option, value)
    assert option in error
    assert "letters" in error
    assert "[A-Z" not in error


def test_a_folder_given_as_a_file_is_an_error_that_says_which_option_takes_it(command, tmp_path):
    source = folder(tmp_path / "source")
    assert f"--from-huggingface {source}" in command.refused(source)


def test_help_has_an_example(command):
    assert command("--help") == 0
    assert "python -m model.package churn.onnx --name churn --version 1" in command.out


@pytest.mark.parametrize("document", ["README.md", "model/README.md"])
def test_every_documented_command_is_understood(document):
    lines = re.findall(r"python -m model\.package +(\S[^`\n|#]*)", (ROOT / document).read_text())
    assert lines
    for line in lines:
        named = [] if "--name" in line or "--help" in line else ["--name", "n", "--version", "1"]
        if "--help" not in line:
            argument_parser().parse_args([*shlex.split(line), *named])


def test_nothing_given_is_an_error_that_says_what_to_give(command):
    assert "--from-huggingface" in command.refused()


def test_what_it_found_is_printed(command, tmp_path):
    command.manifest(onnx_models.mlp(tmp_path / "source.onnx"))
    for part in (
        "tensors",
        "features FP32 [-1, 4]",
        "scores FP32 [-1, 3]",
        "requests share runs",
        "median",
        "curl -s",
        '"shape": [1, 4]',
    ):
        assert part in command.out


SIZES = {"size": {"height": 8, "width": 10}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
CROPPED = {**SIZES, "size": {"shortest_edge": 16}, "crop_size": {"height": 8, "width": 10}, "do_center_crop": True}


def image_folder(path: Path, preprocessor: dict, *, labels: int = 5, **config: object) -> Path:
    path.mkdir()
    onnx_models.image(path / "model.onnx")
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    fields = {
        "architectures": ["ResNetForImageClassification"],
        "id2label": {str(index): f"kind {index}" for index in range(labels)},
        "problem_type": "single_label_classification",
        **config,
    }
    (path / "config.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("preprocessor", "expected"),
    [
        (SIZES, {"height": 8, "width": 10, "shorter_side": None, "resample": "bilinear", "mean": [0.5, 0.4, 0.3]}),
        (CROPPED, {"height": 8, "width": 10, "shorter_side": 16}),
        ({**SIZES, "size": 9, "resample": 3}, {"height": 9, "width": 9, "resample": "bicubic"}),
        ({**SIZES, "do_normalize": False}, {"mean": [0, 0, 0], "std": [1, 1, 1]}),
        ({**SIZES, "do_rescale": False}, {"rescale": 1}),
        (
            {
                **SIZES,
                "size": {"shortest_edge": 28},
                "crop_pct": 0.875,
                "image_processor_type": "ConvNextImageProcessor",
            },
            {"height": 28, "width": 28, "shorter_side": 32},
        ),
    ],
    ids=["sizes", "cropped", "one number", "not normalized", "not rescaled", "cropped by a part"],
)
def test_an_image_classifier_is_fed_as_its_preprocessor_says(command, tmp_path, preprocessor, expected):
    found = command.manifest(image_folder(tmp_path / "source", preprocessor) / "model.onnx")
    assert found["task"] == "image-classification"
    image = {"resample": "bilinear", "mean": [0, 0, 0], "std": [1, 1, 1], "shorter_side": None, "rescale": 1 / 255}
    assert expected.items() <= {**image, **found["image"]}.items()


def test_golden_images_can_be_given(command, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 30), (200, 100, 0)).save(tmp_path / "images" / "one.png")
    found = command.manifest(image_folder(tmp_path / "source", SIZES) / "model.onnx", "--images", tmp_path / "images")
    assert found["evaluation"]["reference"]["inputs"] == "given"
    model = load_model(command.made)
    assert len(model.task.golden()) == 1


@pytest.mark.parametrize(
    ("preprocessor", "says"),
    [
        ({}, "size"),
        ({**SIZES, "do_pad": True}, "do_pad"),
        ({**CROPPED, "size": {"height": 16, "width": 16}}, "shortest_edge"),
        ({**CROPPED, "size": 16, "feature_extractor_type": "DeiTFeatureExtractor"}, "shortest_edge"),
        ({**CROPPED, "image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor"),
        ({**SIZES, "do_resize": False}, "do_resize"),
        ({**SIZES, "size": {"shortest_edge": 8}}, "do_center_crop"),
        ({**SIZES, "image_mean": [0.5]}, "preprocessor_config.json"),
        ({**SIZES, "resample": 9}, "preprocessor_config.json"),
    ],
)
def test_a_preprocessor_that_asks_for_more_is_an_error(command, tmp_path, preprocessor, says):
    assert says in command.refused(image_folder(tmp_path / "source", preprocessor) / "model.onnx")


def test_labels_that_do_not_fit_an_image_classifier_are_an_error(command, tmp_path):
    assert "expected 5" in command.refused(image_folder(tmp_path / "source", SIZES, labels=4) / "model.onnx")


def test_a_killed_or_failed_run_leaves_no_manifest_at_the_output(command, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model.package.artifact.load_model", killed)
    with pytest.raises(KeyboardInterrupt):
        command(onnx_models.mlp(tmp_path / "source.onnx"))
    assert not (command.made / MANIFEST).exists()
    assert not list(command.made.parent.iterdir())


def test_text_in_a_folder_of_hugging_faces_needs_no_option(command, tmp_path):
    source = folder(tmp_path / "source", config={"problem_type": "multi_label_classification"})
    assert command(source / "model.onnx") == 0
    for part in ("BertForSequenceClassification", "multi_label", "through the sigmoid", "16 tokens", "/predict"):
        assert part in command.out
