"""What people read: `report.html` (one file that loads nothing), PNG figures, the answer on the terminal."""

from pathlib import Path

import jinja2

from loadtest.capacity import component, plots, schema
from loadtest.capacity.schema import Report

MIB = 1024 * 1024
# What k8s/components/guardrails admits.
QUOTA_REPLICAS = 20
TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(report: Report, folder: Path) -> list[Path]:
    """Everything, into `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    schema.write(report, folder / "report.json")
    made = plots.figures(report)
    (folder / "report.html").write_text(html(report, [plots.svg(figure) for figure in made.values()]))
    pictures = plots.save(made, folder)
    return [folder / "report.json", folder / "report.html", *pictures, *component.write(report, folder / "component")]


def number(value: float | None, digits: int, per: float = 1.0) -> str:
    """A number, or a dash where the server says nothing."""
    return "–" if value is None else f"{value / per:.{digits}f}"


def html(report: Report, drawings: list[str]) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(
        report=report,
        drawings=drawings,
        answer=answer(report),
        steps=[*sorted(report.steps, key=lambda step: step.in_flight), *report.open_loop],
        next_steps=next_steps(report),
        number=number,
    )


def answer(report: Report) -> list[tuple[str, str]]:
    """The result in a few lines."""
    found, targets = report.findings, report.derivation
    within = (
        "not even one request in flight"
        if found.objective_in_flight is None
        else f"{found.objective_in_flight:.0f} in flight, {found.objective_rps:.1f} rps"
    )
    lines = [
        ("Peak throughput", f"{found.peak_rps:.1f} rps at {found.peak_in_flight:.0f} in flight"),
        ("Knee", f"{found.knee_in_flight:.2f} in flight, {found.knee_rps:.1f} rps ({found.knee_rule})"),
        (f"Within p95 {report.options.slo_p95_ms:g} ms, closed loop", within),
        (
            f"Within p95 {report.options.slo_p95_ms:g} ms, open loop",
            "no rate tried held" if not found.open_loop_rps else f"{found.open_loop_rps:.1f} rps",
        ),
        ("Gives out first", f"{found.gives_out}: {found.gives_out_why}"),
    ]
    if targets is not None:
        lines += [
            ("In-flight target (HPA pods metric, KEDA threshold)", f"{targets.target_in_flight:g}"),
            ("Rate target", f"{targets.target_rps:.1f} rps"),
            (
                "CPU utilisation target (plain HPA)",
                "not derived" if targets.target_cpu_percent is None else f"{targets.target_cpu_percent} %",
            ),
            ("CPU request, limit", f"{number(targets.cpu_request_cores, 1)}, {number(targets.cpu_limit_cores, 0)}"),
            (
                "Memory request, limit",
                f"{number(targets.memory_request_bytes, 0, MIB)} MiB, {number(targets.memory_limit_bytes, 0, MIB)} MiB",
            ),
            ("Replicas", f"{targets.min_replicas} to {targets.max_replicas}{guess(report)}"),
        ]
    return lines


def guess(report: Report) -> str:
    """Says which of the bounds are guesses."""
    given = {"--base-rps": report.options.base_rps, "--peak-rps": report.options.peak_rps}
    missing = [name for name, value in given.items() if value is None]
    return f" (a guess without {' and '.join(missing)})" if missing else ""


def next_steps(report: Report) -> list[str]:
    """What to do with the result."""
    if report.derivation is None and report.findings.objective_in_flight is not None:
        return ["Let the server queue a few more requests, or allow more refusals (--allowed-failure-percent)."]
    if report.derivation is None:
        return [
            "Make one request fast enough first: a smaller model or input, a GPU, or a wider objective "
            "(--slo-p95-ms). No number of replicas repairs the latency of a single request."
        ]
    steps = [
        "Prove the target on your traffic: python -m loadtest.simulate report.json --trace YOURS.csv",
        "Put component/cpu, component/inflight or component/keda on an overlay (k8s/README.md, A measured target), and "
        "look at `kubectl diff -k` before applying it.",
    ]
    if report.findings.gives_out == "client":
        steps.insert(0, "Measure again with a client on its own machine: this one was the limit.")
    if report.options.base_rps is None:
        steps.append("Give --base-rps and --peak-rps from your own traffic: min and max replicas are guesses without.")
    if report.derivation.max_replicas > QUOTA_REPLICAS:
        steps.append(
            f"Raise the quota (k8s/components/guardrails) with max replicas: it admits {QUOTA_REPLICAS} and a rollout."
        )
    if report.options.node_seconds == 0:
        steps.append("If new replicas need new nodes, give --node-seconds: it is zero here.")
    steps.append("Measure again when the model, its precision, the CPU limit or the kind of node changes.")
    return steps
