"""Every query of alerts, rules, dashboard and autoscalers asks for what exists; every alert says what to do."""

import functools
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from app.errors import REJECT_REASONS
from app.http.routes import LABELS
from app.telemetry.metrics import GpuMetrics, JobMetrics, Metrics, QueueMetrics
from tests.deploy.alerts.cluster import KUBE_STATE_METRICS
from tests.manifests import K8S, Object, tool

ALL_RULES, QUALITY_RULES = "prometheusrule*.yaml", "prometheusrule-quality.yaml"
WORDS = {
    *("and", "or", "unless", "on", "by", "ignoring", "group_left", "group_right", "bool", "offset"),
    *(
        "sum",
        "avg",
        "max",
        "min",
        "count",
        "group",
        "rate",
        "increase",
        "changes",
        "histogram_quantile",
        "clamp_min",
        "ln",
    ),
    *("avg_over_time", "max_over_time", "sum_over_time", "quantile_over_time"),
    *("scalar", "vector", "label_replace"),
}
# Given by the scrape, not by the service.
TARGET = {"namespace", "pod", "track", "app_kubernetes_io_part_of"}


@functools.cache
def component(path: str) -> Object:
    """A file of the components, as it is: these are not changed by what else is applied."""
    return dict(yaml.load((K8S / "components" / path).read_text(), yaml.CSafeLoader))


def rules(name: str = ALL_RULES) -> list[Object]:
    """Groups of rules: of all files, or of one."""
    paths = sorted((K8S / "components/monitoring").glob(name))
    return [group for path in paths for group in component(f"monitoring/{path.name}")["spec"]["groups"]]


def evaluated(groups: list[Object]) -> list[str]:
    """Groups in the order in which each finds what it reads. Without one, promtool takes another order each time."""
    ordered = sorted(groups, key=lambda group: any("alert" in rule for rule in group["rules"]))
    return [group["name"] for group in ordered]


def alerts(name: str = ALL_RULES) -> dict[str, Object]:
    return {rule["alert"]: rule for group in rules(name) for rule in group["rules"] if "alert" in rule}


def recorded(name: str = ALL_RULES) -> dict[str, Object]:
    return {rule["record"]: rule for group in rules(name) for rule in group["rules"] if "record" in rule}


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


@functools.cache
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


@functools.cache
def known_samples() -> dict[str, set[str]]:
    """Sample names of the service's metrics, with the labels each has."""
    metrics = Metrics(LABELS)
    metrics.info.labels("n", "v", "d", "cpu", "int8")
    metrics.predictions.labels("l")
    metrics.reference.labels("l")
    gpu_registry = CollectorRegistry()
    gpu = GpuMetrics(gpu_registry)
    for gauge in (gpu.utilization, gpu.memory_used, gpu.memory_total, gpu.power):
        gauge.labels("0")
    jobs_registry = CollectorRegistry()
    JobMetrics(jobs_registry)
    QueueMetrics(jobs_registry)
    samples: dict[str, set[str]] = {}
    for registry in (metrics.registry, gpu_registry, jobs_registry):
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
    known = known_samples().keys() | recorded().keys() | KUBE_STATE_METRICS.keys() | {"up"}

    names = identifiers(queries()[where])

    assert names or "vector(" in queries()[where]
    assert names <= known


@pytest.mark.parametrize("where", queries())
def test_every_label_that_is_matched_exists_with_that_value(where: str) -> None:
    values = {"code": r"[\d.]+", "kind": "real|padding", "provider": "cpu|cuda"}
    for name, matchers in re.findall(r"([a-z_:]+)\{([^}]*)\}", queries()[where]):
        for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', matchers):
            if label in TARGET:
                continue
            assert label in (KUBE_STATE_METRICS.get(name) or known_samples()[name])
            if label in values:
                assert re.fullmatch(values[label], value.split("|")[0])
    for reason in re.findall(r'inference_rejected_total\{[^}]*reason=~"([^"]*)"', queries()[where]):
        assert set(reason.split("|")) <= set(REJECT_REASONS)


def test_every_alert_says_how_bad_it_is_what_is_wrong_and_what_to_do() -> None:
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in ("warning", "critical"), name
        assert alert["annotations"].keys() == {"summary", "description", "runbook"}, name
        assert len(alert["annotations"]["description"]) > 80, name
        assert alert["annotations"]["runbook"] == f"k8s/README.md#{name.lower()}"


def test_every_alert_has_its_section_in_the_readme_and_no_other_has() -> None:
    (chapter,) = re.findall(r"\n## Alerts\n(.*?)(?=\n## )", (K8S / "README.md").read_text(), re.DOTALL)

    assert set(re.findall(r"\n### (\w+)\n\n", chapter)) == alerts().keys()


def test_the_dashboard_has_a_panel_for_each_question_and_no_panel_twice() -> None:
    panels = dashboard()["panels"]
    rows = [panel["title"].split(":")[0] for panel in panels if panel["type"] == "row"]

    assert rows == ["Latency", "Errors", "Saturation", "Batching", "Model", "GPU", "Quality"]
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


def test_the_latency_objectives_are_bounds_of_buckets() -> None:
    """Or the quantile is interpolated across them, and the alert fires early or late."""
    text = generate_latest(Metrics(LABELS).registry).decode()
    for metric, labels in (
        ("inference_request_duration_seconds", f',route="{LABELS[0]}"'),
        ("inference_queue_wait_seconds", ""),
    ):
        (objective,) = re.findall(r"vector\((.+)\)", recorded()[f"objective:{metric}:p95"]["expr"])
        assert f'{metric}_bucket{{le="{objective}"{labels}}}' in text
