"""Texts in, one run's tensors out; golden texts, and the windows and tokenizers that cannot do that."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.artifact.manifest import Artifact, FileEntry, Golden, GoldenText, Manifest, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.tasks.text import ENCODED_TOGETHER, QUICK_CHARACTERS
from app.runtime.tasks.text_classification import TextClassification

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "day")
GOOD, BAD, FINE, DAY = 4, 5, 6, 7
CLS, SEP = 2, 3


def word_tokenizer(path: Path, *, padding: bool = False) -> Path:
    """A tokenizer.json of a few whole words between [CLS] and [SEP]; `padding` as some exporters leave it on."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", CLS), ("[SEP]", SEP)]
    )
    if padding:
        tokenizer.enable_padding(pad_id=FINE, pad_token="fine", length=32)
        tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


def artifact(
    folder: Path, *, inputs: Sequence[str] = ("input_ids", "attention_mask"), datatype: str = "INT64", **changes: object
) -> Artifact:
    """An artifact with a word tokenizer, two labels and a window of six; its model need not exist."""
    word_tokenizer(folder / "tokenizer.json")
    fields: dict = {
        "manifest_version": 1,
        "name": "test",
        "version": "1",
        "task": "text-classification",
        "precision": "fp32",
        "model_file": "model.onnx",
        "files": {name: FileEntry("0" * 64, 1) for name in ("model.onnx", "tokenizer.json")},
        "inputs": [TensorSpec(name, datatype, [-1, -1]) for name in inputs],  # type: ignore[arg-type]
        "outputs": [TensorSpec("scores", "FP32", [-1, 2])],
        "golden": Golden(0.1, [GoldenText("good", [0.5, 0.5])]),
        "tokenizer_file": "tokenizer.json",
        "labels": ["no", "yes"],
        "max_tokens": 6,
    }
    return Artifact(folder, Manifest(**(fields | changes)), "0" * 64)


def text_task(folder: Path, *, padding: bool = False, **changes: object) -> TextClassification:
    made = artifact(folder, **changes)  # type: ignore[arg-type]
    word_tokenizer(folder / "tokenizer.json", padding=padding)
    return TextClassification(made, 8)


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
    units = text_task(tmp_path, max_tokens=4).encode([long] * texts)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    whole = tokenizer.encode(long)
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


@pytest.mark.parametrize("name", ["[PAD]", "<pad>"])
def test_the_padding_token_is_found_by_its_name_where_no_padding_was_left_on(tmp_path, name):
    made = artifact(tmp_path)
    words = (tmp_path / "tokenizer.json").read_text().replace('"[PAD]"', '"nothing"').replace('"fine"', f'"{name}"')
    (tmp_path / "tokenizer.json").write_text(words)
    inputs = TextClassification(made, 8).assemble([[CLS, SEP], [CLS, BAD, SEP]])
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


def test_texts_come_as_one_named_tensor_of_strings(tmp_path):
    task = text_task(tmp_path)
    assert [(spec.name, spec.datatype, spec.shape) for spec in task.inputs] == [("text", "BYTES", [-1])]
    assert task.read({"text": np.array([b"good", "d\u00e9j\u00e0".encode()], object)}) == ["good", "d\u00e9j\u00e0"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "expected text"),
        ({"words": np.array([b"a"], object)}, "expected text"),
        ({"text": np.array([b"a"], object), "b": np.zeros(1)}, "expected text"),
        ({"text": np.array([[b"a"]], object)}, r"BYTES \[rows\].*found object \[1, 1\]"),
        ({"text": np.zeros(2, np.float32)}, r"BYTES \[rows\].*found float32 \[2\]"),
        ({"text": np.array([], object)}, r"at least one row, found object \[0\]"),
        ({"text": np.array([b"\xff"], object)}, "UTF-8"),
    ],
    ids=["none", "another name", "one more", "another rank", "another datatype", "no rows", "no UTF-8"],
)
def test_other_tensors_than_texts_are_invalid(tmp_path, tensors, said):
    with pytest.raises(Invalid, match=said):
        text_task(tmp_path).read(tensors)


def test_every_text_is_a_row_and_many_characters_are_slow(tmp_path):
    task = text_task(tmp_path)
    assert task.rows(["good", "bad"]) == 2
    assert not task.encodes_slowly(["g" * (QUICK_CHARACTERS // 2)] * 2)
    assert task.encodes_slowly(["g" * (QUICK_CHARACTERS // 2), "g" * (QUICK_CHARACTERS // 2 + 1)])


@pytest.mark.parametrize(("batch_tokens", "longest"), [(8 * 6, 6), (1000, 6), (8 * 3, 3), (1, 1)])
def test_warming_up_takes_one_short_text_and_as_many_long_ones_as_a_run_takes(tmp_path, batch_tokens, longest):
    smallest, largest = text_task(tmp_path).warm_up(8, batch_tokens)
    assert [unit.payload for unit in smallest] == [[CLS, GOOD, SEP]]
    assert [unit.length for unit in largest] == [longest] * 8
    assert all(len(unit.payload) == longest for unit in largest)


def test_every_example_is_a_golden_case_with_its_place(tmp_path):
    examples = [GoldenText("good", [0.25, 0.75]), GoldenText("bad day", [0.5, 0.5])]
    cases = text_task(tmp_path, golden=Golden(0.1, examples)).golden()
    assert [case.where for case in cases] == ["golden.examples[0]", "golden.examples[1]"]
    assert [[unit.payload for unit in case.units] for case in cases] == [[[CLS, GOOD, SEP]], [[CLS, BAD, DAY, SEP]]]
    assert [case.expected["probabilities"].tolist() for case in cases] == [[[0.25, 0.75]], [[0.5, 0.5]]]


def test_a_golden_example_may_name_any_of_the_tasks_outputs(tmp_path):
    example = GoldenText("good", outputs={"label": ["yes"], "score": [0.75]})
    (case,) = text_task(tmp_path, golden=Golden(0.1, [example])).golden()
    assert {name: array.tolist() for name, array in case.expected.items()} == {"label": ["yes"], "score": [0.75]}


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], "`golden.examples`: expected at least one, found none"),
        ([GoldenText("good", [1])], "golden.examples\\[0\\]: expected 2 probabilities, found 1"),
        ([GoldenText("good")], "expected some of the outputs .*'probabilities'.*, found \\[\\]"),
        ([GoldenText("good", outputs={"odds": [1.0]})], "expected some of the outputs .*'label'.*, found \\['odds'\\]"),
        ([GoldenText("good", outputs={"score": ["yes"]})], "score: expected numbers, found text"),
    ],
    ids=["none", "of other labels", "of nothing", "of no output", "of another type"],
)
def test_golden_examples_that_prove_nothing_are_refused(tmp_path, examples, said):
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{said}"):
        text_task(tmp_path, golden=Golden(0.1, examples)).golden()


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\0"])
def test_a_tokenizer_that_does_not_load_is_refused_by_its_path(tmp_path, content):
    made = artifact(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: tokenizer does not load: .+"):
        TextClassification(made, 8)
