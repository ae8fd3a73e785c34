"""`python -m model.package` for tasks with text: what the files beside a model and its outputs decide, and what they
leave open, which is an error and never a guess."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from app.runtime.loading import load_model
from model.package.texts import GOLDEN_TEXTS
from tests.onnx_models import OPSETS
from tests.tools.packaging import Command, folder, text_model

REGRESSION = {"problem_type": "regression"}
MULTI = {"problem_type": "multi_label_classification"}
SINGLE = {"problem_type": "single_label_classification"}
TEXTS = ["good day", "bad", "fine fine bad day"]


@pytest.fixture
def command(monkeypatch, capfd, tmp_path) -> Command:
    return Command(monkeypatch, capfd, tmp_path)


@pytest.fixture
def source(tmp_path) -> Path:
    return tmp_path / "source"


def answers(made: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """What the packaged model answers, by the serving path."""
    model = load_model(made)
    units = model.task.encode(texts)
    return model.task.respond(units, [model.run([unit.payload])[0] for unit in units])


def linear(path: Path, texts: list[str]) -> np.ndarray:
    """What the graph at `path` has before its last operator, of texts of a word tokenizer."""
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

    proto = onnx.load(path)
    proto.graph.output.append(helper.make_empty_tensor_value_info("linear"))
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = [np.array([Tokenizer.from_file(str(path.with_name("tokenizer.json"))).encode(text).ids]) for text in texts]
    return np.concatenate(
        [session.run(["linear"], {"input_ids": ids, "attention_mask": ids * 0 + 1})[0] for ids in rows]
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits)
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("config", "ends_in", "problem_type", "scores", "expected"),
    [
        (MULTI, "", "multi_label", "sigmoid", sigmoid),
        (SINGLE, "", "single_label", "logits", softmax),
        (MULTI, "Sigmoid", "multi_label", "probabilities", sigmoid),
        ({}, "Sigmoid", "multi_label", "probabilities", sigmoid),
        (SINGLE, "Softmax", "single_label", "probabilities", softmax),
        ({}, "Softmax", "single_label", "probabilities", softmax),
    ],
)
def test_config_and_outputs_say_which_labels_may_hold_together(
    command, source, config, ends_in, problem_type, scores, expected
):
    model = folder(source, config=config, ends_in=ends_in) / "model.onnx"
    found = command.manifest(model)
    assert (found["task"], found["problem_type"], found["scores"]) == ("text-classification", problem_type, scores)
    assert np.allclose(answers(command.made, TEXTS)["probabilities"], expected(linear(model, TEXTS)), atol=1e-5)


def test_if_neither_decides_it_the_error_names_both_options(command, source):
    error = command.refused(folder(source) / "model.onnx")
    assert "--problem-type single_label" in error
    assert "--problem-type multi_label" in error
    assert "--scores sigmoid" in error


@pytest.mark.parametrize(
    ("option", "problem_type", "scores"),
    [
        (("--problem-type", "single_label"), "single_label", "logits"),
        (("--problem-type", "multi_label"), "multi_label", "sigmoid"),
        (("--scores", "logits"), "single_label", "logits"),
        (("--scores", "sigmoid"), "multi_label", "sigmoid"),
    ],
)
def test_either_option_decides_it(command, source, option, problem_type, scores):
    found = command.manifest(folder(source) / "model.onnx", *option)
    assert (found["problem_type"], found["scores"]) == (problem_type, scores)


def test_of_two_labels_one_holds(command, source):
    found = command.manifest(folder(source, 2) / "model.onnx")
    assert (found["problem_type"], found["scores"]) == ("single_label", "logits")
    assert "if both labels may hold: --problem-type multi_label" in command.out


@pytest.mark.parametrize(
    ("config", "ends_in", "options", "says"),
    [
        (MULTI, "Softmax", (), "--problem-type single_label"),
        (SINGLE, "Sigmoid", (), "--problem-type multi_label"),
        (MULTI, "Sigmoid", ("--scores", "sigmoid"), "--scores probabilities"),
        (SINGLE, "Softmax", ("--scores", "logits"), "probabilities"),
        (SINGLE, "", ("--scores", "probabilities"), "logits"),
        (MULTI, "HardSigmoid", (), "--scores"),
    ],
)
def test_outputs_that_say_otherwise_are_an_error(command, source, config, ends_in, options, says):
    assert says in command.refused(folder(source, config=config, ends_in=ends_in) / "model.onnx", *options)


def test_the_threshold_given_is_the_one_recorded(command, source):
    found = command.manifest(folder(source, config=MULTI) / "model.onnx", "--threshold", "0.7")
    assert found["threshold"] == 0.7


ONE = {"labels": ["score"], "columns": 1}
OLD_MARK = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
MARK = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "4.1.0"}}


@pytest.mark.parametrize(
    ("config", "model", "task", "fields"),
    [
        (REGRESSION, {"columns": 1}, "text-regression", {"labels": []}),
        (REGRESSION, {"columns": 2, "labels": ["ease", "tone"]}, "text-regression", {"labels": ["ease", "tone"]}),
        (REGRESSION, {"columns": 1, "rank": 1}, "text-regression", {"labels": []}),
        (OLD_MARK, ONE, "text-pair", {"scores": "logits"}),
        (MARK, ONE, "text-pair", {"scores": "sigmoid"}),
        (MARK, {**ONE, "ends_in": "Sigmoid"}, "text-pair", {"scores": "sigmoid"}),
        (
            {"architectures": ["RobertaForTokenClassification"]},
            {"columns": 3, "per_token": True, "labels": ["O", "B-PER", "I-PER"]},
            "token-classification",
            {"scores": "logits", "labels": ["O", "B-PER", "I-PER"]},
        ),
    ],
)
def test_config_says_the_task(command, source, config, model, task, fields):
    if model.get("ends_in") == "Sigmoid":
        # Its own activation is in the file already.
        config, fields = {"sentence_transformers": {}}, {"scores": "probabilities"}
    found = command.manifest(folder(source, config=config, **model) / "model.onnx")
    assert found["task"] == task
    assert fields.items() <= found.items()


def test_a_cross_encoder_says_so_in_a_file_of_its_own_library_too(command, source):
    folder(source, 1)
    said = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    (source / "config_sentence_transformers.json").write_text(json.dumps(said))
    (source / "modules.json").write_text('[{"type": "sentence_transformers.base.modules.transformer.Transformer"}]')
    found = command.manifest(source / "model.onnx")
    assert (found["task"], found["scores"]) == ("text-pair", "logits")


@pytest.mark.parametrize(
    ("config", "labels", "says"),
    [
        ({}, ["score"], ["--task", "text-pair", "text-regression"]),
        ({}, ["entailment", "neutral", "contradiction"], ["pairs", "--task"]),
        (MARK, ["no", "maybe", "yes"], ["pairs", "--task"]),
        ({"architectures": ["BertForQuestionAnswering"]}, ["a", "b"], ["BertForQuestionAnswering", "--task tensors"]),
    ],
    ids=["one label", "inference", "several scores of a pair", "no task"],
)
def test_a_config_that_may_mean_several_tasks_is_an_error(command, source, config, labels, says):
    error = command.refused(folder(source, len(labels), labels=labels, config=config) / "model.onnx")
    assert all(part in error for part in says)


def test_the_task_given_wins_over_config(command, source):
    found = command.manifest(folder(source, 1) / "model.onnx", "--task", "text-pair")
    assert (found["task"], found["scores"]) == ("text-pair", "sigmoid")
    assert {"text_pair", "outputs"} <= set(found["golden"]["examples"][0])


def test_pairs_can_be_given(command, source, tmp_path):
    (tmp_path / "pairs").write_text("good day\tbad day\n")
    found = command.manifest(folder(source, 1) / "model.onnx", "--task", "text-pair", "--texts", tmp_path / "pairs")
    assert found["golden"]["examples"][0]["text_pair"] == "bad day"
    (tmp_path / "pairs").write_text("good day\n")
    command.made.rename(tmp_path / "elsewhere")
    assert "a tab" in command.refused(source / "model.onnx", "--task", "text-pair", "--texts", tmp_path / "pairs")


def embedder(source: Path, *, pooling: dict | None = None, normalize: bool = True, more: tuple[str, ...] = ()) -> Path:
    """A model of vectors for each token, and what sentence-transformers puts beside it."""
    folder(source, 4, config={"architectures": ["BertModel"], "id2label": None}, per_token=True)
    kinds = ["Transformer", "Pooling", *more, *(["Normalize"] if normalize else [])]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]
    if pooling is not None:
        (source / "modules.json").write_text(json.dumps(modules))
        (source / "1_Pooling").mkdir()
        (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return source / "model.onnx"


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 4}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "cls", "embedding_dimension": 4}, "cls"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_an_embedder_is_pooled_and_normalized_as_its_modules_say(command, source, pooling, found, normalize):
    model = embedder(source, pooling=pooling, normalize=normalize)
    manifest = command.manifest(model)
    assert (manifest["task"], manifest["pooling"], manifest["normalize"]) == ("text-embedding", found, normalize)
    tokens = linear(model, ["good day"])[0]
    expected = tokens.mean(axis=0) if found == "mean" else tokens[0]
    expected = expected / np.linalg.norm(expected) if normalize else expected
    assert np.allclose(answers(command.made, ["good day"])["embedding"][0], expected, atol=1e-5)


def test_how_to_pool_and_normalize_can_be_given(command, source):
    found = command.manifest(embedder(source), "--pooling", "cls", "--normalize")
    assert (found["pooling"], found["normalize"]) == ("cls", True)


def test_vectors_of_tokens_that_nothing_says_how_to_pool_are_an_error(command, source):
    error = command.refused(embedder(source))
    assert "--pooling mean" in error
    assert "--pooling cls" in error


@pytest.mark.parametrize(
    ("pooling", "more", "says"),
    [
        ({"pooling_mode_max_tokens": True}, (), "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, (), "mean_tokens"),
        ({"pooling_mode_mean_tokens": True}, ("Dense",), "Dense"),
    ],
)
def test_what_the_server_does_not_do_to_vectors_is_an_error(command, source, pooling, more, says):
    assert says in command.refused(embedder(source, pooling=pooling, more=more))


def test_a_whole_texts_vector_is_taken_before_those_of_its_tokens(command, source):
    embedder(source)
    proto = onnx.load(text_model(source / "model.onnx", 4))
    summed = helper.make_tensor_value_info("sentence_embedding", onnx.TensorProto.FLOAT, ["rows", 4])
    tokens = helper.make_tensor_value_info("tokens", onnx.TensorProto.FLOAT, ["rows", "tokens", 4])
    nodes = [*proto.graph.node, helper.make_node("Identity", ["linear"], ["sentence_embedding"])]
    graph = helper.make_graph(nodes, "both", proto.graph.input, [tokens, summed], proto.graph.initializer)
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, ir_version=8), source / "model.onnx")
    found = command.manifest(source / "model.onnx")
    assert (found["outputs"][0]["name"], found["pooling"]) == ("sentence_embedding", "none")


WINDOWS = {
    "positions": ({"max_position_embeddings": 32}, {}, None, 32),
    "positions with one for padding": (
        {"max_position_embeddings": 34, "model_type": "roberta", "pad_token_id": 1}, {}, None, 32
    ),
    "positions of another name": ({"max_position_embeddings": None, "n_positions": 20}, {}, None, 20),
    "the tokenizer's": ({}, {"model_max_length": 12}, None, 12),
    "the smallest": ({"max_position_embeddings": 32}, {"model_max_length": 20}, 15, 15),
    "what the tokenizer cuts at": ({"max_position_embeddings": None}, {}, 15, 15),
    "no number of tokens": ({}, {"model_max_length": 1000000000000000019884624838656}, None, 16),
}  # fmt: skip


@pytest.mark.parametrize(("config", "tokenizer", "cut", "window"), WINDOWS.values(), ids=list(WINDOWS))
def test_the_window_is_the_smallest_that_is_known_and_is_printed(command, source, config, tokenizer, cut, window):
    folder(source, config={**MULTI, **config})
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if cut:
        table = json.loads((source / "tokenizer.json").read_text())
        table["truncation"] = {"max_length": cut, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        (source / "tokenizer.json").write_text(json.dumps(table))
    assert command.manifest(source / "model.onnx")["max_tokens"] == window
    assert f"{window} tokens" in command.out


def test_sentence_transformers_own_window_replaces_the_tokenizers(command, source):
    folder(source, config=MULTI)
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 14, "do_lower_case": false}')
    table = json.loads((source / "tokenizer.json").read_text())
    table["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (source / "tokenizer.json").write_text(json.dumps(table))
    assert command.manifest(source / "model.onnx")["max_tokens"] == 14


def test_a_window_that_nothing_says_is_asked_for(command, source):
    folder(source, config={**MULTI, "max_position_embeddings": None})
    assert "--max-tokens" in command.refused(source / "model.onnx")


def test_a_window_longer_than_the_model_takes_is_an_error_with_the_longest(command, source):
    folder(source, config={**MULTI, "max_position_embeddings": 32}, positions=30)
    error = command.refused(source / "model.onnx")
    assert "expected at most 30" in error
    assert "--max-tokens" in error


def test_sizes_that_may_not_vary_are_an_error_that_says_how_to_export(command, source):
    folder(source, config=MULTI)
    proto = onnx.load(source / "model.onnx")
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value, value.type.tensor_type.shape.dim[1].dim_value = 1, 8
    onnx.save(proto, source / "model.onnx")
    error = command.refused(source / "model.onnx")
    assert "dynamic" in error
    assert "--task tensors" in error


def test_golden_texts_are_also_long_nearly_empty_foreign_and_of_each_label(command, source, tmp_path):
    folder(source, config=SINGLE)
    (tmp_path / "texts").write_text("good day\n" * 40)
    found = command.manifest(source / "model.onnx", "--texts", tmp_path / "texts")
    texts = [example["text"] for example in found["golden"]["examples"]]
    assert len(texts) <= 32
    assert any(len(text.split()) > 16 for text in texts)
    assert any(len(text) <= 3 for text in texts)
    assert not all(text.isascii() for text in texts)
    said = {int(np.argmax(example["probabilities"])) for example in found["golden"]["examples"]}
    assert said == {0, 1, 2}


def test_of_many_texts_the_only_one_of_its_label_is_golden(command, source, tmp_path):
    folder(source, config=SINGLE)
    (tmp_path / "texts").write_text("good day\n" * 40)
    command.manifest(source / "model.onnx", "--texts", tmp_path / "texts")
    (common,) = set(answers(command.made, ["good day"])["label"])
    others = ["bad", "fine", "day", "bad bad", "fine fine", "day day", "good"]
    other = next(text for text in others if set(answers(command.made, [text])["label"]) != {common})
    command.made.rename(tmp_path / "elsewhere")
    (tmp_path / "texts").write_text("good day\n" * 40 + f"{other}\n")
    found = command.manifest(source / "model.onnx", "--texts", tmp_path / "texts")
    assert other in [example["text"] for example in found["golden"]["examples"]]


def test_the_answers_to_the_texts_are_recorded_for_comparison(command, source, tmp_path):
    folder(source, config=SINGLE)
    (tmp_path / "texts").write_text("good day\nbad day\nfine\ngood\n")
    record = command.manifest(source / "model.onnx", "--texts", tmp_path / "texts")["evaluation"]["reference"]
    assert (record["inputs"], record["rows"]) == ("given", 4)
    assert sum(record["outputs"]["label"]["counts"].values()) == 4
    deciles = record["outputs"]["score"]["deciles"]
    assert len(deciles) == 11
    assert deciles == sorted(deciles)


def test_what_the_original_library_puts_before_texts_is_said(command, source):
    model = embedder(source, pooling={"pooling_mode": "mean"})
    said = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (source / "config_sentence_transformers.json").write_text(json.dumps(said))
    command.manifest(model)
    assert "puts 'query: ' before each text" in command.out


def test_built_in_texts_are_said_to_be_that(command, source):
    record = command.manifest(folder(source, config=MULTI) / "model.onnx")["evaluation"]["reference"]
    assert record["inputs"] == "built-in"
    assert len(GOLDEN_TEXTS) >= 6


def test_a_tokenizer_that_is_not_there_is_asked_for(command, source):
    folder(source, config=MULTI)
    (source / "tokenizer.json").unlink()
    error = command.refused(source / "model.onnx")
    assert "--tokenizer" in error
    assert "BertForSequenceClassification" in error


def test_the_bare_inputs_and_outputs_can_be_served_all_the_same(command, source):
    assert command.manifest(folder(source) / "model.onnx", "--task", "tensors")["task"] == "tensors"


def test_a_config_elsewhere_can_be_named(command, source, tmp_path):
    folder(source, config=MULTI)
    (source / "config.json").rename(tmp_path / "said.json")
    found = command.manifest(
        source / "model.onnx", "--config", tmp_path / "said.json", "--tokenizer", source / "tokenizer.json"
    )
    assert found["problem_type"] == "multi_label"


def test_a_config_that_is_named_and_none_is_an_error(command, source):
    folder(source)
    assert "config.json" in command.refused(
        source / "model.onnx", "--config", source / "tokenizer.json" / "config.json"
    )


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx", "onnx/other.onnx"])
def test_a_folder_of_hugging_faces_is_enough(command, source, place):
    folder(source, config=MULTI)
    (source / "onnx").mkdir()
    (source / "model.onnx").rename(source / place)
    assert command.manifest("--from-huggingface", source)["problem_type"] == "multi_label"


def test_a_model_in_its_folder_for_onnx_finds_what_is_above(command, source):
    folder(source, config=MULTI)
    (source / "onnx").mkdir()
    (source / "model.onnx").rename(source / "onnx" / "model_fp16.onnx")
    assert command.manifest(source / "onnx" / "model_fp16.onnx")["problem_type"] == "multi_label"


def test_a_folder_with_several_onnx_files_is_an_error_that_names_them(command, source):
    folder(source, config=MULTI)
    (source / "model.onnx").rename(source / "a.onnx")
    (source / "b.onnx").write_bytes((source / "a.onnx").read_bytes())
    error = command.refused("--from-huggingface", source)
    assert "a.onnx, b.onnx" in error


def test_weights_without_what_exports_them_are_an_error_that_says_what_to_install(command, source, monkeypatch):
    folder(source, config=MULTI)
    (source / "model.onnx").rename(source / "model.safetensors")
    monkeypatch.setattr("model.package.export._installed", lambda module: False)
    assert "pip install 'optimum[onnx]'" in command.refused("--from-huggingface", source)


def test_a_folder_without_a_model_is_an_error(command, source):
    folder(source, config=MULTI)
    (source / "model.onnx").unlink()
    assert "found neither" in command.refused("--from-huggingface", source)


@pytest.mark.parametrize(
    "option",
    [("--pooling", "mean"), ("--inputs", "rows.npz"), ("--images", "."), ("--size", 3)],
    ids=lambda option: option[0],
)
def test_an_option_that_would_be_left_out_is_an_error(command, source, option):
    error = command.refused(folder(source, config=MULTI) / "model.onnx", "--task", "text-classification", *option)
    assert option[0] in error


def test_a_model_whose_rows_depend_on_each_other_shares_no_runs(command, source):
    folder(source, config=MULTI)
    proto = onnx.load(source / "model.onnx")
    for node in proto.graph.node:
        node.input[:] = ["scaled" if name == "summed" else name for name in node.input]
    # As dynamic quantisation does, by the largest number of a whole run.
    proto.graph.node.insert(
        len(proto.graph.node) - 2, helper.make_node("ReduceMax", ["summed"], ["largest"], keepdims=0)
    )
    proto.graph.node.insert(len(proto.graph.node) - 2, helper.make_node("Div", ["summed", "largest"], ["scaled"]))
    onnx.save(proto, source / "model.onnx")
    assert command.manifest(source / "model.onnx")["batching"] is False
    assert "a run of its own" in command.out
