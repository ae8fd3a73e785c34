"""What a model predicts, as series: a bounded number of them, there from the start, beside the reference."""

from prometheus_client import CollectorRegistry

from app.telemetry.metrics import MOST_LABELS, OTHER_LABELS, Metrics, PredictionCounter

MANY = [f"label {number}" for number in range(MOST_LABELS + 3)]


def values(registry: CollectorRegistry, name: str) -> dict[str, float]:
    """By label."""
    return {
        sample.labels.get("label", ""): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_every_label_is_there_with_0_before_anything_is_predicted() -> None:
    metrics = Metrics(())
    PredictionCounter(metrics, ["no", "yes"])

    assert values(metrics.registry, "inference_predictions_total") == {"no": 0, "yes": 0}
    assert values(metrics.registry, "model_reference_prediction_ratio") == {}


def test_each_prediction_counts_for_its_label_and_in_the_histogram_of_scores() -> None:
    metrics = Metrics(())
    counter = PredictionCounter(metrics, ["no", "yes"])
    counter.count([("yes", 0.93), ("no", 0.6), ("yes", 1.000001)])
    counter.count([])

    assert values(metrics.registry, "inference_predictions_total") == {"no": 1, "yes": 2}
    found = {
        sample.labels["le"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "inference_prediction_score_bucket"
    }
    assert (found["0.5"], found["0.6"], found["0.95"], found["1.0"], found["+Inf"]) == (0, 1, 2, 2, 3)


def test_labels_beyond_the_most_are_counted_and_expected_as_one() -> None:
    metrics = Metrics(())
    counter = PredictionCounter(metrics, MANY)
    counter.count([(MANY[0], 0.5), (MANY[-1], 0.5), (MANY[-2], 0.5)])
    counter.expect({MANY[0]: 0.5, MANY[-1]: 0.25, MANY[-3]: 0.25})

    shown = [*MANY[:MOST_LABELS], OTHER_LABELS]
    counted = values(metrics.registry, "inference_predictions_total")
    expected = values(metrics.registry, "model_reference_prediction_ratio")
    assert list(counted) == list(expected) == shown
    assert {label: count for label, count in counted.items() if count} == {MANY[0]: 1, OTHER_LABELS: 2}
    assert {label: ratio for label, ratio in expected.items() if ratio} == {MANY[0]: 0.5, OTHER_LABELS: 0.5}


def test_a_label_that_no_manifest_has_fails_no_request() -> None:
    metrics = Metrics(())
    PredictionCounter(metrics, ["no", "yes"]).count([("maybe", 0.5)])

    assert values(metrics.registry, "inference_predictions_total") == {"no": 0, "yes": 0, OTHER_LABELS: 1}


def test_a_model_without_labels_has_no_series() -> None:
    metrics = Metrics(())
    PredictionCounter(metrics, [])

    assert values(metrics.registry, "inference_predictions_total") == {}
    assert values(metrics.registry, "inference_prediction_score_count") == {"": 0}
