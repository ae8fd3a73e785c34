"""Text and tensors: rows in, one run's tensors, rows out again."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.artifact.manifest import Artifact, FileEntry, Golden, GoldenText, Manifest, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.tasks.task import ENCODED_TOGETHER, TensorTask, TextTask

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "day")
GOOD, BAD, FINE, DAY = 4, 5, 6, 7
CLS, SEP = 2, 3


def word_tokenizer(path: Path, *, padding: bool = False) -> Path:
    """A tokenizer.json of a few whole words between [CLS] and [SEP]; `padding` as some exporters leave it on."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    if padding:
        tokenizer.enable_padding(pad_id=FINE, pad_token="fine", length=32)
        tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


def artifact(folder: Path, inputs: list[TensorSpec], outputs: list[TensorSpec], **changes: object) -> Artifact:
    """An artifact of these inputs and outputs, text if `changes` say so; its files need not exist."""
    files = {name: FileEntry("0" * 64, 1) for name in ("model.onnx", "tokenizer.json", "golden.npz")}
    fields: dict = {
        "manifest_version": 1,
        "name": "test",
        "version": "1",
        "task": "tensors",
        "precision": "fp32",
        "model_file": "model.onnx",
        "files": files,
        "inputs": inputs,
        "outputs": outputs,
        "golden": Golden(0.1, file="golden.npz"),
    }
    return Artifact(folder, Manifest(**(fields | changes)), "0" * 64)


def text_task(
    folder: Path,
    *,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
    datatype: str = "INT64",
    max_tokens: int = 6,
    scores: str = "probabilities",
    padding: bool = False,
) -> TextTask:
    word_tokenizer(folder / "tokenizer.json", padding=padding)
    return TextTask(
        artifact(
            folder,
            [TensorSpec(name, datatype, [-1, -1]) for name in inputs],
            [TensorSpec("scores", "FP32", [-1, 2])],
            task="text-classification",
            golden=Golden(0.1, [GoldenText("good", [0.5, 0.5])]),
            tokenizer_file="tokenizer.json",
            labels=["no", "yes"],
            max_tokens=max_tokens,
            scores=scores,
        )
    )


def tensor_task(folder: Path, *, batching: bool = True, max_rows: int = 4) -> TensorTask:
    inputs = [TensorSpec("a", "FP32", [-1, 2]), TensorSpec("b", "INT64", [-1, -1])]
    return TensorTask(artifact(folder, inputs, [TensorSpec("y", "FP32", [-1])], batching=batching), max_rows)


def ab(rows: int, width: int = 3) -> dict[str, np.ndarray]:
    """Inputs of `tensor_task` whose values differ in every row."""
    return {
        "a": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2),
        "b": np.arange(rows * width, dtype=np.int64).reshape(rows, width),
    }


def test_a_text_becomes_its_token_ids_and_their_count(tmp_path):
    (unit,) = text_task(tmp_path).encode(["Good day"])
    assert (unit.payload, unit.length, unit.rows, unit.truncated) == ([CLS, GOOD, DAY, SEP], 4, 1, False)


def test_texts_are_encoded_in_order_and_as_each_would_be_alone(tmp_path):
    task = text_task(tmp_path)
    texts = ["good", "bad day", "fine fine fine fine fine fine", "unheard of", "bad"]
    alone = [task.encode([text])[0] for text in texts]
    assert task.encode(texts) == alone


@pytest.mark.parametrize("texts", [1, 3])
def test_a_text_longer_than_the_window_is_cut_and_says_so(tmp_path, texts):
    units = text_task(tmp_path, max_tokens=4).encode(["good bad fine"] * texts)
    assert [(unit.payload, unit.truncated) for unit in units] == [([CLS, GOOD, BAD, SEP], True)] * texts


@pytest.mark.parametrize("texts", [1, 3])
def test_a_text_that_just_fits_the_window_is_not_called_truncated(tmp_path, texts):
    units = text_task(tmp_path, max_tokens=4).encode(["good bad"] * texts)
    assert [(unit.payload, unit.truncated) for unit in units] == [([CLS, GOOD, BAD, SEP], False)] * texts


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize(
    "long", ["good " * 9_999, "bad" + " " * 9_999 + "good fine day bad", " " * 9_999 + "x" * 9_999]
)
def test_only_the_start_of_a_long_text_is_encoded_where_that_is_enough(tmp_path, long, texts):
    task = text_task(tmp_path, max_tokens=4)
    whole = task.tokenizer.encode(long)
    units = task.encode([long] * texts)
    assert [(unit.payload, unit.truncated) for unit in units] == [(whole.ids, bool(whole.overflowing))] * texts


def test_texts_of_a_large_batch_keep_their_order(tmp_path):
    texts = [
        " ".join(WORDS[4 + index // 4**place % 4] for place in range(4)) for index in range(ENCODED_TOGETHER * 3 + 1)
    ]
    units = text_task(tmp_path).encode(texts)
    assert [" ".join(WORDS[token] for token in unit.payload[1:-1]) for unit in units] == texts


@pytest.mark.parametrize("texts", [1, 2])
def test_padding_and_truncation_left_on_in_the_tokenizer_file_are_not_used(tmp_path, texts):
    units = text_task(tmp_path, max_tokens=6, padding=True).encode(["good bad fine day"] * texts)
    assert [(unit.payload, unit.truncated) for unit in units] == [([CLS, GOOD, BAD, FINE, DAY, SEP], False)] * texts


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u2003"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_blank_text_is_invalid_and_its_place_is_named(tmp_path, blank, before):
    with pytest.raises(Invalid, match=rf"^text {before}: "):
        text_task(tmp_path).encode(["good"] * before + [blank])


@pytest.mark.parametrize("texts", [["\ud800"], ["good", "bad \udfff"]])
def test_a_lone_surrogate_is_invalid(tmp_path, texts):
    with pytest.raises(Invalid, match="surrogate"):
        text_task(tmp_path).encode(texts)


def test_no_message_about_a_text_quotes_it(tmp_path):
    with pytest.raises(Invalid) as caught:
        text_task(tmp_path).encode(["secret\ud800", "secret"])
    assert "secret" not in str(caught.value)


def test_rows_are_padded_to_the_longest_of_their_own_run(tmp_path):
    inputs = text_task(tmp_path).assemble([[CLS, GOOD, SEP], [CLS, BAD, FINE, DAY, SEP]])
    assert inputs["input_ids"].tolist() == [[CLS, GOOD, SEP, 0, 0], [CLS, BAD, FINE, DAY, SEP]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_the_padding_token_is_the_tokenizers_own(tmp_path):
    inputs = text_task(tmp_path, padding=True).assemble([[CLS, SEP], [CLS, BAD, SEP]])
    assert inputs["input_ids"].tolist() == [[CLS, SEP, FINE], [CLS, BAD, SEP]]


@pytest.mark.parametrize("datatype", ["INT64", "INT32"])
def test_the_model_is_given_the_inputs_and_the_integer_type_it_names(tmp_path, datatype):
    names = ("token_type_ids", "input_ids", "attention_mask")
    inputs = text_task(tmp_path, inputs=names, datatype=datatype).assemble([[CLS, SEP], [CLS, BAD, SEP]])
    assert {name: array.dtype.name for name, array in inputs.items()} == dict.fromkeys(names, datatype.lower())
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert set(text_task(tmp_path, inputs=("input_ids",)).assemble([[CLS]])) == {"input_ids"}


@pytest.mark.parametrize("names", [("ids",), ("attention_mask",), ("input_ids", "pixels")])
def test_a_text_model_with_inputs_that_no_tokenizer_gives_is_refused(tmp_path, names):
    with pytest.raises(ArtifactError, match=r"model.onnx: inputs: expected input_ids .* found"):
        text_task(tmp_path, inputs=names)


def test_logits_become_probabilities_however_large_they_are(tmp_path):
    logits = np.array([[0, 0], [1000, 1001]], np.float32)
    rows = text_task(tmp_path, scores="logits").split([[CLS], [CLS]], {"scores": logits})
    assert np.allclose(rows, [[0.5, 0.5], [1 / (1 + np.e), np.e / (1 + np.e)]])


def test_probabilities_are_passed_on_as_they_are(tmp_path):
    rows = text_task(tmp_path).split([[CLS]], {"scores": np.array([[0.25, 0.75]], np.float16)})
    assert [row.tolist() for row in rows] == [[0.25, 0.75]]
    assert rows[0].dtype == np.float32


@pytest.mark.parametrize(
    "scores",
    [[[0.1, 0.2, 0.7]], [[0.5]], [[0.5, 0.5], [0.5, 0.5]], [[np.nan, 0.5]], [[np.inf, 0.5]]],
    ids=["more labels", "fewer labels", "more rows", "nan", "infinite"],
)
def test_scores_that_are_not_one_finite_number_per_label_are_an_error(tmp_path, scores):
    with pytest.raises(ValueError, match="expected finite"):
        text_task(tmp_path).split([[CLS]], {"scores": np.array(scores, np.float32)})


def test_a_request_is_cut_into_units_no_larger_than_a_batch_and_joined_in_order(tmp_path):
    task = tensor_task(tmp_path, max_rows=4)
    units = task.encode(ab(10))
    assert [(unit.rows, unit.length) for unit in units] == [(4, 1), (4, 1), (2, 1)]
    results = [{"y": unit.payload["a"]} for unit in units]
    assert np.array_equal(task.join(results)["y"], ab(10)["a"])


def test_units_stacked_into_one_run_are_split_into_the_same_units(tmp_path):
    task = tensor_task(tmp_path)
    payloads = [task.encode(ab(rows))[0].payload for rows in (1, 3, 2)]
    stacked = task.assemble(payloads)
    assert {name: array.shape for name, array in stacked.items()} == {"a": (6, 2), "b": (6, 3)}
    parts = task.split(payloads, {"y": stacked["a"][:, 0], "z": stacked["b"]})
    assert [part["y"].tolist() for part in parts] == [payload["a"][:, 0].tolist() for payload in payloads]
    assert [part["z"].tolist() for part in parts] == [payload["b"].tolist() for payload in payloads]


def test_only_rows_of_the_same_shape_may_share_a_run(tmp_path):
    task = tensor_task(tmp_path)
    first, same, wider = (task.encode(inputs)[0].key for inputs in (ab(1), ab(2), ab(1, width=5)))
    assert first == same
    assert first != wider


def test_a_model_that_does_not_batch_gets_each_request_whole_and_alone(tmp_path):
    task = tensor_task(tmp_path, batching=False, max_rows=4)
    (one,), (other,) = task.encode(ab(10)), task.encode(ab(10))
    assert one.key != other.key
    outputs = {"y": np.zeros(7)}
    assert task.assemble([one.payload])["a"].shape == (10, 2)
    assert task.split([one.payload], outputs) == [outputs]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"c": np.zeros((2, 2))}, r"expected .*\['a', 'b'\]"),
        ({"a": np.zeros((2, 3))}, r"'a'.*expected \[-1, 2\], found \[2, 3\]"),
        ({"a": np.zeros(2)}, r"'a'.*expected \[-1, 2\], found \[2\]"),
        ({"a": np.zeros((2, 2, 1))}, r"'a'.*expected \[-1, 2\], found \[2, 2, 1\]"),
        ({"a": np.zeros((3, 2))}, r"same first dimension.*found \[2, 3\]"),
        ({"a": np.zeros((0, 2)), "b": np.zeros((0, 3))}, r"at least 1.*found \[0\]"),
    ],
    ids=["unknown name", "fixed size", "rank below", "rank above", "rows differ", "no rows"],
)
def test_tensors_other_than_the_models_are_invalid(tmp_path, change, said):
    with pytest.raises(Invalid, match=said):
        tensor_task(tmp_path).encode(ab(2) | change)


def test_a_missing_input_is_invalid(tmp_path):
    with pytest.raises(Invalid, match=r"expected .*\['a', 'b'\]"):
        tensor_task(tmp_path).encode({"a": np.zeros((1, 2))})


@pytest.mark.parametrize("shape", [(2,), (4,), ()])
def test_outputs_without_one_row_per_input_row_are_an_error(tmp_path, shape):
    task = tensor_task(tmp_path)
    payloads = [unit.payload for unit in task.encode(ab(3))]
    with pytest.raises(ValueError, match="expected 3 rows"):
        task.split(payloads, {"y": np.zeros(shape)})
