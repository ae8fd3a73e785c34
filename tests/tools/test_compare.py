"""model.compare: which candidates it promotes, what it records, and what the intervals are."""

import csv
import json
import random
import shutil
from itertools import product

import pytest

from app.artifact.manifest import MANIFEST
from model.compare import Thresholds
from model.compare.command import DO_NOT_PROMOTE, main
from model.compare.measure import ROUNDS, predict, seconds
from model.compare.statistics import mcnemar, paired_difference, proportion
from model.compare.verdict import checks
from tests import onnx_models
from tests.text_model import BAD, GOOD, LABELS, text_model

ROWS = 1200
# What takes how long is not these tests' business.
PATIENT = ("--max-time-ratio", 1e9)


def examples() -> list[dict[str, str]]:
    """Each text has just one word of praise or of blame, any as often as another."""
    rng = random.Random(0)
    words = [(word, label) for kind, label in ((BAD, LABELS[0]), (GOOD, LABELS[1])) for word in kind]
    rows = []
    for index in range(ROWS):
        word, label = words[index % len(words)]
        text = f"it was {word}" + " and so on" * rng.randrange(6)
        rows.append({"text": text, "label": label, "slice": ("web", "shop")[index % 2]})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "held-out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples()))
    return path


@pytest.fixture
def run(command, tmp_path):
    """Compares; its exit code, and comparison.json if that was written."""

    def compare(champion, candidate, data, *options):
        out = tmp_path / "out"
        code = command(main, champion, candidate, "--data", data, "--out", out, *PATIENT, *options)
        found = out / "comparison.json"
        return code, json.loads(found.read_text()) if found.exists() else None

    return compare


def test_a_model_takes_its_own_place(run, data):
    code, found = run(text_model(), text_model(), data)
    assert code == 0
    assert found["promote"]
    assert found["difference"]["estimate"] == 0
    assert found["disagreements"]["count"] == 0
    assert found["size_ratio"] == 1


def test_a_better_model_is_promoted(run, data):
    code, found = run(text_model(words_known=5), text_model(), data)
    assert code == 0
    assert found["difference"]["low"] > 0
    assert found["disagreements"]["only_champion_right"] == 0
    assert found["mcnemar_p"] < 0.001


def test_a_worse_model_is_refused_and_the_thresholds_it_fails_are_named(run, data, capsys):
    code, found = run(text_model(), text_model(words_known=5), data)
    assert code == DO_NOT_PROMOTE
    assert not found["promote"]
    slices = [f"accuracy difference, slice {name}" for name in ("shop", "web")]
    assert found["failed"] == ["accuracy difference, lower bound", *slices]
    out = capsys.readouterr().out
    assert all(f"fails      {name}: " in out for name in found["failed"])
    assert out.endswith("verdict    do not promote\n")


def test_a_set_too_small_to_exclude_a_loss_promotes_nothing_that_it_cannot_vouch_for(run, tmp_path):
    small = tmp_path / "small.jsonl"
    small.write_text("".join(json.dumps(row) + "\n" for row in examples()[:60]))
    code, found = run(text_model(), text_model(), small)
    assert code == DO_NOT_PROMOTE
    assert found["failed"] == ["accuracy difference, lower bound"]
    assert run(text_model(), text_model(), small, "--min-difference", -0.1)[0] == 0


def test_what_is_counted_is_what_the_models_answer(run, data):
    _, found = run(text_model(), text_model(words_known=5), data, "--confidence", 0.9)
    rows = examples()
    known = set(GOOD[:5] + BAD[:5])
    # Words it does not know leave it with the first label.
    wrong = [number for number, row in enumerate(rows, 1)
             if row["label"] == LABELS[1] and row["text"].split()[2] not in known]  # fmt: skip
    assert found["disagreements"] == {
        "count": len(wrong),
        "only_champion_right": len(wrong),
        "only_candidate_right": 0,
        "both_wrong": 0,
        "rows": wrong,
    }
    positives = sum(row["label"] == LABELS[1] for row in rows)
    assert found["labels"] == {LABELS[0]: ROWS - positives, LABELS[1]: positives}
    assert found["champion"]["predicted"] == found["labels"]
    assert found["candidate"]["predicted"][LABELS[1]] == positives - len(wrong)
    assert found["candidate"]["accuracy"]["estimate"] == pytest.approx(1 - len(wrong) / ROWS, abs=1e-6)
    assert sum(each["rows"] for each in found["slices"].values()) == ROWS
    assert found["thresholds"]["confidence"] == 0.9


def test_the_data_set_can_be_pinned_and_its_digest_is_recorded(run, data, capsys):
    _, found = run(text_model(), text_model(), data)
    digest = found["data"]["sha256"]
    assert run(text_model(), text_model(), data, "--data-digest", f"sha256:{digest}")[0] == 0
    assert run(text_model(), text_model(), data, "--data-digest", "0" * 64)[0] == 2
    assert digest in capsys.readouterr().err


def test_csv_says_the_same_as_jsonl(run, data, tmp_path):
    path = tmp_path / "held-out.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["label", "text", "slice"])
        writer.writeheader()
        writer.writerows(examples())
    _, found = run(text_model(), text_model(words_known=5), path)
    _, expected = run(text_model(), text_model(words_known=5), data)
    for name in ("disagreements", "slices", "labels", "difference", "failed"):
        assert found[name] == expected[name]


def test_without_slices_texts_of_like_length_are_one(run, tmp_path):
    path = tmp_path / "plain.jsonl"
    lengths = (1, 32, 33, 64, 300)
    path.write_text("".join(json.dumps({"text": "a" * size, "label": LABELS[0]}) + "\n" for size in lengths))
    _, found = run(text_model(), text_model(), path)
    assert {name: each["rows"] for name, each in found["slices"].items()} == {
        "1 to 32 characters": 2,
        "33 to 64 characters": 2,
        "over 256 characters": 1,
    }


def test_the_page_shows_texts_only_when_asked_and_escapes_them(run, tmp_path):
    path = tmp_path / "markup.jsonl"
    path.write_text(json.dumps({"text": f"<script> {GOOD[9]}", "label": LABELS[1], "slice": "<b>"}) + "\n")
    page = tmp_path / "out" / "comparison.html"
    run(text_model(), text_model(words_known=5), path)
    assert GOOD[9] not in page.read_text()
    run(text_model(), text_model(words_known=5), path, "--show-texts")
    assert f"&lt;script&gt; {GOOD[9]}" in page.read_text()
    assert "<script>" not in page.read_text()
    assert "<b>" not in page.read_text()


def test_another_task_is_an_error_that_names_both(run, package, data, capsys):
    code, found = run(text_model(), package(onnx_models.mlp), data)
    assert (code, found) == (3, None)
    assert "expected single_label text-classification" in (line := capsys.readouterr().err)
    assert "found tensors" in line


def test_other_labels_are_an_error(run, data, tmp_path, capsys):
    other = relabelled(tmp_path / "other", ["sad", "glad"])
    assert run(text_model(), other, data) == (3, None)
    assert "expected ['negative', 'positive']" in capsys.readouterr().err


def test_the_same_labels_in_another_order_are_compared_by_name(run, data, tmp_path):
    """A model that answers the wrong way round is a worse one, not another."""
    code, found = run(text_model(), relabelled(tmp_path / "turned", LABELS[::-1]), data)
    assert code == DO_NOT_PROMOTE
    assert found["candidate"]["accuracy"]["estimate"] == 0


def relabelled(folder, labels):
    shutil.copytree(text_model(), folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"labels": labels, "checksum": None}))
    return folder


def test_an_artifact_that_does_not_pass_the_gate_is_not_compared(run, data, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(text_model(), damaged)
    with (damaged / "model.onnx").open("r+b") as file:
        file.write(b"\0")
    assert run(text_model(), damaged, data) == (3, None)
    assert "sha256 mismatch" in capsys.readouterr().err


SECRET = "mother's maiden name"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "expected at least one row"),
        ("a.jsonl", f'{{"text": "{SECRET}"', "row 1: expected one JSON object"),
        ("a.jsonl", f'{{"text": " ", "label": "{SECRET}"}}', "row 1: `text`"),
        ("a.jsonl", f'["{SECRET}"]', "row 1: `text`"),
        ("a.jsonl", f'{{"text": "{SECRET}", "label": 1}}', "row 1: `label`: expected a string"),
        ("a.jsonl", f'\n{{"text": "{SECRET}", "label": "{SECRET}"}}', "row 1: `label`: expected one of"),
        ("a.jsonl", f'{{"text": "{SECRET}", "label": "a", "slice": 3}}', "row 1: `slice`"),
        ("a.csv", f"text\n{SECRET}\n", "row 1: `label`"),
        ("a.csv", f'text,label\n"{SECRET}",\n', "row 1: `label`"),
        ("a.tsv", SECRET, "expected a file named .jsonl or .csv"),
        ("a.jsonl", None, "cannot be read"),
    ],
)
def test_bad_data_is_one_line_that_names_the_row_and_never_quotes_it(run, tmp_path, capsys, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert run(text_model(), text_model(), path) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert SECRET not in line


@pytest.mark.parametrize("value", [0, 1, -1, "nan"])
def test_a_confidence_that_is_none_is_refused(run, data, value):
    assert run(text_model(), text_model(), data, "--confidence", value) == (2, None)


def test_time_and_size_beyond_their_ratios_are_refused():
    def failed(**found):
        values = {"low": 0.0, "slices": {}, "time_ratio": 1.0, "size_ratio": 1.0} | found
        return [check.name for check in checks(Thresholds(), **values) if not check.passed]

    assert failed() == []
    assert failed(time_ratio=1.2, size_ratio=1.5, low=-0.005) == []
    assert failed(time_ratio=1.21) == ["time ratio"]
    assert failed(size_ratio=1.51) == ["size ratio"]
    assert failed(slices={"few": (99, -0.5), "many": (100, -0.031)}) == ["accuracy difference, slice many"]


def test_the_two_take_turns_and_go_first_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr("model.compare.measure.predict", lambda model, texts: order.append(model))
    assert len(seconds(["a", "b"], ["text"])) == 2
    assert order == ["b", "a", "a", "b"] * (ROUNDS // 2) + ["b", "a"] * (ROUNDS % 2)


def test_answers_are_in_the_order_of_the_texts():
    from app.runtime.loading import load_model

    texts = [f"{'so ' * (index % 7)}{word}" for index, word in enumerate(GOOD + BAD)]
    found = [answer.label for answer in predict(load_model(text_model()), texts)]
    assert found == [LABELS[1]] * len(GOOD) + [LABELS[0]] * len(BAD)


def test_the_intervals_are_those_of_the_papers():
    # Wilson's for 81 of 263 (Newcombe 1998, table I), and Bonett and Price's for their formula's own numbers.
    wilson = proportion(81, 263, 0.95)
    assert (round(wilson.low, 4), round(wilson.high, 4)) == (0.2553, 0.3662)
    up, down, rows = 13 / 52, 2 / 52, 50
    half = 1.959964 * ((up + down - (up - down) ** 2) / 52) ** 0.5
    pair = paired_difference(12, 1, rows, 0.95)
    assert pair.estimate == pytest.approx(11 / 50)
    assert (pair.low, pair.high) == pytest.approx((up - down - half, up - down + half), abs=1e-5)


def test_mcnemars_p_counts_the_splits_that_are_as_uneven():
    assert mcnemar(0, 0) == 1
    for gained, lost in ((3, 3), (1, 5), (8, 0), (2, 9)):
        splits = product((0, 1), repeat=gained + lost)
        as_uneven = sum(abs(2 * sum(split) - gained - lost) >= abs(gained - lost) for split in splits)
        assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(as_uneven / 2 ** (gained + lost))


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """For pairs of models whose accuracies are known, at 95 %."""
    rng = random.Random(3)
    held = 0
    for _ in range(600):
        drawn = [rng.random() for _ in range(200)]
        found = paired_difference(sum(x < 0.06 for x in drawn), sum(0.06 <= x < 0.1 for x in drawn), 200, 0.95)
        held += found.low <= 0.02 <= found.high
    assert 0.93 <= held / 600 <= 0.985
