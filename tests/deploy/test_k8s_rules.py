"""Alerts and recording rules under promtool, each alert fired and not fired; every query asks for what exists."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from app.http.routes import LABELS
from app.telemetry.metrics import GpuMetrics, Metrics
from tests.manifests import K8S, Object, tool

# Of kube-state-metrics, which the monitoring component's header asks for.
CLUSTER_METRICS = {
    "kube_pod_container_status_last_terminated_exitcode",
    "kube_pod_container_status_restarts_total",
    "kube_horizontalpodautoscaler_status_desired_replicas",
    "kube_horizontalpodautoscaler_status_current_replicas",
    "kube_horizontalpodautoscaler_spec_max_replicas",
}
WORDS = {
    *("and", "or", "unless", "on", "by", "ignoring", "group_left", "group_right", "bool", "offset"),
    *("sum", "avg", "max", "min", "count", "rate", "increase", "histogram_quantile"),
    *("avg_over_time", "max_over_time", "absent_over_time"),
}
POD = 'namespace="prod",pod="p1"'
HPA = 'namespace="prod",horizontalpodautoscaler="sentiment-inference"'


def component(path: str) -> Object:
    """A file of the components, as it is: these are not changed by what else is applied."""
    return dict(yaml.safe_load((K8S / "components" / path).read_text()))


def rules() -> list[Object]:
    return list(component("monitoring/prometheusrule.yaml")["spec"]["groups"])


def alerts() -> dict[str, Object]:
    return {rule["alert"]: rule for group in rules() for rule in group["rules"] if "alert" in rule}


def recorded() -> dict[str, Object]:
    return {rule["record"]: rule for group in rules() for rule in group["rules"] if "record" in rule}


def dashboard() -> Object:
    return component("monitoring/dashboard.json")


def dashboard_queries() -> list[tuple[str, str]]:
    """Titles of panels and what they ask, with the variables filled in."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$namespace", ".*"))
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def adapter_rule() -> Object:
    (rule,) = component("autoscale-inflight/prometheus-adapter-values.yaml")["rules"]["custom"]
    return dict(rule)


def adapter_query(labels: str) -> str:
    """What prometheus-adapter would ask, with the Go template filled in as it does."""
    query = str(adapter_rule()["metricsQuery"])
    return query.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", labels)


def keda_query() -> str:
    patch = yaml.safe_load((K8S / "components" / "autoscale-keda" / "hpa-patch.yaml").read_text())
    (triggers,) = [each["value"] for each in patch if each["path"] == "/spec/triggers"]
    # As an overlay does.
    return str(triggers[0]["metadata"]["query"]).replace("NAMESPACE", "sentiment-inference")


def hpa_metric() -> str:
    return str(component("autoscale-inflight/hpa-patch.yaml")["spec"]["metrics"][0]["pods"]["metric"]["name"])


def queries() -> dict[str, str]:
    """Everything that asks Prometheus for something, by where it is."""
    return {
        **{f"alert {name}": rule["expr"] for name, rule in alerts().items()},
        **{f"record {name}": rule["expr"] for name, rule in recorded().items()},
        **{f"panel {number} {title}": query for number, (title, query) in enumerate(dashboard_queries())},
        "keda": keda_query(),
        "adapter": adapter_query('namespace="prod"'),
        "adapter series": adapter_rule()["seriesQuery"],
        "hpa": hpa_metric(),
    }


def known_samples() -> dict[str, set[str]]:
    """Sample names of the service's metrics, with the labels each has."""
    metrics = Metrics(LABELS)
    metrics.info.labels("n", "v", "d", "cpu", "int8")
    gpu_registry = CollectorRegistry()
    gpu = GpuMetrics(gpu_registry)
    for gauge in (gpu.utilization, gpu.memory_used, gpu.memory_total, gpu.power):
        gauge.labels("0")
    samples: dict[str, set[str]] = {}
    for registry in (metrics.registry, gpu_registry):
        for family in registry.collect():
            for sample in family.samples:
                samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


def identifiers(query: str) -> set[str]:
    """Metric names in a query: what is left without strings, label lists, durations and the language's own words."""
    text = re.sub(r'"[^"]*"', "", query)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", text)
    text = re.sub(r"\b(by|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", text)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", text)) - WORDS


@pytest.mark.parametrize("where", queries())
def test_every_metric_name_exists(where: str) -> None:
    known = known_samples().keys() | recorded().keys() | CLUSTER_METRICS

    names = identifiers(queries()[where])

    assert names
    assert names <= known


@pytest.mark.parametrize("where", queries())
def test_every_label_that_is_matched_exists_with_that_value(where: str) -> None:
    values = {"code": r"\d+", "kind": "real|padding", "provider": "cpu|cuda"}
    for name, matchers in re.findall(r"([a-z_:]+)\{([^}]*)\}", queries()[where]):
        for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', matchers):
            if name in CLUSTER_METRICS or label in (
                "namespace",
                "pod",
                "track",
            ):  # from the scrape, not from the service
                continue
            assert label in known_samples()[name]
            if label in values:
                assert re.fullmatch(values[label], value.split("|")[0])
    for reason in re.findall(r'reason=~"([^"]*)"', queries()[where]):
        text = generate_latest(Metrics(LABELS).registry).decode()
        for each in reason.split("|"):
            assert f'inference_rejected_total{{reason="{each}"}}' in text


def test_every_alert_says_how_bad_it_is_what_is_wrong_and_what_to_do() -> None:
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in ("warning", "critical"), name
        assert set(alert["annotations"]) == {"summary", "runbook"}
        assert len(alert["annotations"]["runbook"]) > 80
        for chapter in re.findall('"([^"]+)" in k8s/README.md', alert["annotations"]["runbook"]):
            assert f"\n## {chapter}\n" in (K8S / "README.md").read_text()


def test_the_dashboard_has_a_panel_for_each_question_and_no_panel_twice() -> None:
    panels = dashboard()["panels"]
    rows = [panel["title"].split(":")[0] for panel in panels if panel["type"] == "row"]

    assert rows == ["Latency", "Errors", "Saturation", "Batching", "Model", "GPU"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def promtool(*arguments: object) -> None:
    command = [tool("promtool", "apt-get install prometheus"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_all_rules_and_every_query_of_the_dashboard(tmp_path: Path) -> None:
    asked = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(queries().values())]
    path = tmp_path / "rules.yaml"
    path.write_text(json.dumps({"groups": [*rules(), {"name": "queries", "rules": asked}]}))

    promtool("check", "rules", "--lint=all", "--lint-fatal", path)


@dataclass
class Case:
    """Series over an hour, one sample a minute, and whether the alert is firing at its end."""

    alert: str
    why: str
    series: dict[str, str]
    # Its labels besides alertname and severity; None: it does not fire.
    fires: dict[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.alert} {'fires' if self.fires is not None else 'is silent'}: {self.why}"


def histogram(name: str, labels: str, fast: int, slow: int, slow_bound: str = "1") -> dict[str, str]:
    """A histogram that gains `fast` observations a minute below 5 ms, and `slow` up to `slow_bound` seconds."""
    return {
        f'{name}_bucket{{{labels},le="0.005"}}': f"0+{fast}x60",
        f'{name}_bucket{{{labels},le="{slow_bound}"}}': f"0+{fast + slow}x60",
        f'{name}_bucket{{{labels},le="+Inf"}}': f"0+{fast + slow}x60",
    }


def answered(ok: int, errors: int = 0, code: str = "500") -> dict[str, str]:
    return {
        f'inference_requests_total{{{POD},route="/predict",code="200"}}': f"0+{ok}x60",
        f'inference_requests_total{{{POD},route="/predict",code="{code}"}}': f"0+{errors}x60",
    }


def scaled(desired: int, current: int, most: int) -> dict[str, str]:
    return {
        f"kube_horizontalpodautoscaler_status_desired_replicas{{{HPA}}}": f"{desired}x60",
        f"kube_horizontalpodautoscaler_status_current_replicas{{{HPA}}}": f"{current}x60",
        f"kube_horizontalpodautoscaler_spec_max_replicas{{{HPA}}}": f"{most}x60",
    }


def busy(seconds_per_minute: int) -> dict[str, str]:
    return {
        f"inference_runner_busy_seconds_total{{{POD}}}": f"0+{seconds_per_minute}x60",
        f"inference_runners{{{POD}}}": "2x60",
    }


def ended(code: int, restarts: str) -> dict[str, str]:
    container = f'{POD},container="server"'
    return {
        f"kube_pod_container_status_last_terminated_exitcode{{{container}}}": f"{code}x60",
        f"kube_pod_container_status_restarts_total{{{container}}}": restarts,
    }


NS = {"namespace": "prod"}
IN_POD = {"namespace": "prod", "pod": "p1"}
DURATION, WAIT = "inference_request_duration_seconds", "inference_queue_wait_seconds"
GPU_THERE = {f'gpu_memory_total_bytes{{{POD},gpu="0"}}': "80000000000x60"}
READY = {f"model_ready{{{POD}}}": "1x60"}

CASES = [
    Case("InferenceErrors", "5 % are 500", answered(95, 5), NS),
    Case("InferenceErrors", "5 % are 504", answered(95, 5, "504"), NS),
    Case("InferenceErrors", "0.5 % are 500", answered(995, 5)),
    Case("InferenceErrors", "refusals have an alert of their own", answered(50, 50, "503")),
    Case("InferenceErrors", "nobody asks", answered(0)),
    Case("InferenceNoReadyReplica", "the only Pod stopped being ready", {f"model_ready{{{POD}}}": "1x50 0x10"}, NS),
    Case("InferenceNoReadyReplica", "the only Pod is gone", {f"model_ready{{{POD}}}": "1x50 stale", **busy(0)}, NS),
    Case("InferenceNoReadyReplica", "there never was a Pod", busy(0), {}),
    Case(
        "InferenceNoReadyReplica", "another Pod is ready", {**READY, 'model_ready{namespace="prod",pod="p2"}': "0x60"}
    ),
    Case("InferenceModelLoadFailing", "exit code 3 again and again", ended(3, "0+1x60") | READY, IN_POD),
    Case("InferenceModelLoadFailing", "a gate that never ends", {f"model_ready{{{POD}}}": "0x60"}, IN_POD),
    Case("InferenceModelLoadFailing", "it failed once, long ago", ended(3, "0 1x59") | READY),
    Case("InferenceModelLoadFailing", "killed for memory, exit code 137", ended(137, "0+1x60") | READY),
    Case("InferenceModelLoadFailing", "a Pod that starts", {f"model_ready{{{POD}}}": "_x57 0 1x2"}),
    Case("InferenceModelLoadFailing", "a Pod that drains", {f"model_ready{{{POD}}}": "1x59 0"}),
    Case(
        "InferenceLatency",
        "a tenth takes up to a second",
        histogram(DURATION, f'{POD},route="/predict"', 90, 10),
        {**NS, "route": "/predict"},
    ),
    Case("InferenceLatency", "one in a hundred does", histogram(DURATION, f'{POD},route="/predict"', 99, 1)),
    Case("InferenceQueueWait", "a tenth waits up to a second", histogram(WAIT, POD, 90, 10), NS),
    Case("InferenceQueueWait", "a tenth waits up to 50 ms", histogram(WAIT, POD, 90, 10, "0.05")),
    Case(
        "InferenceRequestsRejected",
        "the queue is full for 5 %",
        answered(95, 5, "503") | {f'inference_rejected_total{{{POD},reason="queue_full"}}': "0+5x60"},
        {**NS, "reason": "queue_full"},
    ),
    Case(
        "InferenceRequestsRejected",
        "a client sends what nobody can read",
        answered(50, 50, "400") | {f'inference_rejected_total{{{POD},reason="invalid"}}': "0+50x60"},
    ),
    Case(
        "InferenceRequestsRejected",
        "0.1 % only",
        answered(999, 1, "503") | {f'inference_rejected_total{{{POD},reason="late"}}': "0+1x60"},
    ),
    Case(
        "InferenceGpuNotUsed",
        "it fell back to the CPU",
        {f'model_info{{{POD},provider="cpu"}}': "1x60"} | GPU_THERE,
        IN_POD,
    ),
    Case(
        "InferenceGpuNotUsed",
        "it answers, and the GPU idles",
        answered(600) | {f'gpu_utilization_ratio{{{POD},gpu="0"}}': "0x60"},
        IN_POD,
    ),
    Case("InferenceGpuNotUsed", "a CPU Pod", {f'model_info{{{POD},provider="cpu"}}': "1x60"}),
    Case("InferenceGpuNotUsed", "nobody asks", answered(0) | {f'gpu_utilization_ratio{{{POD},gpu="0"}}': "0x60"}),
    Case("InferenceGpuNotUsed", "it works", answered(600) | {f'gpu_utilization_ratio{{{POD},gpu="0"}}': "0.4x60"}),
    Case("InferenceScaleOutBlocked", "busy at maxReplicas", busy(118) | scaled(20, 20, 20), NS),
    Case("InferenceScaleOutBlocked", "busy, and new Pods do not come", busy(118) | scaled(8, 5, 20), NS),
    Case("InferenceScaleOutBlocked", "busy with room to scale", busy(118) | scaled(5, 5, 20)),
    Case("InferenceScaleOutBlocked", "at maxReplicas and idle", busy(30) | scaled(20, 20, 20)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alert(case: Case, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": rules()}))
    # ALERTS says which alerts fire without their texts, which are for people.
    labels = ",".join(f'{name}="{value}"' for name, value in (case.fires or {}).items())
    severity = alerts()[case.alert]["labels"]["severity"]
    firing = (
        f'ALERTS{{alertname="{case.alert}",alertstate="firing",severity="{severity}"{"," + labels if labels else ""}}}'
    )
    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}',
                        "eval_time": "60m",
                        "exp_samples": [] if case.fires is None else [{"labels": firing, "value": 1}],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(json.dumps(test))

    promtool("test", "rules", tmp_path / "test.yaml")


def test_every_alert_is_tested_fired_and_not_fired() -> None:
    assert {case.alert for case in CASES if case.fires is not None} == alerts().keys()
    assert {case.alert for case in CASES if case.fires is None} == alerts().keys()


def test_the_latency_alerts_have_a_bucket_at_their_objective() -> None:
    """Or the quantile is interpolated across it, and the alert fires early or late."""
    text = generate_latest(Metrics(LABELS).registry).decode()
    for alert, metric in (
        ("InferenceLatency", f'{DURATION}_bucket{{le="%s",route="{LABELS[0]}"}}'),
        ("InferenceQueueWait", WAIT + '_bucket{le="%s"}'),
    ):
        bound = alerts()[alert]["expr"].split(">")[1].strip()
        assert metric % bound in text
