"""The fp16 file that is derived from the bundled int8 one: the same answers, in half precision, or nothing."""

import json
import shutil
import sys

import numpy as np
import onnx
import pytest

from app.artifact.manifest import MANIFEST
from app.runtime.loading import load_model
from app.runtime.session import Model
from app.runtime.tasks.text_classification import TextClassification
from model.training.export import main as export


@pytest.fixture(scope="module")
def derived(folder, tmp_path_factory) -> Model:
    """The fp16 artifact derived from the bundled one, by the command and through the gate."""
    out = tmp_path_factory.mktemp("derived") / "fp16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["model.training.export", "--artifact", str(folder), "--precision", "fp16", "--out", str(out)]
        )
        export()
    return load_model(out)


def answers(model: Model, texts: list[str], *, together: bool = False) -> np.ndarray:
    assert isinstance(model.task, TextClassification)
    payloads = [unit.payload for unit in model.task.encode(texts)]
    rows = model.run(payloads) if together else [model.run([payload])[0] for payload in payloads]
    return np.stack(rows)


OTHER_TEXTS = [
    "Fine.",
    "Great value, and it arrived a day early!",
    "I would not buy this again, not even at half the price 😡",
    "the manual is in three languages and none of them helps, which is a pity since the device itself looks solid",
    "What time does the library close on Sundays?",
    "word " * 200,
]


def test_the_derived_fp16_model_agrees_with_the_bundled_one_within_its_tolerance(bundled, derived):
    golden = bundled.artifact.manifest.golden
    texts = [example.text for example in golden.examples]
    assert len(texts) > 1
    assert np.abs(answers(derived, texts) - answers(bundled, texts)).max() <= golden.tolerance
    assert derived.golden_error <= golden.tolerance


def test_the_derived_fp16_model_is_held_to_the_bundled_ones_golden_outputs(bundled, derived):
    source, made = bundled.artifact, derived.artifact
    assert made.manifest.golden == source.manifest.golden
    assert made.manifest.reference_distribution == source.manifest.reference_distribution
    assert made.manifest.precision == "fp16"
    assert made.manifest.lineage["derived_from"] == source.digest
    assert (made.manifest.labels, made.manifest.max_tokens) == (source.manifest.labels, source.manifest.max_tokens)
    assert made.path("tokenizer.json").read_bytes() == source.path("tokenizer.json").read_bytes()


def test_the_derived_model_computes_in_half_precision_with_fused_operators(derived):
    model = onnx.load(derived.artifact.path("model.onnx"))
    floats = {
        t.data_type
        for t in model.graph.initializer
        if t.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    }
    assert floats == {onnx.TensorProto.FLOAT16}
    assert {"Attention", "SkipLayerNormalization", "BiasGelu"} <= {node.op_type for node in model.graph.node}


def test_a_precision_that_the_artifact_already_has_is_not_derived(folder, monkeypatch, tmp_path):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["x", "--artifact", str(folder), "--precision", "int8", "--out", str(out)])
    with pytest.raises(SystemExit, match="int8 already"):
        export()
    assert not out.exists()


def test_deriving_does_not_touch_a_folder_that_exists(folder, monkeypatch, tmp_path):
    (tmp_path / "kept").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["x", "--artifact", str(folder), "--precision", "fp16", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists"):
        export()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_deriving_from_an_artifact_that_disagrees_with_its_golden_outputs_leaves_nothing(folder, monkeypatch, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(folder, source)
    manifest = json.loads((source / MANIFEST).read_text())
    for example in manifest["golden"]["examples"]:
        example["probabilities"] = [1 - round(probability) for probability in example["probabilities"]]
    (source / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["x", "--artifact", str(source), "--precision", "fp16", "--out", str(out)])
    with pytest.raises(SystemExit, match="outside tolerance"):
        export()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bundled_answers_do_not_depend_on_neighbours_or_padding(bundled):
    texts = OTHER_TEXTS + [example.text for example in bundled.artifact.manifest.golden.examples]
    alone = answers(bundled, texts)
    assert np.abs(answers(bundled, texts, together=True) - alone).max() < 1e-3
    assert np.abs(answers(bundled, texts[:2], together=True) - alone[:2]).max() < 1e-3


def test_the_bundled_file_is_small_enough_to_commit(bundled):
    assert bundled.artifact.path("model.onnx").stat().st_size <= 25 * 10**6
