"""Writes the targets as Kustomize components, one for each way to scale, to be listed in an overlay.

`cpu/` stands on the base's HPA, `inflight/` on the HPA with the pods metric, `keda/` on the ScaledObject. Each sets
the Deployment's resources too: a target belongs to the size of Pod that it was measured on.
"""

from pathlib import Path

from loadtest.capacity.schema import Derivation, Options, Report

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
            *(f"Note: {warning}" for warning in report.findings.warnings),
        )
    )
    written = []
    hpa = {"cpu": _cpu_metric(targets), "inflight": _in_flight_metric(targets)}
    for name, metric in hpa.items():
        if metric is not None:
            written.append(_component(folder / name, comment, targets, ("hpa.yaml", _hpa(report, targets)), metric))
    scaled = ("scaledobject.yaml", _keda(report, targets))
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


def _bound(name: str, value: int, given: float | None, option: str) -> str:
    return f"  {name}: {value}\n" if given is not None else f"  # A guess: {option} was not given.\n  {name}: {value}\n"


def _bounds(suffix: str, targets: Derivation, options: Options) -> str:
    least = _bound(f"minReplica{suffix}", targets.min_replicas, options.base_rps, "--base-rps")
    return least + _bound(f"maxReplica{suffix}", targets.max_replicas, options.peak_rps, "--peak-rps")


def _hpa(report: Report, targets: Derivation) -> str:
    return (
        f"apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata:\n  name: {NAME}\n"
        f'  annotations:\n    {ANNOTATION}: "{report.run.id}"\n'
        f"spec:\n{_bounds('s', targets, report.options)}"
    )


def _keda(report: Report, targets: Derivation) -> str:
    return (
        f"apiVersion: keda.sh/v1alpha1\nkind: ScaledObject\nmetadata:\n  name: {NAME}\n"
        f'  annotations:\n    {ANNOTATION}: "{report.run.id}"\n'
        f"spec:\n{_bounds('Count', targets, report.options)}"
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


def second_cpu_percent(percent: int) -> int:
    """CPU's target where it is the second metric: a tenth above its own."""
    return min(95, round(percent * 1.1))


def _in_flight_metric(targets: Derivation) -> str:
    text = (
        f"{WHOLE_LIST}    - type: Pods\n      pods:\n        metric: {{name: {METRIC}}}\n"
        f'        target: {{type: AverageValue, averageValue: "{quantity(targets.target_in_flight)}"}}\n'
    )
    if targets.target_cpu_percent is not None:
        text += _cpu_entry(second_cpu_percent(targets.target_cpu_percent))
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
