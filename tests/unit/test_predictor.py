"""The use case without HTTP: the stages of the service, texts and tensors in, predictions out, books kept."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from app.batching.admission import Limits
from app.errors import DeadlineExceeded, Invalid, NotFound, RunFailed, TooManyRows, Unavailable
from app.predictor import MAX_INLINE_CHARACTERS, Predictor, Usage
from app.runtime.loading import load_model
from app.runtime.model import Model
from app.runtime.tasks.task import Encoded, TextTask
from app.telemetry.metrics import Metrics
from model.package import package_text
from tests import onnx_models

WORDS = ("[PAD]", "[UNK]", "sun", "rain", "wind", "snow", "fog", "hail", "frost", "dew")
LABELS = ["dry", "wet", "cold"]
MAX_TOKENS = 12
LIMITS = Limits(runners=1, batch_rows=4, batch_tokens=64, queue_rows=16)
# Only ends a test that hangs.
PATIENCE_SECONDS = 30


def later(seconds: float = 3600.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small classifier with three labels and a vocabulary of weather, through the gate."""
    root = tmp_path_factory.mktemp("weather")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    folder = root / "artifact"
    folder.mkdir()
    package_text(
        onnx_models.classifier(root / "source.onnx", labels=3, tokens=len(WORDS)),
        root / "tokenizer.json",
        folder,
        name="weather",
        version="3",
        labels=LABELS,
        max_tokens=MAX_TOKENS,
        scores="logits",
        tolerance=1e-4,
        texts=["sun", "rain and snow", "fog then frost"],
    )
    return load_model(folder, max_batch_rows=4, max_batch_tokens=64)


@pytest.fixture(scope="module")
def lookup_model(package: Callable[..., Path]) -> Model:
    """Index in, the index as a float out; an index of 10 or more makes the run fail."""
    return load_model(package(onnx_models.lookup), max_batch_rows=4)


@pytest.fixture(scope="module")
def mlp_model(package: Callable[..., Path]) -> Model:
    return load_model(package(onnx_models.mlp), max_batch_rows=4)


class HeldModel(Model):
    """The model it was made of, but every run waits until the test opens it."""

    def hold(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def run(self, payloads: Sequence[Any]) -> list[Any]:
        self.entered.set()
        self.opened.wait(PATIENCE_SECONDS)
        return Model.run(self, payloads)


def held(model: Model) -> HeldModel:
    copy = HeldModel(**{item.name: getattr(model, item.name) for item in fields(Model)})
    copy.hold()
    return copy


class WatchedTask(TextTask):
    """Notes in which thread it tokenises."""

    threads: list[int]

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        self.threads.append(threading.get_ident())
        return super().encode(texts)


def watched(model: Model) -> tuple[Model, WatchedTask]:
    task = WatchedTask(model.artifact)
    task.threads = []
    return replace(model, task=task), task


class Observed(Predictor):
    """A predictor whose metrics can be read."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        super().__init__(self.metrics)


@asynccontextmanager
async def serving(model: Model, limits: Limits = LIMITS) -> AsyncIterator[Observed]:
    predictor = Observed()
    predictor.serve(model, limits)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield predictor
    finally:
        if isinstance(model, HeldModel):
            model.opened.set()
        predictor.close()


def sample(predictor: Observed, metric: str, **labels: str) -> float | None:
    return predictor.metrics.registry.get_sample_value(metric, labels)


async def entered(model: HeldModel) -> None:
    await asyncio.to_thread(model.entered.wait, PATIENCE_SECONDS)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_before_the_gate_has_passed_a_model_nothing_is_answered() -> None:
    predictor = Predictor(Metrics())
    assert not predictor.ready
    assert predictor.stuck() is None
    predictor.stage = "warming"
    with pytest.raises(Unavailable, match="warming") as caught:
        predictor.require_ready()
    assert (caught.value.reason, caught.value.close) == ("not_ready", False)
    with pytest.raises(Unavailable):
        predictor.loaded()
    with pytest.raises(Unavailable):
        predictor.named("weather", None)


async def test_classifying_before_there_is_a_model_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await Predictor(Metrics()).classify(["sun"], later(), Usage())


async def test_serving_says_so_and_says_what(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        assert predictor.ready
        predictor.require_ready()
        assert predictor.stuck() is None
        assert sample(predictor, "model_ready") == 1
        assert sample(predictor, "inference_runners") == 1
        labels = {"name": "weather", "version": "3", "digest": text_model.artifact.digest}
        assert sample(predictor, "model_info", **labels, provider="cpu", precision="fp32") == 1
        for stage, seconds in text_model.stage_seconds.items():
            assert sample(predictor, "model_load_seconds", stage=stage) == seconds


async def test_a_loop_that_is_behind_makes_requests_wait_before_the_queue_does(text_model: Model) -> None:
    model = held(text_model)
    async with serving(model, replace(LIMITS, max_wait_seconds=60)) as predictor:
        predictor._lag.stop()
        predictor._lag.seconds = 61
        # Nobody waits: it is worth a try.
        predictor.admit()
        answers = [asyncio.create_task(predictor.classify(["sun"], later(), Usage()))]
        await entered(model)
        predictor.admit()
        answers.append(asyncio.create_task(predictor.classify(["moon"], later(), Usage())))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as caught:
            predictor.admit()
        assert caught.value.reason == "queue_full"
        assert caught.value.retry_after_seconds > 60
        predictor._lag.seconds = 1
        predictor.admit()
        model.opened.set()
        await asyncio.gather(*answers)


async def test_draining_refuses_the_new_and_finishes_the_accepted(text_model: Model) -> None:
    model = held(text_model)
    async with serving(model) as predictor:
        accepted = asyncio.create_task(predictor.classify(["sun"], later(), Usage()))
        await entered(model)
        predictor.drain()
        assert not predictor.ready
        assert sample(predictor, "model_ready") == 0
        with pytest.raises(Unavailable) as caught:
            predictor.require_ready()
        assert (caught.value.reason, caught.value.close) == ("draining", True)
        model.opened.set()
        assert len(await accepted) == 1


async def test_what_was_accepted_before_the_drain_may_still_be_queued_after_it(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        predictor.require_ready()
        predictor.drain()
        # Its body took until now to arrive.
        assert len(await predictor.classify(["sun"], later(), Usage())) == 1


async def test_a_drain_during_the_gate_is_not_undone_when_the_model_passes(text_model: Model) -> None:
    predictor = Predictor(Metrics())
    predictor.drain()
    try:
        predictor.serve(text_model, LIMITS)
        assert not predictor.ready
    finally:
        predictor.close()


async def test_closing_ends_what_waits(text_model: Model) -> None:
    model = held(text_model)
    async with serving(model) as predictor:
        running = asyncio.create_task(predictor.classify(["sun"], later(), Usage()))
        await entered(model)
        waiting = asyncio.create_task(predictor.classify(["rain"], later(), Usage()))
        await asyncio.sleep(0)
        threading.Timer(0.05, model.opened.set).start()
        predictor.close()
        with pytest.raises(Unavailable):
            await waiting
        assert len(await running) == 1


def test_closing_before_there_is_a_model_is_fine() -> None:
    Predictor(Metrics()).close()


# --- texts ------------------------------------------------------------------------------------------------------------


async def test_each_text_gets_its_likeliest_label_in_order(text_model: Model) -> None:
    texts = ["sun", "rain rain", "snow fog wind", "hail", "dew frost sun rain", "an unknown word", "wind"]
    async with serving(text_model) as predictor:
        together = await predictor.classify(texts, later(), Usage())
        alone = [(await predictor.classify([text], later(), Usage()))[0] for text in texts]
    assert len({prediction.label for prediction in together}) > 1
    for text, one, many in zip(texts, alone, together, strict=True):
        expected = text_model.run([text_model.task.encode([text])[0].payload])[0]
        assert one.label == many.label == LABELS[int(np.argmax(expected))]
        assert one.score == pytest.approx(float(max(expected)), abs=1e-5)
        assert many.score == pytest.approx(one.score, abs=1e-5)
        assert float(one.probabilities.sum()) == pytest.approx(1, abs=1e-5)


async def test_a_text_longer_than_the_window_is_cut_and_flagged(text_model: Model) -> None:
    exact, longer = " ".join(["sun"] * MAX_TOKENS), " ".join(["sun"] * MAX_TOKENS + ["rain"])
    async with serving(text_model) as predictor:
        usage = Usage()
        fitting, cut = await predictor.classify([exact, longer], later(), usage)
    assert (fitting.truncated, cut.truncated) == (False, True)
    assert cut.score == fitting.score
    assert usage.tokens == 2 * MAX_TOKENS


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u2003\u00a0"])
async def test_a_blank_text_is_invalid_by_its_place(text_model: Model, blank: str) -> None:
    async with serving(text_model) as predictor:
        with pytest.raises(Invalid, match="text 1"):
            await predictor.classify(["sun", blank], later(), Usage())
        assert sample(predictor, "inference_queue_rows") == 0


async def test_a_lone_surrogate_is_invalid(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        with pytest.raises(Invalid, match="surrogates"):
            await predictor.classify(["sun \ud800"], later(), Usage())


async def test_long_texts_are_tokenised_beside_the_event_loop_and_short_ones_on_it(text_model: Model) -> None:
    model, task = watched(text_model)
    async with serving(model) as predictor:
        await predictor.classify(["sun"], later(), Usage())
        assert task.threads == [threading.get_ident()]
        await predictor.classify(["rain " * MAX_INLINE_CHARACTERS], later(), Usage())
        assert task.threads[1] != threading.get_ident()


async def test_what_cannot_be_queued_is_not_even_tokenised(text_model: Model) -> None:
    model, task = watched(text_model)
    async with serving(held(model)) as predictor:
        with pytest.raises(TooManyRows):
            await predictor.classify(["sun"] * 17, later(), Usage())
        filling = [asyncio.create_task(predictor.classify(["sun"] * 15, later(), Usage()))]
        await entered(predictor.loaded())
        filling.append(asyncio.create_task(predictor.classify(["sun"] * 5, later(), Usage())))
        await asyncio.sleep(0)
        tokenised = len(task.threads)
        with pytest.raises(Unavailable) as caught:
            await predictor.classify(["rain"], later(), Usage())
        assert caught.value.reason == "queue_full"
        assert len(task.threads) == tokenised == 2
        predictor.loaded().opened.set()
        assert [len(answer) for answer in await asyncio.gather(*filling)] == [15, 5]


async def test_a_request_ends_at_its_deadline(text_model: Model) -> None:
    async with serving(held(text_model)) as predictor:
        usage = Usage()
        with pytest.raises(DeadlineExceeded):
            await predictor.classify(["sun"], later(0.01), usage)
        assert (usage.rows, usage.tokens) == (1, 1)
        assert predictor.statistics.failed == 1


async def test_giving_up_frees_the_queue(text_model: Model) -> None:
    model = held(text_model)
    async with serving(model) as predictor:
        running = asyncio.create_task(predictor.classify(["sun"], later(), Usage()))
        await entered(model)
        waiting = asyncio.create_task(predictor.classify(["rain", "snow"], later(), Usage()))
        await asyncio.sleep(0)
        assert sample(predictor, "inference_queue_rows") == 2
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        model.opened.set()
        await running
        while sample(predictor, "inference_queue_rows"):
            await asyncio.sleep(0.001)
        assert sample(predictor, "inference_batch_rows_sum") == 1


# --- tensors ----------------------------------------------------------------------------------------------------------


async def test_tensors_of_more_rows_than_a_run_come_back_as_one(mlp_model: Model) -> None:
    features = np.random.default_rng(0).standard_normal((11, 4), np.float32)
    expected = mlp_model.session.run({"features": features})["scores"]
    async with serving(mlp_model) as predictor:
        usage = Usage()
        outputs = await predictor.infer({"features": features}, later(), usage)
        assert usage.rows == 11
        assert sample(predictor, "inference_batch_rows_sum") == 11
        assert sample(predictor, "inference_batch_rows_count") == 3
    np.testing.assert_allclose(outputs["scores"], expected, rtol=1e-5, atol=1e-6)


async def test_requests_that_share_runs_get_their_own_rows(mlp_model: Model) -> None:
    model = held(mlp_model)
    inputs = [np.full((rows, 4), rows, np.float32) for rows in (1, 2, 1, 3, 1)]
    async with serving(model) as predictor:
        tasks = [asyncio.create_task(predictor.infer({"features": rows}, later(), Usage())) for rows in inputs]
        await entered(model)
        model.opened.set()
        outputs = await asyncio.gather(*tasks)
    for rows, output in zip(inputs, outputs, strict=True):
        expected = mlp_model.session.run({"features": rows})["scores"]
        np.testing.assert_allclose(output["scores"], expected, rtol=1e-5, atol=1e-6)


async def test_a_row_the_model_fails_on_fails_its_own_request_alone(lookup_model: Model) -> None:
    model = held(lookup_model)
    async with serving(model) as predictor:
        blocker = asyncio.create_task(predictor.infer({"index": np.array([0])}, later(), Usage()))
        await entered(model)
        good, bad = (
            asyncio.create_task(predictor.infer({"index": np.array([index])}, later(), Usage())) for index in (7, 4711)
        )
        await asyncio.sleep(0)
        model.opened.set()
        await blocker
        with pytest.raises(RunFailed) as caught:
            await bad
        assert "4711" not in str(caught.value)
        assert (await good)["value"].tolist() == [7.0]
        assert (predictor.statistics.succeeded, predictor.statistics.failed) == (2, 1)


async def test_a_tensor_model_takes_no_texts(mlp_model: Model) -> None:
    async with serving(mlp_model) as predictor:
        with pytest.raises(NotFound, match="tensors"):
            await predictor.classify(["sun"], later(), Usage())


@pytest.mark.parametrize(("name", "version"), [("other", None), ("weather", "4"), ("other", "3"), ("", None)])
async def test_another_name_or_version_is_not_found_and_not_repeated(
    text_model: Model, name: str, version: str | None
) -> None:
    async with serving(text_model) as predictor:
        assert predictor.named("weather", None) is predictor.named("weather", "3") is text_model
        with pytest.raises(NotFound) as caught:
            predictor.named(name, version)
        assert "other" not in str(caught.value)


# --- books ------------------------------------------------------------------------------------------------------------


async def test_usage_and_statistics_add_up(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        usages = [Usage() for _ in range(3)]
        for usage, texts in zip(usages, (["sun"], ["rain snow", "fog"], ["wind wind wind"]), strict=True):
            await predictor.classify(texts, later(), usage)
        with pytest.raises(Invalid):
            await predictor.classify([""], later(), Usage())
        statistics = predictor.statistics
        assert [(usage.rows, usage.tokens) for usage in usages] == [(1, 1), (2, 3), (1, 3)]
        assert all(usage.queue_seconds > 0 and usage.inference_seconds > 0 for usage in usages)
        assert (statistics.succeeded, statistics.failed, statistics.rows) == (3, 0, 4)
        assert statistics.queue_seconds == pytest.approx(sum(usage.queue_seconds for usage in usages))
        assert statistics.inference_seconds == pytest.approx(sum(usage.inference_seconds for usage in usages))
        assert statistics.succeeded_seconds >= statistics.queue_seconds + statistics.inference_seconds
        assert statistics.runs == sample(predictor, "inference_run_seconds_count")
        assert sample(predictor, "inference_batch_rows_sum") == 4


async def test_tokens_are_counted_as_real_and_as_padding(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        await predictor.classify(["sun sun sun sun sun", "rain", "snow snow"], later(), Usage())
        assert sample(predictor, "inference_tokens_total", kind="real") == 8
        assert sample(predictor, "inference_tokens_total", kind="padding") == 3 * 5 - 8
