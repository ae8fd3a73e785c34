"""A run in this process: what is scored and what is not, and that the bytes depend on nothing but the plan."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import ConfigError, ProviderError, StorageError, TooManyBadRows
from app.runtime.session import Model
from app.scoring.commit import RunManifest, finish
from app.scoring.run import Scorer
from app.scoring.start import Options, open_scorer
from app.settings import Settings
from loadtest.texts import sentences
from tests import onnx_models, task_models
from tests.text_model import text_model

ROWS = [{"text": text, "key": f"k{number}"} for number, text in enumerate(sentences(600))]


def scorer_of(source: Path, output: Path, model: Path | None = None, **options) -> Scorer:
    settings = Settings(model_dir=model or text_model(), provider="cpu")
    return open_scorer(Options(str(source), str(output), **options), settings)


def run(source: Path, output: Path, model: Path | None = None, **options) -> RunManifest:
    scorer = scorer_of(source, output, model, **options)
    list(scorer.score(range(len(scorer.plan.shards))))
    manifest = finish(scorer.output, scorer.plan)
    assert manifest is not None
    return manifest


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def answers(output: Path) -> list[dict]:
    lines = [line for path in sorted(output.glob("shard-*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def reviews(tmp_path) -> Path:
    return write_jsonl(tmp_path / "reviews.jsonl", ROWS)


def test_each_row_is_answered_as_alone_and_in_order(reviews, tmp_path):
    manifest = run(reviews, tmp_path / "out", shard_rows=250)
    model = scorer_of(reviews, tmp_path / "out", shard_rows=250)._model
    task = model.task
    assert (manifest.rows, manifest.bad_rows, len(manifest.shards)) == (600, 0, 3)
    found = answers(tmp_path / "out")
    assert [each["id"] for each in found] == list(range(600))
    for row, each in list(zip(ROWS, found, strict=True))[::50]:
        (unit,) = task.encode([row["text"]])
        (alone,) = task.predictions([unit], model.run([unit.payload]))
        assert each["label"] == alone.label
        assert each["score"] == pytest.approx(alone.score, abs=2e-6)


@pytest.mark.parametrize("sizes", [{"shards": 5}, {"shard_rows": 130}])
def test_shards_in_any_order_by_any_processes_give_the_same_bytes(reviews, tmp_path, sizes):
    run(reviews, tmp_path / "one", **sizes)
    shards = list(range(5))
    random.Random(1).shuffle(shards)
    for shard in shards:
        scorer = scorer_of(reviews, tmp_path / "each", **sizes)
        assert finish(scorer.output, scorer.plan) is None
        list(scorer.score([shard]))
    assert finish(scorer.output, scorer.plan) is not None
    assert tree(tmp_path / "each") == tree(tmp_path / "one")


def test_more_shards_than_rows_are_empty_ones(tmp_path):
    manifest = run(write_jsonl(tmp_path / "few.jsonl", ROWS[:2]), tmp_path / "out", shards=4)
    assert sorted(each.rows for each in manifest.shards) == [0, 0, 1, 1]
    assert [each["id"] for each in answers(tmp_path / "out")] == [0, 1]


def test_no_rows_at_all_are_a_finished_run(tmp_path):
    assert run(write_jsonl(tmp_path / "none.jsonl", []), tmp_path / "out").shards == []


def test_rows_of_several_files_are_numbered_together(tmp_path):
    for number in range(3):
        write_jsonl(tmp_path / f"data/{number}.jsonl", ROWS[number * 200 : number * 200 + 200])
    run(tmp_path / "data", tmp_path / "out", shard_rows=150, id_column="key")
    whole = write_jsonl(tmp_path / "whole.jsonl", ROWS)
    run(whole, tmp_path / "whole-out", id_column="key")
    assert answers(tmp_path / "out") == answers(tmp_path / "whole-out")
    assert [each["id"] for each in answers(tmp_path / "out")] == [row["key"] for row in ROWS]


def test_a_shard_that_is_done_is_not_scored_again(reviews, tmp_path, monkeypatch):
    run(reviews, tmp_path / "out", shards=3)
    scorer = scorer_of(reviews, tmp_path / "out", shards=3)
    monkeypatch.setattr(Model, "run", lambda *_: pytest.fail("scored"))
    assert list(scorer.score(range(3))) == []


BAD = {
    b'{"text": "  "}': "'text': expected at least one character that is not blank",
    b'{"text": null}': "no 'text'",
    b"{}": "no 'text'",
    b'{"text": 5}': "'text': expected text, found int",
    b'{"text": "\\ud800"}': "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text"': "not JSON",
    b"[1]": "not a JSON object",
    b'{"text": "' + b"x" * 2000 + b'"}': "longer than 1000 bytes",
}


def test_bad_rows_go_to_a_file_with_their_number_and_the_reason_and_no_text(tmp_path):
    rows = [part for bad in BAD for part in (ROWS[0], bad)] + [ROWS[1]]
    source = write_jsonl(tmp_path / "reviews.jsonl", rows)
    manifest = run(source, tmp_path / "out", shards=1, max_row_bytes=1000)
    assert (manifest.rows, manifest.bad_rows) == (len(BAD) + 1, len(BAD))
    lines = (tmp_path / "out/_bad/shard-00000.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"row": 2 * n + 1, "input": str(source), "row_of_input": 2 * n + 1, "reason": reason}
        for n, reason in enumerate(BAD.values())
    ]
    assert [each["id"] for each in answers(tmp_path / "out")] == list(range(0, len(rows), 2))


def test_too_many_bad_rows_end_the_run_and_more_may_be_allowed_then(tmp_path):
    source = write_jsonl(tmp_path / "reviews.jsonl", [*ROWS[:300], b"{}", b"{", *ROWS[300:]])
    with pytest.raises(TooManyBadRows, match=r"at most 1 bad rows.* row 300: no 'text'"):
        run(source, tmp_path / "out", max_bad_rows=1, shard_rows=200)
    assert (tmp_path / "out/_markers/shard-00000.json").exists()
    assert not (tmp_path / "out/_markers/shard-00001.json").exists()
    assert run(source, tmp_path / "out", max_bad_rows=2, shard_rows=200).bad_rows == 2


def test_rows_that_the_model_fails_on_are_bad_and_take_no_others_with_them(tmp_path, monkeypatch):
    scorer = scorer_of(write_jsonl(tmp_path / "reviews.jsonl", [*ROWS, b"{"]), tmp_path / "out")
    (unit,) = scorer._model.task.encode([ROWS[7]["text"]])
    real = Model.run

    def fails(model, payloads):
        if unit.payload in payloads:
            raise RuntimeError(ROWS[7]["text"])
        return real(model, payloads)

    monkeypatch.setattr(Model, "run", fails)
    (marker,) = scorer.score([0])
    assert (marker.rows, marker.bad_rows) == (599, 2)
    bad = [json.loads(line) for line in (tmp_path / "out/_bad/shard-00000.jsonl").read_text().splitlines()]
    assert [(each["row"], each["reason"]) for each in bad] == [
        (7, "the model failed on it: RuntimeError"), (600, "not JSON"),
    ]  # fmt: skip


def test_a_device_that_fails_is_not_a_bad_row(reviews, tmp_path, monkeypatch):
    scorer = scorer_of(reviews, tmp_path / "out", max_bad_rows=10_000)

    def fails(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(Model, "run", fails)
    with pytest.raises(ProviderError):
        list(scorer.score([0]))
    assert not (tmp_path / "out/_markers").exists()


def change_input(source: Path) -> None:
    write_jsonl(source, ROWS[:-1])


CHANGED = {
    "inputs: .* has changed": lambda source, output: (source, {}, change_input(source)),
    r"columns: planned \['text'\], found \['text', 'key'\]": lambda source, output: (
        source,
        {"id_column": "key"},
        None,
    ),
    "shard_rows: planned 250, found 100": lambda source, output: (source, {"shard_rows": 100}, None),
    "inputs: planned": lambda source, output: (shutil.copy(source, source.with_name("other.jsonl")), {}, None),
}


@pytest.mark.parametrize("says", CHANGED)
def test_a_run_of_something_else_is_refused(reviews, tmp_path, says):
    run(reviews, tmp_path / "out", shard_rows=250)
    before = tree(tmp_path / "out")
    source, options, _ = CHANGED[says](reviews, tmp_path / "out")
    with pytest.raises(ConfigError, match=says):
        run(source, tmp_path / "out", **({"shard_rows": 250} | options))
    assert tree(tmp_path / "out") == before


def test_a_run_with_another_model_is_refused(reviews, tmp_path):
    run(reviews, tmp_path / "out")
    with pytest.raises(ConfigError, match="model: planned 'reviews', found"):
        run(reviews, tmp_path / "out", task_models.regression(tmp_path / "model"))


def test_an_input_that_changes_while_it_is_read_does_not_count(reviews, tmp_path):
    scorer = scorer_of(reviews, tmp_path / "out", shard_rows=300)
    markers = scorer.score(range(2))
    next(markers)
    reviews.write_text(reviews.read_text().replace(ROWS[599]["text"], ROWS[599]["text"].upper()))
    with pytest.raises(ConfigError, match="has changed since the run began"):
        list(scorer_of_same_plan(scorer).score([1]))
    assert finish(scorer.output, scorer.plan) is None


def scorer_of_same_plan(scorer: Scorer) -> Scorer:
    return Scorer(scorer._model, scorer._table, scorer.plan, scorer._source, scorer.output, 0, lambda *_: None)


def test_output_must_be_empty_or_of_a_run(reviews, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("")
    with pytest.raises(ConfigError, match="nothing in it"):
        run(reviews, tmp_path / "out")


@pytest.mark.parametrize(("source", "output"), [(".", "out"), ("in", "."), ("in/*.jsonl", "in")])
def test_output_and_input_must_be_apart(tmp_path, source, output):
    write_jsonl(tmp_path / "in/a.jsonl", ROWS[:5])
    with pytest.raises(ConfigError, match="OUTPUT: "):
        run(tmp_path / source, tmp_path / output)


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl.gz", "nothing-there.jsonl"])
def test_input_that_is_not_there_or_of_no_known_format_is_refused(tmp_path, name):
    if "nothing" not in name:
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="INPUT: "):
        run(tmp_path / name, tmp_path / "out")


def test_a_store_that_replaces_what_exists_is_refused(reviews, tmp_path, monkeypatch):
    monkeypatch.setattr("app.scoring.storage.Storage.create_bytes", lambda *_: True)
    with pytest.raises(StorageError, match="replaces what exists"):
        run(reviews, tmp_path / "out")


def test_csv_and_parquet_answer_as_jsonl_does(reviews, tmp_path):
    run(reviews, tmp_path / "jsonl", id_column="key", shards=2)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet", row_group_size=100)
    run(tmp_path / "r.parquet", tmp_path / "parquet", id_column="key", shards=2)
    lines = [f'"{row["text"]}",{row["key"]}' for row in ROWS]
    (tmp_path / "r.csv").write_text("\n".join(["text,key", *lines]))
    run(tmp_path / "r.csv", tmp_path / "csv", id_column="key", shards=2)

    expected = answers(tmp_path / "jsonl")
    found = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "parquet").glob("*.parquet")))
    assert found.schema.names == ["id", "label", "score", "truncated"]
    assert [{"truncated": False} | each for each in expected] == [dict(each) for each in found.to_pylist()]
    rows = [line for path in sorted((tmp_path / "csv").glob("*.csv")) for line in path.read_text().splitlines()[1:]]
    assert rows == [
        f"{each['id']},{each['label']},{each['score']},{json.dumps('truncated' in each)}" for each in expected
    ]


def test_the_folder_reads_as_one_data_set_for_others(reviews, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    run(tmp_path / "r.parquet", tmp_path / "out", shards=3)
    assert pq.read_table(tmp_path / "out").num_rows == len(ROWS)


TEXT_TASKS = {
    "multi-label": (task_models.multi_label, {}),
    "text-embedding": (task_models.embedding, {}),
    "text-regression": (task_models.regression, {}),
    "text-regression by names": (lambda folder: task_models.regression(folder, labels=("joy", "odd name")), {}),
    "token-classification": (task_models.tags, {}),
    "text-pair": (task_models.pair, {"query": "Anna in Berlin"}),
}


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_every_task_with_texts_answers_what_it_says(tmp_path, task):
    build, more = TEXT_TASKS[task]
    folder = build(tmp_path / "model")
    rows = [{"text": text} | more for text in task_models.TEXTS]
    run(write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "jsonl", folder)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    run(tmp_path / "r.parquet", tmp_path / "parquet", folder)
    found = answers(tmp_path / "jsonl")
    assert len(found) == len(rows)
    assert [bool(each.get("truncated")) for each in found] == [len(text) > 200 for text in task_models.TEXTS]
    table = pq.read_table(tmp_path / "parquet/shard-00000.parquet").to_pylist()
    assert [{"truncated": False} | each for each in found] == table


def test_tensors_are_a_column_for_each_input(package, tmp_path):
    folder = package(onnx_models.mlp)
    features = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32).tolist()
    bad = [
        {"features": [1, 2, 3]},
        {"features": ["1", "2", "3", "4"]},
        {"features": [[1], 2, 3, 4]},
        {"features": 1e300},
    ]
    rows = [*({"features": each, "key": number} for number, each in enumerate(features)), *bad]
    run(write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "jsonl", folder)
    found = answers(tmp_path / "jsonl")
    assert len(found) == 50
    model = scorer_of(tmp_path / "r.jsonl", tmp_path / "jsonl", folder)._model
    alone = model.infer({"features": np.array(features[:1], np.float32)})["scores"][0]
    assert found[0]["scores"] == pytest.approx(alone.tolist(), rel=1e-5)
    assert len((tmp_path / "jsonl/_bad/shard-00000.jsonl").read_text().splitlines()) == len(bad)

    pq.write_table(pa.Table.from_pylist(rows[:50]), tmp_path / "r.parquet")
    run(tmp_path / "r.parquet", tmp_path / "parquet", folder, id_column="key")
    table = pq.read_table(tmp_path / "parquet/shard-00000.parquet")
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    assert table.schema.field("id").type == pa.int64()
    assert table.to_pylist() == found
    (tmp_path / "r.csv").write_text("features\n1\n")
    with pytest.raises(ConfigError, match="tensors are scored from JSONL or Parquet"):
        run(tmp_path / "r.csv", tmp_path / "csv", folder)


def test_images_are_refused(reviews, tmp_path):
    with pytest.raises(ConfigError, match="takes texts and tensors"):
        run(reviews, tmp_path / "out", task_models.images(tmp_path / "model"))
