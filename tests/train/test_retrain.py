"""The pipeline, with data, champion and models in object storage, as a CronJob runs it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from app.artifact.manifest import MANIFEST
from app.runtime.loading import load_model
from model.compare.command import DO_NOT_PROMOTE
from model.fetch import fetch
from model.training.storage import INCOMPLETE, Store
from tests.text_model import text_model
from tests.train import tiny
from tests.train.tiny import finish, start

RETRAIN, TRAIN = "model.training.retrain", "model.training.train"
BUCKET = "models"
# Bytes and speed of a network beside a table of words; and rows enough for a margin of that width.
LENIENT = ("--max-time-ratio=1e9", "--max-size-ratio=1e9", "--min-difference=-0.1", "--bias=0")


@pytest.fixture(scope="module")
def bucket() -> Iterator[object]:
    """S3 with one bucket; this process and its children have credentials for it."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        found = boto3.resource("s3").Bucket(BUCKET)
        found.create()
        yield found
    server.stop()


def upload(bucket: object, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        bucket.upload_file(str(path), f"{prefix}/{path.name}")
    return f"s3://{BUCKET}/{prefix}"


def names(bucket: object, prefix: str) -> set[str]:
    return {each.key.removeprefix(prefix) for each in bucket.objects.filter(Prefix=prefix)}


@pytest.fixture(scope="module")
def inputs(bucket, tmp_path_factory) -> tuple[object, ...]:
    root = tmp_path_factory.mktemp("inputs")
    data = upload(bucket, tiny.corpus(root / "data"), "data/1")
    return ("--data", data, "--backbone", tiny.backbone(root / "tiny" / "model"), *tiny.OPTIONS)


def test_a_better_candidate_is_published_under_its_digest_whole_and_the_same_whatever_interrupted_it(
    bucket, inputs, tmp_path
):
    champion = upload(bucket, text_model(words_known=3), "champions/worse")
    work = tmp_path / "checkpoints"
    command = (RETRAIN, *inputs, "--champion", champion, *LENIENT, "--checkpoints", work)
    output = finish(*command, "--publish", f"s3://{BUCKET}/undisturbed")
    digest = output.splitlines()[-1].removeprefix("digest ")
    place = f"sentiment/{digest}/"
    assert f"details    s3://{BUCKET}/undisturbed/{place}comparison.html" in output
    assert names(bucket, f"undisturbed/{place}") == {
        MANIFEST, "model.onnx", "tokenizer.json", "run.json", "comparison.json", "comparison.html",
    }  # fmt: skip
    assert list(work.iterdir()) == []

    fetched = fetch(f"s3://{BUCKET}/undisturbed/{place}", tmp_path / "fetched", digest)
    assert load_model(fetched.folder, digest=digest).artifact.digest == digest
    made = fetched.manifest.lineage["training"]
    assert (made["command"], made["code_revision"]) == ("model.training.quantize", "tested")
    assert made["parent"]["run"]["command"] == TRAIN

    (work / "retrain-0000").mkdir()  # of data that is old by now
    killed = (*command, "--publish", f"s3://{BUCKET}/killed", "--checkpoint-minutes", 0)
    for part in ("base", "int8"):
        process = start(*killed)
        while not (found := list(work.glob(f"retrain-*/{part}.checkpoints/*.pt"))):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert all(path.parent.parent.name != "retrain-0000" for path in found)
    assert not names(bucket, "killed/")
    assert finish(*killed).splitlines()[-1] == f"digest {digest}"
    assert names(bucket, f"killed/{place}") == names(bucket, f"undisturbed/{place}")
    for name in (MANIFEST, "model.onnx", "run.json"):
        first, second = (
            bucket.Object(f"{kind}/{place}{name}").get()["Body"].read() for kind in ("undisturbed", "killed")
        )
        assert first == second


def test_a_candidate_that_is_no_better_is_not_published_but_why_not_is(bucket, inputs, tmp_path):
    champion = upload(bucket, text_model(), "champions/better")
    output = finish(
        RETRAIN, *inputs, "--champion", champion, *LENIENT, "--max-size-ratio=1.5", "--checkpoints", tmp_path,
        "--publish", f"s3://{BUCKET}/refused", code=DO_NOT_PROMOTE,
    )  # fmt: skip
    assert "fails      size ratio" in output
    (digest,) = {name.split("/")[0] for name in names(bucket, "refused/sentiment/refused/")}
    place = f"refused/sentiment/refused/{digest}/"
    assert names(bucket, place) == {"comparison.json", "comparison.html", "run.json"}
    comparison = json.loads(bucket.Object(f"{place}comparison.json").get()["Body"].read())
    assert comparison["failed"] == ["size ratio"]
    assert set(comparison["slices"]) == {"sst2-dev", "tweets-held-out", "amazon-held-out"}
    # No digest to promote by mistake.
    assert "digest " not in output.splitlines()[-1]


def test_what_cannot_be_judged_is_refused_before_hours_of_training(inputs, tmp_path):
    work = ("--checkpoints", tmp_path / "work", "--publish", tmp_path / "models")
    assert "nowhere" in finish(RETRAIN, *inputs, "--champion", "nowhere", *work, code=3)
    pinned = ("--champion", text_model(), "--champion-digest", "0" * 64)
    assert "digest pin mismatch" in finish(RETRAIN, *inputs, *pinned, *work, code=3)
    rows = ("--champion", text_model(), "--evaluation", tmp_path / "none.jsonl")
    assert "none.jsonl: cannot be read" in finish(RETRAIN, *inputs, *rows, *work, code=2)


def test_a_result_in_object_storage_counts_when_all_of_it_is_there(bucket, inputs, tmp_path):
    out = f"s3://{BUCKET}/base"
    command = (TRAIN, *inputs, "--out", out, "--checkpoints", tmp_path / "checkpoints")
    finish(*command)
    assert names(bucket, "base/") == {"config.json", "model.safetensors", "run.json", "tokenizer.json"}
    assert "done already" in finish(*command)
    # As a copy leaves it that was cut off: the mark goes last.
    bucket.Object(f"base/{INCOMPLETE}").put(Body=b"")
    assert Store(out).finished() is None
    bucket.Object("base/model.safetensors").put(Body=b"half")
    assert f"{out}: done, run " in finish(*command)
    assert INCOMPLETE not in names(bucket, "base/")
    assert bucket.Object("base/model.safetensors").content_length > 1000


def test_data_that_is_not_there_is_one_line_with_the_exit_code_of_storage(bucket, inputs, tmp_path):
    out = ("--out", tmp_path / "base")
    last = finish(TRAIN, *inputs, "--data", f"s3://{BUCKET}/nothing", *out, code=5).splitlines()[-1]
    assert last.startswith(f"{TRAIN}: s3://{BUCKET}/nothing/sst2-train.tsv: not found")
