"""What people read: `report.html` (one file that loads nothing), PNG figures, the answer on the terminal."""

from pathlib import Path

import jinja2

from loadtest.capacity import component, plots, schema
from loadtest.capacity.analysis import KNEE_RULE
from loadtest.capacity.schema import Report

MIB = 1024 * 1024
# What k8s/components/guardrails admits.
QUOTA_REPLICAS = 20
TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(report: Report, folder: Path) -> list[Path]:
    """Everything, into `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    schema.write(report, folder / "report.json")
    figures = plots.figures(report)
    page = render(
        TEMPLATE,
        report=report,
        drawings=[plots.svg(figure) for figure in figures.values()],
        answer=answer(report),
        steps=[*sorted(report.steps, key=lambda step: step.in_flight), *report.open_loop],
        next_steps=next_steps(report),
        number=number,
    )
    (folder / "report.html").write_text(page)
    pictures, components = plots.save(figures, folder), component.write(report, folder / "component")
    return [folder / "report.json", folder / "report.html", *pictures, *components]


def render(template: Path, **values: object) -> str:
    """A page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template.read_text()).render(values)


def number(value: float | None, digits: int, per: float = 1.0) -> str:
    """A number, or a dash where the server says nothing."""
    return "–" if value is None else f"{value / per:.{digits}f}"


def answer(report: Report) -> dict[str, str]:
    """The result in a few lines."""
    found, targets, slo_ms = report.findings, report.derivation, report.options.slo_p95_ms
    within = "not even one request in flight"
    if found.objective_in_flight is not None:
        within = f"{found.objective_in_flight:.0f} in flight, {found.objective_rps:.1f} rps"
    lines = {
        "Peak throughput": f"{found.peak_rps:.1f} rps at {found.peak_in_flight:.0f} in flight",
        "Knee": f"{found.knee_in_flight:.2f} in flight, {found.knee_rps:.1f} rps ({KNEE_RULE})",
        f"Within p95 {slo_ms:g} ms, closed loop": within,
        f"Within p95 {slo_ms:g} ms, open loop": f"{found.open_loop_rps:.1f} rps"
        if found.open_loop_rps
        else "no rate tried held",
        "Gives out first": f"{found.gives_out}: {found.gives_out_why}",
    }
    if targets is None:
        return lines
    options = {"--base-rps": report.options.base_rps, "--peak-rps": report.options.peak_rps}
    missing = " and ".join(name for name, value in options.items() if value is None)
    percent = targets.target_cpu_percent
    request, limit = (number(value, 0, MIB) for value in (targets.memory_request_bytes, targets.memory_limit_bytes))
    return lines | {
        "In-flight target (HPA pods metric, KEDA threshold)": f"{targets.target_in_flight:g}",
        "Rate target": f"{targets.target_rps:.1f} rps",
        "CPU utilisation target (plain HPA)": "not derived" if percent is None else f"{percent} %",
        "CPU request, limit": f"{number(targets.cpu_request_cores, 1)}, {number(targets.cpu_limit_cores, 0)}",
        "Memory request, limit": f"{request} MiB, {limit} MiB",
        "Replicas": f"{targets.min_replicas} to {targets.max_replicas}"
        + (f" (a guess without {missing})" if missing else ""),
    }


def next_steps(report: Report) -> list[str]:
    """What to do with the result."""
    found, targets, options = report.findings, report.derivation, report.options
    if targets is None and found.objective_in_flight is not None:
        return ["Let the server queue a few more requests, or allow more refusals (--allowed-failure-percent)."]
    if targets is None:
        return [
            "Make one request fast enough first: a smaller model or input, a GPU, or a wider objective "
            "(--slo-p95-ms). No number of replicas repairs the latency of a single request."
        ]
    said = (
        (found.gives_out == "client", "Measure again with a client on its own machine: this one was the limit."),
        (True, "Prove the target on your traffic: python -m loadtest.simulate report.json --trace YOURS.csv"),
        (
            True,
            "Put component/cpu, component/inflight or component/keda on an overlay (k8s/README.md, A measured target), "
            "and look at `kubectl diff -k` before applying it.",
        ),
        (
            options.base_rps is None,
            "Give --base-rps and --peak-rps from your own traffic: min and max replicas are guesses without.",
        ),
        (
            targets.max_replicas > QUOTA_REPLICAS,
            f"Raise the quota (k8s/components/guardrails) with max replicas: it admits {QUOTA_REPLICAS} and a rollout.",
        ),
        (options.node_seconds == 0, "If new replicas need new nodes, give --node-seconds: it is zero here."),
        (True, "Measure again when the model, its precision, the CPU limit or the kind of node changes."),
    )
    return [text for holds, text in said if holds]
