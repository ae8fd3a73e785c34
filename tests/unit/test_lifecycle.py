"""The service's stages, requests in flight, start-up and its failures, and how it ends."""

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import lifecycle as module
from app.batching.batcher import Batcher
from app.errors import ArtifactError, ConfigError, ProviderError, StartupError, Unavailable
from app.lifecycle import Lifecycle, exit_process, or_exit
from app.predictor import Predictor
from app.settings import Settings
from app.telemetry.metrics import Metrics
from tests import onnx_models

# Only ends a test that hangs.
PATIENCE_SECONDS = 60


class FakeBatcher:
    def __init__(self, stuck: str | None = None) -> None:
        self.closed = False
        self._stuck = stuck

    def stuck(self) -> str | None:
        return self._stuck

    def close(self) -> None:
        self.closed = True


def predictor(stuck: str | None = None) -> Predictor:
    return SimpleNamespace(batcher=FakeBatcher(stuck))  # type: ignore[return-value]


def new() -> Lifecycle:
    return Lifecycle(Settings(), Metrics(()))


class Start:
    """A service that starts, as its process would see it; awaits what comes of it."""

    def __init__(self, model_dir: Path = Path("/nowhere"), **settings: Any) -> None:
        self.metrics = Metrics(())
        self.settings = Settings(model_dir=model_dir, provider="cpu", **settings)
        self.lifecycle = Lifecycle(self.settings, self.metrics, self._fatal)
        self.loaded: list[Predictor] = []
        self.fatal: list[StartupError] = []
        self.fatal_thread = ""
        self._done = threading.Event()

    def _fatal(self, error: StartupError) -> None:
        self.fatal.append(error)
        self.fatal_thread = threading.current_thread().name
        self._done.set()

    def _loaded(self, predictor: Predictor) -> None:
        self.lifecycle.announce(predictor)
        self.loaded.append(predictor)
        self._done.set()

    async def ended(self) -> None:
        self.lifecycle.load(self._loaded)
        assert await asyncio.to_thread(self._done.wait, PATIENCE_SECONDS)

    def sample(self, metric: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(metric, labels)


class HeldGate:
    """The gate, which takes up no model before the test opens it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.passed = False
        self._load = module.load_configured
        patch.setattr(module, "load_configured", self._load_late)

    def _load_late(self, *args: Any, **kwargs: Any) -> Any:
        self.opened.wait(PATIENCE_SECONDS)
        model = self._load(*args, **kwargs)
        self.passed = True
        return model

    def thread(self) -> threading.Thread:
        return next(thread for thread in threading.enumerate() if thread.name == "gate")


@pytest.fixture
def artifact(package: Callable[..., Path]) -> Path:
    return package(onnx_models.mlp)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_before_the_gate_has_passed_a_model_nothing_is_answered() -> None:
    lifecycle = new()
    assert lifecycle.stage == "verifying"
    assert not lifecycle.ready
    assert lifecycle.stuck() is None
    lifecycle.enter("warming")
    with pytest.raises(Unavailable, match="warming") as caught:
        lifecycle.loaded()
    assert (caught.value.reason, caught.value.close) == ("not_ready", False)
    assert (lifecycle.unavailable().reason, str(lifecycle.unavailable())) == ("not_ready", "not ready: warming")


def test_serving_makes_it_ready() -> None:
    lifecycle, served = new(), predictor("runner 0 has ended")
    lifecycle.serve(served)
    assert lifecycle.ready
    assert lifecycle.loaded() is served
    assert lifecycle.stuck() == "runner 0 has ended"


def test_draining_is_not_ready_but_answers_whoever_comes() -> None:
    lifecycle, served = new(), predictor()
    lifecycle.serve(served)
    lifecycle.drain()
    assert (lifecycle.stage, lifecycle.ready, lifecycle.refusing) == ("draining", False, False)
    assert lifecycle.loaded() is served
    refusal = lifecycle.unavailable()
    assert (refusal.reason, refusal.close, str(refusal)) == ("draining", True, "not ready: draining")


def test_refusing_is_draining_too_and_ends_nothing() -> None:
    lifecycle, served = new(), predictor()
    lifecycle.serve(served)
    lifecycle.refuse()
    assert (lifecycle.stage, lifecycle.refusing) == ("draining", True)
    assert lifecycle.loaded() is served
    assert not served.batcher.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["loading", "warming", "ready"])
def test_nothing_leads_out_of_draining(stage: str) -> None:
    lifecycle = new()
    lifecycle.drain()
    lifecycle.enter(stage)
    assert lifecycle.stage == "draining"
    lifecycle.serve(predictor())
    assert not lifecycle.ready


def test_closing_refuses_and_ends_the_runners() -> None:
    lifecycle, served = new(), predictor()
    lifecycle.serve(served)
    lifecycle.close()
    assert (lifecycle.stage, lifecycle.refusing) == ("draining", True)
    assert served.batcher.closed  # type: ignore[attr-defined]


def test_closing_before_there_is_a_model_is_fine() -> None:
    new().close()


# --- requests in flight -----------------------------------------------------------------------------------------------


async def test_with_nothing_in_flight_it_is_idle_at_once() -> None:
    assert await new().idle(0)


async def test_it_is_idle_when_the_last_request_has_ended() -> None:
    lifecycle = new()
    lifecycle.in_flight = 2
    waiting = asyncio.create_task(lifecycle.idle(PATIENCE_SECONDS))
    await asyncio.sleep(0)
    lifecycle.request_ended()
    await asyncio.sleep(0)
    assert not waiting.done()
    lifecycle.request_ended()
    assert await waiting


async def test_a_request_that_does_not_end_in_time_is_not_waited_for() -> None:
    lifecycle = new()
    lifecycle.in_flight = 1
    assert not await lifecycle.idle(0.001)
    # It may still end, and others after it.
    lifecycle.request_ended()
    lifecycle.in_flight = 1
    lifecycle.request_ended()
    assert await lifecycle.idle(0)


def test_requests_in_flight_are_a_metric() -> None:
    metrics = Metrics(())
    lifecycle = Lifecycle(Settings(), metrics)
    lifecycle.in_flight = 3
    assert metrics.registry.get_sample_value("inference_requests_in_flight") == 3


# --- start-up ---------------------------------------------------------------------------------------------------------


async def test_a_model_that_passes_is_served_and_announced(artifact: Path) -> None:
    start = Start(artifact, runners=2, max_batch_rows=3, max_batch_tokens=30, max_queue_rows=9, max_queue_wait_ms=500)
    await start.ended()
    try:
        assert start.fatal == []
        (served,) = start.loaded
        assert start.lifecycle.ready
        assert start.lifecycle.loaded() is served
        assert start.lifecycle.stuck() is None
        limits = served.batcher.limits
        assert (limits.runners, limits.batch_rows, limits.batch_tokens, limits.queue_rows) == (2, 3, 30, 9)
        assert (limits.delay_seconds, limits.max_wait_seconds, limits.runner_timeout_seconds) == (0, 0.5, 30)
        assert limits.overhead_tokens == served.model.overhead_tokens
        assert start.sample("model_ready") == 1
        assert start.sample("inference_runners") == 2
        assert start.sample("inference_queue_rows") == 0
        labels = {"name": "test-model", "version": "7", "digest": served.model.artifact.digest}
        precision = served.model.artifact.manifest.precision
        assert start.sample("model_info", **labels, provider="cpu", precision=precision) == 1
        assert list(served.model.stage_seconds) == ["verifying", "loading", "warming"]
        for stage, seconds in served.model.stage_seconds.items():
            assert start.sample("model_load_seconds", stage=stage) == seconds
        start.lifecycle.drain()
        assert start.sample("model_ready") == 0
    finally:
        start.lifecycle.close()


async def test_a_drain_during_the_gate_is_not_undone_when_the_model_passes(
    monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    start, held = Start(artifact), HeldGate(monkeypatch)
    start.lifecycle.load(start._loaded)
    gate = held.thread()
    start.lifecycle.drain()
    held.opened.set()
    await asyncio.to_thread(gate.join, PATIENCE_SECONDS)
    assert held.passed
    await asyncio.sleep(0)
    assert (start.loaded, start.fatal, start.lifecycle.stage) == ([], [], "draining")
    assert start.sample("model_ready") == 0


async def test_a_model_that_does_not_pass_is_fatal_with_its_reason() -> None:
    start = Start(Path("/nowhere"))
    await start.ended()
    (error,) = start.fatal
    assert isinstance(error, ArtifactError)
    assert "/nowhere: model folder not found" in str(error)
    assert start.fatal_thread == "gate"
    assert not start.lifecycle.ready
    assert start.sample("model_ready") == 0


async def test_whatever_the_gate_did_not_foresee_is_fatal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no\nmore")

    monkeypatch.setattr(module, "load_configured", fail)
    start = Start(Path("/models/mine"))
    await start.ended()
    assert [str(error) for error in start.fatal] == ["/models/mine: the gate failed: MemoryError: no more"]
    assert isinstance(start.fatal[0], ArtifactError)


async def test_runners_that_cannot_start_are_fatal_by_their_setting(
    monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    def fail(_: Batcher) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Batcher, "start", fail)
    start = Start(artifact, runners=1024)
    await start.ended()
    assert [type(error) for error in start.fatal] == [ConfigError]
    assert str(start.fatal[0]) == "APP_RUNNERS=1024: cannot start so many: can't start new thread"
    assert start.loaded == []


async def test_stages_of_the_gate_are_those_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    start, seen = Start(), []

    def stages(*_: Any, on_stage: Callable[[str], None], **__: Any) -> None:
        for stage in ("verifying", "loading", "warming"):
            on_stage(stage)
            seen.append(start.lifecycle.stage)
        raise ProviderError("no CUDA")

    monkeypatch.setattr(module, "load_configured", stages)
    await start.ended()
    assert seen == ["verifying", "loading", "warming"]
    assert start.fatal[0].exit_code == 4


def test_a_gate_that_passes_after_the_loop_has_closed_is_quiet(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    start, held = Start(artifact), HeldGate(monkeypatch)

    async def leave() -> threading.Thread:
        start.lifecycle.load(start._loaded)
        return held.thread()

    gate = asyncio.run(leave())
    held.opened.set()
    gate.join(PATIENCE_SECONDS)
    # A thread that raises would be reported by pytest as an error.
    assert held.passed
    assert (start.loaded, start.fatal) == ([], [])


# --- the end of the process -------------------------------------------------------------------------------------------


class Exited(BaseException):
    pass


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Exit codes of a process that would have ended; its termination log is in `tmp_path`."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Exited

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(module, "TERMINATION_LOG", tmp_path / "termination-log")
    return codes


def test_the_end_has_its_code_and_one_line_on_stderr_and_in_the_termination_log(
    exits: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "termination-log").touch()
    with pytest.raises(Exited):
        exit_process(ArtifactError("model\nnot found"))
    assert exits == [3]
    assert capsys.readouterr().err == "sentiment-inference: model not found\n"
    assert (tmp_path / "termination-log").read_text() == "sentiment-inference: model not found"


def test_a_termination_log_is_written_only_where_there_is_one(exits: list[int], tmp_path: Path) -> None:
    with pytest.raises(Exited):
        exit_process(ConfigError("wrong"))
    assert exits == [2]
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_nobody_can_read_does_not_hide_the_code(
    exits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> None:
        raise BrokenPipeError

    (tmp_path / "termination-log").mkdir()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=broken, flush=lambda: None))
    with pytest.raises(Exited):
        exit_process(ConfigError("wrong"))
    assert exits == [2]


def test_work_that_cannot_start_ends_the_process_and_other_work_returns(exits: list[int]) -> None:
    def fail() -> None:
        raise ConfigError("wrong")

    assert or_exit(int, "7", base=8) == 7
    with pytest.raises(Exited):
        or_exit(fail)
    assert exits == [2]
