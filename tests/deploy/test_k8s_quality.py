"""The alert on drift: under promtool with hours of predictions, and with a real Prometheus at a real server."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from loadtest.benchmark.server import free_port
from tests.deploy.test_k8s_prometheus import Prometheus, start
from tests.deploy.test_k8s_rules import (
    QUALITY_RULES,
    Object,
    alerts,
    evaluated,
    identifiers,
    known_samples,
    promtool,
    recorded,
    rules,
)
from tests.manifests import K8S, tool
from tests.process import ServerProcess
from tests.text_model import text_model

ALERT, INDEX = "InferencePredictionDrift", "namespace_track:inference_prediction_stability:index6h"
FIRING = f'ALERTS{{alertname="{ALERT}",alertstate="firing"}}'
HALF, SURE = {"negative": 0.5, "positive": 0.5}, {"negative": 0.01, "positive": 0.99}
# Of an hour: samples and evaluations are five minutes apart.
STEPS = 12
# Hours, and predictions in each step.
Segment = tuple[float, int]


def predictions(
    labels: dict[str, Sequence[Segment]], pod: str = "p1", track: str = "stable", *, start_hours: float = 0
) -> dict[str, str]:
    """What a Pod counts for each label, one segment after another, from `start_hours` on; then it is gone."""
    found = {}
    for label, segments in labels.items():
        values, total = ["_"] * int(start_hours * STEPS) + ["0"], 0
        for hours, per_step in segments:
            for _ in range(int(hours * STEPS)):
                total += per_step
                values.append(str(total))
        series = f'inference_predictions_total{{{placed(pod, track)},label="{label}"}}'
        found[series] = " ".join([*values, "stale"])
    return found


def reference(
    ratios: dict[str, float], pod: str = "p1", track: str = "stable", *, hours: float = 16, start_hours: float = 0
) -> dict[str, str]:
    before, after = int(start_hours * STEPS), int((hours - start_hours) * STEPS)
    waits = f"_x{before} " if before else ""
    return {
        f'model_reference_prediction_ratio{{{placed(pod, track)},label="{label}"}}': f"{waits}{ratio}x{after} stale"
        for label, ratio in ratios.items()
    }


def placed(pod: str, track: str) -> str:
    return f'namespace="prod",pod="{pod}"' + (f',track="{track}"' if track else "")


def another_service(series: dict[str, str]) -> dict[str, str]:
    """The same in a Pod of another one."""
    return {
        name.replace('pod="p1"', 'pod="o1",app_kubernetes_io_part_of="other"'): values
        for name, values in series.items()
    }


MIXED = predictions({"negative": [(16, 50)], "positive": [(16, 50)]})
STABLE = MIXED | reference(HALF)


@dataclass
class Case:
    """Series over hours, and at which of these the alert is firing, for which tracks."""

    why: str
    series: dict[str, str]
    fires: dict[float, list[str]]
    # Whether there is anything to compare.
    compared: bool = True

    def __str__(self) -> str:
        return self.why


CASES = [
    Case("mixed traffic, as in the reference", STABLE, {1: [], 7: [], 15: []}),
    Case(
        "only negative texts for six hours, and mixed ones before and after",
        predictions({"negative": [(7, 50), (6, 100), (3, 50)], "positive": [(7, 50), (6, 0), (3, 50)]})
        | reference(HALF),
        {7: [], 9: [], 10.5: ["stable"], 13: ["stable"], 14: [], 16: []},
    ),
    Case(
        "an hour of negative texts, as of one client's burst",
        predictions({"negative": [(7, 50), (1, 100), (8, 50)], "positive": [(7, 50), (1, 0), (8, 50)]})
        | reference(HALF),
        {7.5: [], 8: [], 8.5: [], 9: []},
    ),
    Case(
        "negative texts, and then nobody asks any more",
        predictions({"negative": [(7, 100), (8, 0)], "positive": [(15, 0)]}) | reference(HALF),
        {7: ["stable"], 9: [], 15: []},
    ),
    Case(
        "a canary with few requests, all negative",
        STABLE
        | predictions({"negative": [(1, 10), (15, 0)], "positive": [(16, 0)]}, "p2", "canary")
        | reference(HALF, "p2", "canary"),
        {0.5: [], 1: [], 6: []},
    ),
    Case(
        "a canary with as many as it takes, all negative, beside stable Pods that are well",
        STABLE
        | predictions({"negative": [(16, 5)], "positive": [(16, 0)]}, "p2", "canary")
        | reference(HALF, "p2", "canary"),
        {3: [], 5: ["canary"], 15: ["canary"]},
    ),
    Case(
        "a label that is rare in the reference has no traffic",
        predictions({"negative": [(16, 50)], "positive": [(16, 50)], "neutral": [(16, 0)]})
        | reference({"negative": 0.49, "positive": 0.49, "neutral": 0.02}),
        {7: [], 15: []},
    ),
    Case(
        "a label that is common in the reference has no traffic",
        predictions({"negative": [(16, 50)], "positive": [(16, 50)], "neutral": [(16, 0)]})
        | reference({"negative": 0.3, "positive": 0.3, "neutral": 0.4}),
        {7: ["stable"]},
    ),
    Case(
        "a label with much traffic is not in the reference",
        predictions({"negative": [(16, 50)], "positive": [(16, 50)], "neutral": [(16, 50)]}) | reference(HALF),
        {7: ["stable"]},
    ),
    Case(
        "a model without labels",
        {f"inference_prediction_score_count{{{placed('p1', 'stable')}}}": "0x192"},
        {1: [], 15: []},
        compared=False,
    ),
    Case(
        "a model without a reference",
        predictions({"negative": [(16, 100)], "positive": [(16, 0)]}),
        {1: [], 15: []},
        compared=False,
    ),
    Case(
        "nobody asks",
        predictions({"negative": [(16, 0)], "positive": [(16, 0)]}) | reference(HALF),
        {1: [], 15: []},
        compared=False,
    ),
    Case(
        "workers have only negative texts",
        STABLE | predictions({"negative": [(16, 100)], "positive": [(16, 0)]}, "w1", "") | reference(HALF, "w1", ""),
        {7: [], 15: []},
    ),
    Case(
        "another service made from the same starter has only negative texts, and another reference",
        STABLE | another_service(predictions({"negative": [(16, 100)], "positive": [(16, 0)]}) | reference(SURE)),
        {7: [], 15: []},
    ),
    Case(
        "another model, whose labels are distributed otherwise, is rolled out",
        predictions({"negative": [(8, 100)], "positive": [(8, 0)]})
        | reference({"negative": 0.99, "positive": 0.01}, hours=8)
        | predictions({"negative": [(8, 0)], "positive": [(8, 100)]}, "p2", start_hours=8)
        | reference(SURE, "p2", start_hours=8),
        {7: [], 8.25: [], 8.5: [], 9: [], 14: []},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_alert_fires_as_long_as_predictions_are_not_the_references(case: Case, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": rules(QUALITY_RULES)}))

    def firing(track: str) -> Object:
        name = f'alertname="{ALERT}",alertstate="firing",namespace="prod",severity="warning",track="{track}"'
        return {"labels": f"ALERTS{{{name}}}", "value": 1}

    checks = [
        {"expr": FIRING, "eval_time": f"{round(hours * 60)}m", "exp_samples": [firing(track) for track in tracks]}
        for hours, tracks in case.fires.items()
    ]
    if not case.compared:
        checks += [{"expr": INDEX, "eval_time": f"{round(hours * 60)}m", "exp_samples": []} for hours in case.fires]
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "5m",
        "group_eval_order": evaluated(rules(QUALITY_RULES)),
        "tests": [{"interval": "5m", "input_series": series, "promql_expr_test": checks}],
    }
    (tmp_path / "test.yaml").write_text(json.dumps(test))

    promtool("test", "rules", tmp_path / "test.yaml")


def test_the_rules_are_sound_and_ask_for_what_exists(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": rules(QUALITY_RULES)}))
    promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yaml")

    known = known_samples().keys() | recorded(QUALITY_RULES).keys()
    for rule in [*recorded(QUALITY_RULES).values(), *alerts(QUALITY_RULES).values()]:
        assert identifiers(rule["expr"]) <= known


def test_the_alert_says_what_to_do_and_where_that_is_written() -> None:
    (alert,) = alerts(QUALITY_RULES).values()
    assert alert["labels"]["severity"] == "warning"
    assert alert["annotations"].keys() == {"summary", "description", "runbook"}
    assert alert["annotations"]["runbook"] == f"k8s/README.md#{ALERT.lower()}"
    assert f"\n### {ALERT}\n" in (K8S / "README.md").read_text()


# --- a real Prometheus at a real server -------------------------------------------------------------------------------

# Hours of the shipped rules, and seconds that do here.
SHORTER = {"[1h]": "[4s]", "[6h]": "[10s]", '"15m"': '"0s"'}
NEGATIVE, POSITIVE = "an awful day", "a lovely day"


@contextmanager
def asking(url: str, texts: list[str]) -> Iterator[None]:
    """Asks for the predictions of these, over and over."""
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url) as client:
            while not stop.wait(0.1):
                client.post("/predict/batch", json={"texts": texts}).raise_for_status()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_server_fed_only_negative_texts_raises_the_alert_and_mixed_traffic_does_not(tmp_path: Path) -> None:
    binary = tool("prometheus", "apt-get install prometheus")
    text = json.dumps({"groups": rules(QUALITY_RULES)})
    for shipped, short in SHORTER.items():
        assert shipped in text
        text = text.replace(shipped, short)
    (tmp_path / "rules.yaml").write_text(text)
    with ServerProcess(text_model(reference=True)) as server:
        server.ready()
        labels = {"namespace": "prod", "pod": "p1", "track": "stable"}
        target = {"targets": [f"127.0.0.1:{server.port}"], "labels": labels}
        configuration = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "pods", "static_configs": [target]}],
        }
        (tmp_path / "prometheus.yaml").write_text(json.dumps(configuration))
        port = free_port()
        process = start(binary, tmp_path, port)
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            enough = "sum(namespace_track_label:inference_predictions:increase6h) > 1000"
            with asking(server.url, [NEGATIVE, POSITIVE] * 50):
                prometheus.wait_for(f"{enough} and on () {INDEX} < 0.1")
                assert prometheus.query(FIRING) == []
            with asking(server.url, [NEGATIVE] * 100):
                ((found, _),) = prometheus.wait_for(FIRING)
                assert (found["namespace"], found["track"]) == ("prod", "stable")
            with asking(server.url, [NEGATIVE, POSITIVE] * 50):
                prometheus.wait_for(f"{enough} and on () {INDEX} < 0.1 unless on () {FIRING}")
        finally:
            process.terminate()
            process.wait()
