"""Writes the targets as Kustomize components, one for each way to scale, to be listed in an overlay.

`cpu/` stands on the base's HPA, `inflight/` on the HPA with the pods metric, `keda/` on the ScaledObject. Each sets
the Deployment's resources too: a target belongs to the size of Pod that it was measured on.
"""

from pathlib import Path

from loadtest.capacity.schema import Derivation, Report

NAME = "sentiment-inference"
METRIC = "inference_requests_in_flight"
# Where the built objects carry the run, because comments do not survive a build.
ANNOTATION = f"{NAME}/capacity-run"
MIB = 1024 * 1024


def quantity(value: float) -> str:
    """A Kubernetes quantity: whole, or in thousandths."""
    return str(int(value)) if value == int(value) else f"{round(value * 1000)}m"


def write(report: Report, folder: Path) -> list[Path]:
    """The components in `folder`; returns their folders. None without targets: nothing half-right is written."""
    targets = report.derivation
    if targets is None:
        return []
    run = report.run
    comment = "".join(
        f"# {text}\n"
        for text in (
            f"Made by `python -m loadtest.capacity`, run {run.id}, against {run.url} on {run.started}.",
            f"Load: {run.load}. Machine: {run.machine}.",
            f"Objective: p95 within {report.options.slo_p95_ms:g} ms. The arithmetic is in that run's report.html.",
        )
    )
    written = []
    hpa = {"cpu": _cpu_metric(targets), "inflight": _in_flight_metric(targets)}
    for name, metric in hpa.items():
        if metric is not None:
            written.append(_component(folder / name, comment, targets, ("hpa.yaml", _hpa(run.id, targets)), metric))
    scaled = ("scaledobject.yaml", _keda(run.id, targets))
    return [*written, _component(folder / "keda", comment, targets, scaled, _threshold(targets))]


def _component(folder: Path, comment: str, targets: Derivation, bounds: tuple[str, str], metric: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kind = "HorizontalPodAutoscaler" if bounds[0] == "hpa.yaml" else "ScaledObject"
    resources = _resources(targets)
    patches = [
        # A strategic merge names its object and fails where the overlay has none; the patches below would be silent.
        f"  - path: {bounds[0]}",
        f"  - path: metric.yaml\n    target: {{kind: {kind}, name: {NAME}}}",
    ]
    files = {bounds[0]: bounds[1], "metric.yaml": metric}
    if resources is not None:
        files["resources.yaml"] = resources
        patches.append(f"  - path: resources.yaml\n    target: {{kind: Deployment, name: {NAME}}}")
    files["kustomization.yaml"] = (
        "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\npatches:\n" + "\n".join(patches) + "\n"
    )
    for name, text in files.items():
        (folder / name).write_text(comment + text)
    return folder


def _hpa(run_id: str, targets: Derivation) -> str:
    return (
        f"apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata:\n  name: {NAME}\n"
        f'  annotations:\n    {ANNOTATION}: "{run_id}"\n'
        f"spec:\n  minReplicas: {targets.min_replicas}\n  maxReplicas: {targets.max_replicas}\n"
    )


def _keda(run_id: str, targets: Derivation) -> str:
    return (
        f"apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata:\n  name: {NAME}\n"
        f'  annotations:\n    {ANNOTATION}: "{run_id}"\n'
        f"spec:\n  minReplicaCount: {targets.min_replicas}\n  maxReplicaCount: {targets.max_replicas}\n"
    )


# A HPA takes the largest answer of its metrics, so the second acts only past the first, or when the first is missing.
WHOLE_LIST = "# The whole list: each target is right only beside these.\n- op: add\n  path: /spec/metrics\n  value:\n"


def _cpu_entry(percent: int) -> str:
    return (
        "    - type: Resource\n      resource:\n        name: cpu\n"
        f"        target: {{type: Utilization, averageUtilization: {percent}}}\n"
    )


def _cpu_metric(targets: Derivation) -> str | None:
    return None if targets.target_cpu_percent is None else WHOLE_LIST + _cpu_entry(targets.target_cpu_percent)


def _in_flight_metric(targets: Derivation) -> str:
    text = (
        f"{WHOLE_LIST}    - type: Pods\n      pods:\n        metric: {{name: {METRIC}}}\n"
        f'        target: {{type: AverageValue, averageValue: "{quantity(targets.target_in_flight)}"}}\n'
    )
    if targets.target_cpu_percent is not None:
        # A tenth above CPU's own target.
        text += _cpu_entry(min(95, round(targets.target_cpu_percent * 1.1)))
    return text


def _threshold(targets: Derivation) -> str:
    return (
        "# The first trigger must be the sum of in-flight requests over the fleet: KEDA divides it by this.\n"
        f'- op: add\n  path: /spec/triggers/0/metadata/threshold\n  value: "{targets.target_in_flight:g}"\n'
    )


def _resources(targets: Derivation) -> str | None:
    """One patch for what was measured of the first container's resources; a GPU, say, stays."""
    patches: list[str] = []

    def put(kind: str, name: str, value: str) -> None:
        path = f"/spec/template/spec/containers/0/resources/{kind}/{name}"
        patches.append(f'- {{op: add, path: {path}, value: "{value}"}}\n')

    if targets.cpu_request_cores is not None and targets.cpu_limit_cores is not None:
        put("requests", "cpu", quantity(targets.cpu_request_cores))
        put("limits", "cpu", quantity(targets.cpu_limit_cores))
    if targets.memory_request_bytes and targets.memory_limit_bytes:
        put("requests", "memory", f"{targets.memory_request_bytes // MIB}Mi")
        put("limits", "memory", f"{targets.memory_limit_bytes // MIB}Mi")
    return "".join(patches) or None
