"""The use case without HTTP: texts and tensors in, predictions out, books kept."""

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from app.artifact.datatypes import Tensors
from app.batching.admission import Limits
from app.batching.batcher import Batcher
from app.errors import DeadlineExceeded, Invalid, NotFound, RunFailed, TooManyRows, Unavailable
from app.lifecycle import count_batch
from app.predictor import Predictor, Usage
from app.runtime.loading import load_model
from app.runtime.session import Model
from app.runtime.tasks import Encoded
from app.runtime.tasks.answers import Label
from app.runtime.tasks.tensors import TensorTask
from app.runtime.tasks.text import QUICK_CHARACTERS
from app.runtime.tasks.text_classification import TextClassification
from app.telemetry.metrics import Metrics
from model.package import package_text
from tests import onnx_models

WORDS = ("[PAD]", "[UNK]", "sun", "rain", "wind", "snow", "fog", "hail", "frost", "dew")
LABELS = ["dry", "wet", "cold"]
MAX_TOKENS = 12
LIMITS = Limits(runners=1, batch_rows=4, batch_tokens=64, queue_rows=16)
# Only ends a test that hangs.
PATIENCE_SECONDS = 60


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


class WatchedTask(TextClassification):
    """Notes in which thread it tokenises."""

    threads: list[int]

    def encode(self, inputs: Sequence[str]) -> list[Encoded]:
        self.threads.append(threading.get_ident())
        return super().encode(inputs)


def watched(model: Model) -> tuple[Model, WatchedTask]:
    task = WatchedTask(model.artifact, model.batch_rows)
    task.threads = []
    return replace(model, task=task), task


class Observed(Predictor):
    """A predictor whose metrics can be read."""

    def __init__(self, model: Model) -> None:
        self.metrics = Metrics(())
        batcher = Batcher(model.run, LIMITS, model.tokens_per_second, partial(count_batch, self.metrics))
        super().__init__(model, batcher, self.metrics)

    @property
    def waiting(self) -> int:
        return self.batcher.state().rows


@asynccontextmanager
async def serving(model: Model) -> AsyncIterator[Observed]:
    predictor = Observed(model)
    predictor.batcher.start()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield predictor
    finally:
        if isinstance(model, HeldModel):
            model.opened.set()
        predictor.batcher.close(PATIENCE_SECONDS)


async def classify(predictor: Predictor, texts: list[str], deadline: float, usage: Usage) -> list[Label]:
    """What /predict answers."""
    return await predictor.run(texts, predictor.model.task.predictions, deadline, usage)


def sample(predictor: Observed, metric: str, **labels: str) -> float | None:
    return predictor.metrics.registry.get_sample_value(metric, labels)


async def entered(model: HeldModel) -> None:
    await asyncio.to_thread(model.entered.wait, PATIENCE_SECONDS)


# --- texts ------------------------------------------------------------------------------------------------------------


async def test_each_text_gets_its_likeliest_label_in_order(text_model: Model) -> None:
    texts = ["sun", "rain rain", "snow fog wind", "hail", "dew frost sun rain", "an unknown word", "wind"]
    async with serving(text_model) as predictor:
        together = await classify(predictor, texts, later(), Usage())
        alone = [(await classify(predictor, [text], later(), Usage()))[0] for text in texts]
    assert len({prediction.label for prediction in together}) > 1
    for text, one, many in zip(texts, alone, together, strict=True):
        expected = text_model.run([text_model.task.encode([text])[0].payload])[0]
        assert one.label == many.label == LABELS[int(np.argmax(expected))]
        assert one.score == pytest.approx(float(max(expected)), abs=1e-5)
        assert many.score == pytest.approx(one.score, abs=1e-5)
        assert float(expected.sum()) == pytest.approx(1, abs=1e-5)


async def test_labels_are_counted_of_what_was_answered_in_whatever_shape(text_model: Model) -> None:
    texts = ["sun", "rain rain", "snow fog wind"]
    tensors = {"text": np.array(texts, np.object_)}
    async with serving(text_model) as predictor:
        found = [each.label for each in await classify(predictor, texts, later(), Usage())]
        found += (await predictor.infer(tensors, later(), Usage()))["label"].tolist()
        found += await predictor.run(texts, lambda *_: found[:3], later(), Usage())
        with pytest.raises(Invalid):
            await classify(predictor, ["sun", " "], later(), Usage())
    for label in LABELS:
        assert sample(predictor, "inference_predictions_total", label=label) == found.count(label)
    assert sample(predictor, "inference_prediction_score_count") == len(found) == 9


async def test_a_text_longer_than_the_window_is_cut_and_flagged(text_model: Model) -> None:
    exact, longer = " ".join(["sun"] * MAX_TOKENS), " ".join(["sun"] * MAX_TOKENS + ["rain"])
    async with serving(text_model) as predictor:
        usage = Usage()
        fitting, cut = await classify(predictor, [exact, longer], later(), usage)
    assert (fitting.truncated, cut.truncated) == (False, True)
    assert cut.score == fitting.score
    assert usage.tokens == 2 * MAX_TOKENS


async def test_a_text_that_may_not_be_cut_is_invalid_and_waits_for_nothing(text_model: Model) -> None:
    def answer(units: Sequence[Encoded], results: Sequence[Any]) -> list[int]:
        return [unit.length for unit in units]

    exact, longer = " ".join(["sun"] * MAX_TOKENS), " ".join(["sun"] * MAX_TOKENS + ["rain"])
    async with serving(text_model) as predictor:
        with pytest.raises(Invalid, match="longer than the model's window"):
            await predictor.run([exact, longer], answer, later(), Usage(), truncate=False)
        assert predictor.metrics.statistics.failed == predictor.waiting == 0
        assert await predictor.run([exact], answer, later(), Usage(), truncate=False) == [MAX_TOKENS]


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u2003\u00a0"])
async def test_a_blank_text_is_invalid_by_its_place(text_model: Model, blank: str) -> None:
    async with serving(text_model) as predictor:
        with pytest.raises(Invalid, match="text 1"):
            await classify(predictor, ["sun", blank], later(), Usage())
        assert predictor.waiting == 0


async def test_a_lone_surrogate_is_invalid(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        with pytest.raises(Invalid, match="surrogates"):
            await classify(predictor, ["sun \ud800"], later(), Usage())


async def test_long_texts_are_tokenised_beside_the_event_loop_and_short_ones_on_it(text_model: Model) -> None:
    model, task = watched(text_model)
    async with serving(model) as predictor:
        await classify(predictor, ["sun"], later(), Usage())
        assert task.threads == [threading.get_ident()]
        await classify(predictor, ["rain " * QUICK_CHARACTERS], later(), Usage())
        assert task.threads[1] != threading.get_ident()


async def test_what_the_queue_can_never_hold_is_not_even_tokenised(text_model: Model) -> None:
    model, task = watched(text_model)
    async with serving(model) as predictor:
        with pytest.raises(TooManyRows):
            await classify(predictor, ["sun"] * 17, later(), Usage())
        assert task.threads == []


async def test_what_finds_no_room_is_refused_at_the_door_and_behind_it(text_model: Model) -> None:
    model = held(text_model)
    async with serving(model) as predictor:
        predictor.batcher.admission.admit()
        filling = [asyncio.create_task(classify(predictor, ["sun"] * 15, later(), Usage()))]
        await entered(model)
        filling.append(asyncio.create_task(classify(predictor, ["sun"] * 5, later(), Usage())))
        await asyncio.sleep(0)
        for ask in (predictor.batcher.admission.admit, lambda: predictor.batcher.submit([Encoded([2], 1)], later())):
            with pytest.raises(Unavailable) as caught:
                ask()
            assert caught.value.reason == "queue_full"
        with pytest.raises(Unavailable) as caught:
            await classify(predictor, ["rain"], later(), Usage())
        assert caught.value.reason == "queue_full"
        model.opened.set()
        assert [len(answer) for answer in await asyncio.gather(*filling)] == [15, 5]
        assert (predictor.metrics.statistics.succeeded, predictor.metrics.statistics.failed) == (2, 0)


async def test_a_request_ends_at_its_deadline(text_model: Model) -> None:
    async with serving(held(text_model)) as predictor:
        usage = Usage()
        with pytest.raises(DeadlineExceeded):
            await classify(predictor, ["sun"], later(0.01), usage)
        assert (usage.rows, usage.tokens) == (1, 1)
        assert predictor.metrics.statistics.failed == 1


async def test_giving_up_frees_the_queue(text_model: Model) -> None:
    model = held(text_model)
    async with serving(model) as predictor:
        running = asyncio.create_task(classify(predictor, ["sun"], later(), Usage()))
        await entered(model)
        waiting = asyncio.create_task(classify(predictor, ["rain", "snow"], later(), Usage()))
        await asyncio.sleep(0)
        assert predictor.waiting == 2
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        model.opened.set()
        await running
        while predictor.waiting:
            await asyncio.sleep(0.001)
        assert sample(predictor, "inference_batch_rows_sum") == 1


# --- tensors ----------------------------------------------------------------------------------------------------------


async def test_tensors_of_more_rows_than_a_run_come_back_as_one(mlp_model: Model) -> None:
    features = np.random.default_rng(0).standard_normal((11, 4), np.float32)
    expected = mlp_model.infer({"features": features})["scores"]
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
        expected = mlp_model.infer({"features": rows})["scores"]
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
        assert (predictor.metrics.statistics.succeeded, predictor.metrics.statistics.failed) == (2, 1)


async def test_more_rows_of_tensors_than_the_queue_can_ever_hold_are_refused(mlp_model: Model) -> None:
    async with serving(mlp_model) as predictor:
        with pytest.raises(TooManyRows):
            await predictor.infer({"features": np.zeros((17, 4), np.float32)}, later(), Usage())


async def test_a_text_model_answers_texts_that_come_as_tensors_as_it_answers_others(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        expected = await classify(predictor, ["sun", "rain"], later(), Usage())
        outputs = await predictor.infer({"text": np.array([b"sun", b"rain"], object)}, later(), Usage())
    assert outputs["label"].tolist() == [each.label for each in expected]
    assert outputs["score"].tolist() == pytest.approx([each.score for each in expected])
    assert outputs["probabilities"].shape == (2, len(LABELS))


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
            await classify(predictor, texts, later(), usage)
        with pytest.raises(Invalid):
            await classify(predictor, [""], later(), Usage())
        statistics = predictor.metrics.statistics
        assert [(usage.rows, usage.tokens) for usage in usages] == [(1, 1), (2, 3), (1, 3)]
        assert all(usage.queue_seconds > 0 and usage.inference_seconds > 0 for usage in usages)
        assert (statistics.succeeded, statistics.failed, statistics.rows) == (3, 0, 4)
        assert statistics.queue_seconds == pytest.approx(sum(usage.queue_seconds for usage in usages))
        assert statistics.inference_seconds == pytest.approx(sum(usage.inference_seconds for usage in usages))
        parts = ("input_seconds", "queue_seconds", "inference_seconds", "output_seconds")
        seconds = [getattr(statistics, part) for part in parts]
        assert min(seconds) > 0
        assert statistics.succeeded_seconds >= sum(seconds)
        assert statistics.runs == sample(predictor, "inference_run_seconds_count")
        assert sample(predictor, "inference_batch_rows_sum") == 4


async def test_results_of_many_megabytes_are_joined_in_a_thread_and_small_ones_on_the_loop(mlp_model: Model) -> None:
    task, threads = copy.copy(mlp_model.task), list[int]()

    def respond(units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        threads.append(threading.get_ident())
        return TensorTask.respond(task, units, results)

    def run(payloads: Sequence[Any]) -> list[Any]:
        return [{"scores": np.zeros((len(unit["features"]), 1 << 16), np.float32)} for unit in payloads]

    task.respond = respond
    model = replace(mlp_model, task=task)
    async with serving(model) as predictor:
        predictor.batcher._run = run
        for rows in (1, 16):
            found = await predictor.infer({"features": np.zeros((rows, 4), np.float32)}, later(), Usage())
            assert found["scores"].shape == (rows, 1 << 16)
    assert threads[0] == threading.get_ident() != threads[1]


async def test_tokens_are_counted_as_real_and_as_padding(text_model: Model) -> None:
    async with serving(text_model) as predictor:
        await classify(predictor, ["sun sun sun sun sun", "rain", "snow snow"], later(), Usage())
        assert sample(predictor, "inference_tokens_total", kind="real") == 8
        assert sample(predictor, "inference_tokens_total", kind="padding") == 3 * 5 - 8
