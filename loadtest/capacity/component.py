"""Writes the targets as Kustomize components, one for each way to scale, to be listed in an overlay.

`cpu/` stands on the base's HPA, `inflight/` on the HPA with the pods metric, `keda/` on the ScaledObject. Each sets
the Deployment's resources too: a target belongs to the size of Pod that it was measured on.
"""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from loadtest.capacity.schema import Derivation, Report

NAME = "sentiment-inference"
METRIC = "inference_requests_in_flight"
# Where the built objects carry the run, because comments do not survive a build.
ANNOTATION = f"{NAME}/capacity-run"
MIB = 1024 * 1024
HPA = ("autoscaling/v2", "HorizontalPodAutoscaler", "s")
SCALED_OBJECT = ("keda.sh/v1alpha1", "ScaledObject", "Count")


def quantity(value: float) -> str:
    """A Kubernetes quantity: whole, or in thousandths."""
    return str(int(value)) if value == int(value) else f"{round(value * 1000)}m"


def second_cpu_percent(percent: int) -> int:
    """CPU's target where it is the second metric: a tenth above its own."""
    return min(95, round(percent * 1.1))


def write(report: Report, folder: Path) -> list[Path]:
    """The components in `folder`; returns their folders. None without targets: nothing half-right is written."""
    targets = report.derivation
    if targets is None:
        return []
    in_flight, percent = targets.target_in_flight, targets.target_cpu_percent
    pods = {
        "metric": {"name": METRIC},
        "target": {"type": "AverageValue", "averageValue": quantity(in_flight)},
    }
    metrics: list[dict[str, Any]] = [{"type": "Pods", "pods": pods}]
    if percent is not None:
        # A HPA takes the largest answer of its metrics, so the second acts only past the first, or when it is missing.
        metrics.append(_cpu(second_cpu_percent(percent)))
    whole = "The whole list: each target is right only beside these."
    first = "The first trigger must be the sum of in-flight requests over the fleet: KEDA divides it by this."
    components: dict[str, tuple[tuple[str, str, str], str, dict[str, object]]] = {
        "inflight": (HPA, whole, _set("/spec/metrics", metrics)),
        "keda": (SCALED_OBJECT, first, _set("/spec/triggers/0/metadata/threshold", f"{in_flight:g}")),
    }
    if percent is not None:
        components["cpu"] = (HPA, whole, _set("/spec/metrics", [_cpu(percent)]))
    for name, (scaler, why, patch) in components.items():
        _write(report, targets, folder / name, scaler, why, patch)
    return [folder / name for name in components]


def _write(
    report: Report, targets: Derivation, folder: Path, scaler: tuple[str, str, str], why: str, metric: dict[str, object]
) -> None:
    version, kind, suffix = scaler
    bounds = {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": NAME, "annotations": {ANNOTATION: report.run.id}},
        "spec": {f"minReplica{suffix}": targets.min_replicas, f"maxReplica{suffix}": targets.max_replicas},
    }
    bounds_file = "hpa.yaml" if scaler is HPA else "scaledobject.yaml"
    files: dict[str, object] = {bounds_file: bounds, "metric.yaml": [metric]}
    patches: list[dict[str, object]] = [
        {"path": path, "target": {"kind": kind, "name": NAME}} for path in (bounds_file, "metric.yaml")
    ]
    if resources := _resources(targets):
        files["resources.yaml"] = resources
        patches.append({"path": "resources.yaml", "target": {"kind": "Deployment", "name": NAME}})
    files["kustomization.yaml"] = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "patches": patches,
        # Patches are silent where the overlay has no such object. This changes nothing, and fails.
        "replacements": [
            {
                "source": {"kind": kind, "name": NAME, "fieldPath": f"spec.minReplica{suffix}"},
                "targets": [{"select": {"kind": kind, "name": NAME}, "fieldPaths": [f"spec.minReplica{suffix}"]}],
            }
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        comment = [*_comment(report), *([why] if name == "metric.yaml" else [])]
        text = yaml.safe_dump(content, sort_keys=False)
        (folder / name).write_text("".join(f"# {line}\n" for line in comment) + text)


def _comment(report: Report) -> list[str]:
    run, options = report.run, report.options
    given = {"--base-rps": options.base_rps, "--peak-rps": options.peak_rps}
    return [
        f"Made by `python -m loadtest.capacity`, run {run.id}, against {run.url} on {run.started}.",
        f"Load: {run.load}. Machine: {run.machine}.",
        f"Objective: p95 within {options.slo_p95_ms:g} ms. The arithmetic is in that run's report.html.",
        *(f"Bounds of replicas are a guess: {name} was not given." for name, value in given.items() if value is None),
        *(f"Note: {warning}" for warning in report.findings.warnings),
    ]


def _set(path: str, value: object) -> dict[str, object]:
    return {"op": "add", "path": path, "value": value}


def _cpu(percent: int) -> dict[str, Any]:
    target = {"type": "Utilization", "averageUtilization": percent}
    return {"type": "Resource", "resource": {"name": "cpu", "target": target}}


def _resources(targets: Derivation) -> list[dict[str, object]]:
    """One patch for what was measured of the first container's resources; a GPU, say, stays."""
    found: dict[str, str] = {}
    if targets.cpu_request_cores is not None and targets.cpu_limit_cores is not None:
        found["requests/cpu"] = quantity(targets.cpu_request_cores)
        found["limits/cpu"] = quantity(targets.cpu_limit_cores)
    if targets.memory_request_bytes and targets.memory_limit_bytes:
        found["requests/memory"] = f"{targets.memory_request_bytes // MIB}Mi"
        found["limits/memory"] = f"{targets.memory_limit_bytes // MIB}Mi"
    return [_set(f"/spec/template/spec/containers/0/resources/{path}", value) for path, value in found.items()]
