"""Runs that are killed, stopped, resumed, shared by two processes: whatever happens, the same weights."""

import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from model.training.fit import INCOMPLETE_EXIT_CODE
from tests.process import ROOT, free_port
from tests.train import tiny
from tests.train.tiny import await_step, finish, record, start, steps_in

TRAIN, QUANTIZE = "model.training.train", "model.training.quantize"
EACH_STEP = ("--checkpoint-minutes", 0)
WEIGHTS = "model.safetensors"
LAST_STEP = 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    """Options of every run here."""
    root = tmp_path_factory.mktemp("inputs")
    return ("--data", tiny.corpus(root / "data"), "--backbone", tiny.backbone(root / "tiny" / "model"), *tiny.OPTIONS)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    """What a run makes that nothing interrupts, and that never writes a checkpoint."""
    out = tmp_path_factory.mktemp("undisturbed") / "base"
    finish(TRAIN, *inputs, "--out", out)
    return out


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def same(found: Path, expected: Path) -> None:
    assert (found / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert record(found) == record(expected)


def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_undisturbed_one(
    inputs, undisturbed, tmp_path
):
    out, checkpoints = tmp_path / "base", tmp_path / "checkpoints"
    command = (TRAIN, *inputs, "--out", out, "--checkpoints", checkpoints, *EACH_STEP)
    reached = []
    # The first step, within the first epoch, at its end, in the second.
    for step in (1, 5, 15, 24):
        process = start(*command)
        await_step(process, checkpoints, step)
        kill(process)
        reached.append(steps_in(checkpoints)[-1])
    assert not out.exists()
    output = finish(*command)
    assert f"resuming from {checkpoints}/" in output
    same(out, undisturbed)
    assert all(before <= after for before, after in pairwise(reached))
    assert reached[-1] < LAST_STEP, "the run was over before it was killed"
    # The best average was found by what came after.
    assert record(out)["metrics"]["epoch"] > reached[-1] / LAST_STEP * 2


def test_the_best_average_so_far_outlives_a_kill(inputs, tmp_path):
    """At this rate the first epoch finds it."""
    fast = (TRAIN, *inputs, "--learning-rate", 0.01)
    finish(*fast, "--out", tmp_path / "expected")
    assert record(tmp_path / "expected")["metrics"]["epoch"] < 1
    checkpoints = tmp_path / "checkpoints"
    killed = (*fast, "--out", tmp_path / "base", "--checkpoints", checkpoints, *EACH_STEP)
    process = start(*killed)
    await_step(process, checkpoints, 20)
    kill(process)
    finish(*killed)
    same(tmp_path / "base", tmp_path / "expected")


def test_a_run_that_is_done_has_its_result_and_no_checkpoints_and_is_not_done_again(inputs, undisturbed, tmp_path):
    out = tmp_path / "base"
    finish(TRAIN, *inputs, "--out", out, *EACH_STEP)
    same(out, undisturbed)
    # Another user may go on with it.
    assert {path.stat().st_mode & 0o444 for path in (out, *out.iterdir())} == {0o444}
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "done already" in finish(TRAIN, *inputs, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_keeps_its_last_step_and_says_so_by_its_exit_code(
    inputs, undisturbed, tmp_path, number
):
    out, checkpoints = tmp_path / "base", tmp_path / "base.checkpoints"
    process = start(TRAIN, *inputs, "--out", out)
    # Its first evaluation is the first that is heard of it: no checkpoint is due for minutes.
    assert process.stdout is not None
    while '"epoch": 0.47' not in (line := process.stdout.readline()):
        assert line, "ended too early"
    process.send_signal(number)
    output, _ = process.communicate(timeout=tiny.WAIT_SECONDS)
    assert process.returncode == INCOMPLETE_EXIT_CODE, output
    (step,) = steps_in(checkpoints)
    assert f"stopped after step {step};" in output
    assert 7 <= step < LAST_STEP
    assert not out.exists()
    finish(TRAIN, *inputs, "--out", out)
    same(out, undisturbed)


def test_a_stop_before_the_first_step_is_no_failure_either(inputs, tmp_path):
    process = start(TRAIN, *inputs, "--out", tmp_path / "base", TQDM_MININTERVAL="0")
    assert process.stdout is not None
    while "epoch 1" not in (line := process.stdout.readline()):
        assert line, "ended too early"
    process.terminate()
    process.communicate(timeout=tiny.WAIT_SECONDS)
    assert process.returncode == INCOMPLETE_EXIT_CODE


def test_a_checkpoint_that_the_disk_lost_is_passed_over_for_the_one_before(inputs, undisturbed, tmp_path):
    out, checkpoints = tmp_path / "base", tmp_path / "checkpoints"
    command = (TRAIN, *inputs, "--out", out, "--checkpoints", checkpoints, *EACH_STEP)
    process = start(*command)
    await_step(process, checkpoints, 9)
    kill(process)
    older, newest = (checkpoints / f"{step:09}.pt" for step in steps_in(checkpoints)[-2:])
    newest.write_bytes(newest.read_bytes()[:1000])
    (checkpoints / "000000099.tmp").write_bytes(b"cut off while it was written")
    output = finish(*command)
    assert f"resuming from {older}" in output
    same(out, undisturbed)


def test_another_run_touches_neither_checkpoints_nor_result(inputs, undisturbed, tmp_path):
    out, checkpoints = tmp_path / "base", tmp_path / "checkpoints"
    process = start(TRAIN, *inputs, "--out", out, "--checkpoints", checkpoints, *EACH_STEP)
    await_step(process, checkpoints, 2)
    kill(process)
    others = ("--seed", 8, "--checkpoints", checkpoints)
    assert "of another run" in finish(TRAIN, *inputs, "--out", out, *others, code=2)
    assert "result of another run" in finish(TRAIN, *inputs, "--out", undisturbed, "--seed", 8, code=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "will not be replaced" in finish(TRAIN, *inputs, "--out", tmp_path / "mine", code=2)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_quantize_resumes_as_train_does(inputs, undisturbed, tmp_path):
    (data,) = (inputs[index + 1] for index, option in enumerate(inputs) if option == "--data")
    command = (QUANTIZE, "--checkpoint", undisturbed, "--data", data, *tiny.OPTIONS, "--out")
    finish(*command, tmp_path / "expected")
    checkpoints = tmp_path / "checkpoints"
    killed = (*command, tmp_path / "int8", "--checkpoints", checkpoints, *EACH_STEP)
    for step in (4, 18):
        process = start(*killed)
        await_step(process, checkpoints, step)
        kill(process)
    finish(*killed)
    same(tmp_path / "int8", tmp_path / "expected")
    scales = [(tmp_path / name / "scales.json").read_bytes() for name in ("int8", "expected")]
    assert scales[0] == scales[1]
    assert record(tmp_path / "int8")["parent"]["run"] == record(undisturbed)


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    """Two processes, as a TrainJob starts them."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m")
    command = [*launch, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=tiny.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_processes_share_each_step_stop_together_and_resume_to_the_same_weights(inputs, undisturbed, tmp_path):
    process = torchrun(TRAIN, *inputs, "--out", tmp_path / "expected")
    output, _ = process.communicate(timeout=tiny.WAIT_SECONDS)
    assert process.returncode == 0, output
    expected = record(tmp_path / "expected")
    assert expected["processes"] == 2
    assert (tmp_path / "expected" / WEIGHTS).read_bytes() != (undisturbed / WEIGHTS).read_bytes()
    # Half as many steps as one process takes, and each evaluation printed once.
    assert output.count('{"epoch": ') == 4
    assert " 7/7 " in output

    checkpoints = tmp_path / "checkpoints"
    command = (TRAIN, *inputs, "--out", tmp_path / "stopped", "--checkpoints", checkpoints, *EACH_STEP)
    process = torchrun(*command)
    await_step(process, checkpoints, 4)
    process.terminate()
    output, _ = process.communicate(timeout=tiny.WAIT_SECONDS)
    assert f"stopped after step {steps_in(checkpoints)[-1]};" in output
    assert not (tmp_path / "stopped").exists()

    process = torchrun(*command)
    output, _ = process.communicate(timeout=tiny.WAIT_SECONDS)
    assert process.returncode == 0, output
    assert f"resuming from {checkpoints}/" in output
    same(tmp_path / "stopped", tmp_path / "expected")


def test_a_signal_to_one_of_two_processes_stops_both_with_the_code_of_an_interrupted_run(inputs, tmp_path):
    """As an Indexed Job runs them, without torchrun between: one Pod is evicted, none hangs."""
    checkpoints = tmp_path / "checkpoints"
    more = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = ("--out", tmp_path / "base", *EACH_STEP)
    first = start(TRAIN, *inputs, *options, "--checkpoints", checkpoints, RANK="0", **more)
    # Only the first needs the volume.
    second = start(TRAIN, *inputs, *options, "--checkpoints", tmp_path / "none", RANK="1", **more)
    await_step(first, checkpoints, 3)
    second.terminate()
    for process in (first, second):
        output, _ = process.communicate(timeout=tiny.WAIT_SECONDS)
        assert process.returncode == INCOMPLETE_EXIT_CODE, output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--out", "https://models.example.com/base"), "nothing can be stored there"),
        (("--out", "s3://models/base"), "--checkpoints"),
        (("--data", "nowhere", "--out", "base"), "nowhere/sst2-train.tsv: not there"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(inputs, options, expected):
    last = finish(TRAIN, *inputs, *options, code=2).splitlines()[-1]
    assert last.startswith(f"{TRAIN}: ")
    assert expected in last
