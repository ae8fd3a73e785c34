"""`python -m app.scoring` in processes of its own, on a disk and on an S3: killed, raced, stopped, refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import httpx
import pytest

from loadtest.texts import sentences
from tests.process import NO_TLS, ROOT, START_SECONDS, free_port
from tests.text_model import text_model

ROWS, SHARD_ROWS = 1500, 100
# A model that takes its time, so that there is something to interrupt.
PRODUCTS = 300
SLOW_SECONDS = 300
S3 = """
import sys, time
from moto.server import ThreadedMotoServer
ThreadedMotoServer("127.0.0.1", int(sys.argv[1])).start()
while True:
    time.sleep(60)
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Place:
    """Where a data set and the runs over it are: `url(name)`, `write(name, data)`, and `tree(name)`, all there is."""

    def __init__(self, root: str, **options: object) -> None:
        self.root, self.environment = root, dict[str, str]()
        self._system = fsspec.url_to_fs(root, use_listings_cache=False, skip_instance_cache=True, **options)[0]

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    def write(self, name: str, data: bytes) -> str:
        self._system.pipe_file(self.url(name), data)
        return self.url(name)

    def tree(self, name: str) -> dict[str, bytes]:
        paths = self._system.find(self.url(name))
        return {path.partition(f"/{name}/")[2]: self._system.cat_file(path) for path in paths}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Place:
    return Place(str(tmp_path_factory.mktemp("scoring")))


@pytest.fixture(scope="module")
def s3() -> Iterator[Place]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", S3, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None
            assert time.monotonic() < give_up
            try:
                httpx.put(f"{endpoint}/bucket", verify=NO_TLS)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        place = Place("s3://bucket", key="key", secret="secret", endpoint_url=endpoint)
        # As fsspec's own configuration says it.
        place.environment = CREDENTIALS | {"FSSPEC_S3_ENDPOINT_URL": endpoint}
        yield place
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["disk", "s3"])
def place(request) -> Place:
    return request.getfixturevalue(request.param)


def start(place: Place, *arguments: object, model: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("APP_", "JOB_"))}
    settings = {"APP_MODEL_DIR": str(model or text_model(PRODUCTS)), "APP_PROVIDER": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "app.scoring", *map(str, arguments)],
        cwd=ROOT,
        env=clean | settings | place.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[dict], str]:
    """Exit code, log lines, standard error."""
    out, err = process.communicate(timeout=SLOW_SECONDS)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def run(place: Place, *arguments: object, **environment: str) -> list[dict]:
    """Its log lines."""
    code, lines, err = ended(start(place, *arguments, **environment))
    assert (code, err) == (0, "")
    return lines


def data_set(place: Place) -> str:
    """Reviews, two of them bad."""
    rows = [json.dumps({"text": text, "key": f"k{n}"}) for n, text in enumerate(sentences(ROWS - 2))]
    return place.write("reviews.jsonl", "\n".join([*rows[:150], "{", *rows[150:], '{"text": ""}']).encode())


# Of each place, because the plan has the inputs' addresses.
_undisturbed: dict[str, dict[str, bytes]] = {}


def undisturbed(place: Place) -> tuple[str, dict[str, bytes]]:
    """The data set, and what a run over it writes."""
    if place.root not in _undisturbed:
        source = data_set(place)
        run(place, source, place.url("undisturbed"), "--shard-rows", SHARD_ROWS)
        _undisturbed[place.root] = place.tree("undisturbed")
    return place.url("reviews.jsonl"), _undisturbed[place.root]


def test_what_a_run_writes(place):
    _, tree = undisturbed(place)
    shards = [f"shard-{number:05}" for number in range(ROWS // SHARD_ROWS)]
    bad = [f"_bad/{shards[number]}.jsonl" for number in (1, 14)]
    markers = [f"_markers/{shard}.json" for shard in shards]
    outputs = [f"{shard}.jsonl" for shard in shards]
    assert sorted(tree) == sorted([*outputs, *markers, *bad, "_plan.json", "_manifest.json"])
    manifest = json.loads(tree["_manifest.json"])
    assert (manifest["rows"], manifest["bad_rows"], len(manifest["shards"])) == (ROWS - 2, 2, len(shards))


def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(place, pytestconfig):
    source, expected = undisturbed(place)
    kills, rng = pytestconfig.getoption("--scoring-kills"), random.Random(7)
    done = 0
    for number in range(kills):
        # Over and over from the start, where there are many kills: each leaves less to do.
        output = f"killed-{number // 10}"
        process = start(place, source, place.url(output), "--shard-rows", SHARD_ROWS)
        assert process.stdout is not None
        # After so many lines, each a shard, and a moment more.
        for _ in range(rng.randrange(6)):
            process.stdout.readline()
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        done += process.returncode == -signal.SIGKILL
        if number % 10 == 9 or number == kills - 1:
            run(place, source, place.url(output), "--shard-rows", SHARD_ROWS)
            assert place.tree(output) == expected
    assert done > kills / 2


def test_two_runs_at_once_are_as_one(place):
    source, expected = undisturbed(place)
    pair = [start(place, source, place.url("raced"), "--shard-rows", SHARD_ROWS) for _ in range(2)]
    assert [ended(process)[::2] for process in pair] == [(0, ""), (0, "")]
    assert place.tree("raced") == expected


def test_each_index_of_a_job_does_its_part_and_the_last_one_finishes(disk):
    source, expected = undisturbed(disk)
    for count, index in enumerate((2, 0, 1)):
        arguments = (source, disk.url("indexed"), "--shard-rows", SHARD_ROWS, "--completions", 3)
        lines = run(disk, *arguments, JOB_COMPLETION_INDEX=str(index))
        assert [line["shard"] for line in lines if line["event"] == "shard"] == list(range(index, 15, 3))
        assert [line["event"] for line in lines][-1] == ("complete" if count == 2 else "shard")
    assert disk.tree("indexed") == expected


def test_a_plan_can_be_made_beforehand(disk):
    source, expected = undisturbed(disk)
    run(disk, source, disk.url("planned"), "--shard-rows", SHARD_ROWS, "--plan-only")
    assert disk.tree("planned") == {"_plan.json": expected["_plan.json"]}


def test_sigterm_ends_it_at_once_with_143_and_nothing_half_written(place):
    source, expected = undisturbed(place)
    process = start(place, source, place.url("stopped"), "--shard-rows", SHARD_ROWS)
    assert process.stdout is not None
    while "shard" not in json.loads(process.stdout.readline()):
        pass
    process.terminate()
    process.communicate(timeout=START_SECONDS)
    assert process.returncode == 143
    left = place.tree("stopped")
    assert "_manifest.json" not in left
    assert {name: data for name, data in left.items() if not name.startswith("_tmp/")}.items() <= expected.items()
    run(place, source, place.url("stopped"), "--shard-rows", SHARD_ROWS)
    assert place.tree("stopped") == expected


FAILURES: dict[str, tuple[int, str, Callable[[str], list[object]], dict[str, str]]] = {
    "too many bad rows": (6, "row 0: no 'nothing'", lambda source: [source, "--text-column", "nothing"], {}),
    "no input": (2, "INPUT: nowhere.jsonl: no files", lambda _: ["nowhere.jsonl"], {}),
    "an index without a count": (2, "--completions", lambda source: [source, "--index", 0], {}),
    "an index too high": (2, "index 3", lambda source: [source, "--shards", 3], {"JOB_COMPLETION_INDEX": "3"}),
    "a setting": (2, "APP_RUNNERS='x'", lambda source: [source], {"APP_RUNNERS": "x"}),
    "no model": (3, "/nowhere", lambda source: [source], {"APP_MODEL_DIR": "/nowhere"}),
    "no CUDA": (4, "APP_PROVIDER=cuda", lambda source: [source], {"APP_PROVIDER": "cuda"}),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_cannot_be_scored_is_one_line_and_an_exit_code(disk, what):
    source, _ = undisturbed(disk)
    code, says, arguments, environment = FAILURES[what]
    first, *more = arguments(source)
    found = start(disk, first, disk.url(f"failed {what}"), *more, **environment)
    status, _, errors = ended(found)
    assert status == code
    (line,) = errors.splitlines()
    assert line.startswith("sentiment-inference: ")
    assert says in line


def test_a_store_that_does_not_answer_is_exit_code_5_without_any_credential(s3):
    environment = {"FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_MAX_ATTEMPTS": "1"}
    code, _, errors = ended(start(s3, "s3://bucket/reviews.jsonl", "s3://bucket/out", **environment))
    assert code == 5
    (line,) = errors.splitlines()
    assert "s3://bucket/reviews.jsonl: " in line
    assert "secret" not in line


def test_metrics_count_rows_and_shards_while_it_runs(disk):
    source, _ = undisturbed(disk)
    port = free_port()
    process = start(disk, source, disk.url("measured"), "--shard-rows", SHARD_ROWS, "--metrics-port", port)
    assert process.stdout is not None
    while "shard" not in json.loads(process.stdout.readline()):
        pass
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", verify=NO_TLS).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("scoring_"))
    process.kill()
    process.communicate()
    assert float(values['scoring_rows_total{outcome="scored"}']) >= SHARD_ROWS - 1
    assert float(values["scoring_shards_total"]) >= 1
    assert 'scoring_rows_total{outcome="bad"}' in values
