"""The report's figures, as SVG text for the page and as PNG files."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from loadtest.capacity.schema import Report, Step

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
matplotlib.rcParams.update({"font.size": 9, "legend.fontsize": 8, "lines.markersize": 3})
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "capacity"})
SIZE_INCHES = (7.0, 3.8)
Series = dict[str, Callable[[Step], float | None]]
PERCENTILES: Series = {"p50": lambda s: s.p50_ms, "p95": lambda s: s.p95_ms.value, "p99": lambda s: s.p99_ms}
QUEUE: Series = {
    "queue wait, ms": lambda s: s.server.queue_wait_ms,
    "model run, ms": lambda s: s.server.run_ms,
    "rows in a batch": lambda s: s.server.batch_rows,
}
SHARES: Series = {
    "CPU, cores": lambda s: s.server.cpu_cores,
    "runners busy, share": lambda s: s.server.runner_busy_share,
    "padding, share of tokens": lambda s: s.server.padding_share,
    "GPU busy, share": lambda s: s.server.gpu_utilization,
    "client CPU, cores": lambda s: s.client_cpu_share,
}


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """PNG files in `folder`."""
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=130)
    return paths


def axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """One figure with one pair of axes."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    plot = figure.subplots()
    plot.set(title=title, xlabel=x, ylabel=y)
    return figure, plot


def figures(report: Report) -> dict[str, Figure]:
    """All figures by name."""
    steps = sorted((step for step in report.steps if step.requests > 0), key=lambda step: step.in_flight)
    opened = [step for step in report.open_loop if step.requests > 0]
    levels, rates = [step.in_flight for step in steps], [step.rps.value for step in steps]
    targets, found, slo_ms = report.derivation, report.findings, report.options.slo_p95_ms
    made = {}

    def figure(name: str, title: str, x: str, y: str) -> Axes:
        made[name], plot = axes(title, x, y)
        if x == "in flight":
            # Doublings, with numbers as people write them.
            plot.set_xscale("log", base=2)
            plot.xaxis.set_major_formatter(PLAIN)
        if y == "latency, ms":
            plot.set_yscale("log")
            plot.yaxis.set_major_formatter(PLAIN)
            plot.axhline(slo_ms, color="tab:red", linestyle=":", label=f"objective, p95 {slo_ms:g} ms")
        return plot

    def draw(plot: Axes, x: Sequence[float], series: Series) -> None:
        for name, of in series.items():
            points = [(at, value) for at, step in zip(x, steps, strict=True) if (value := of(step)) is not None]
            if points:
                plot.plot(*zip(*points, strict=True), "o-", label=name)

    def mark(plot: Axes) -> None:
        knee = found.knee_in_flight
        plot.axvline(knee, color="tab:purple", linestyle=":", label=f"knee, {knee:.1f}")
        if targets is not None:
            at = targets.target_in_flight
            plot.axvline(at, color="tab:green", linestyle="--", label=f"target, {at:g}")

    plot = figure("latency-throughput", "Latency against throughput", "requests per second", "latency, ms")
    draw(plot, rates, PERCENTILES)
    plot.plot(
        [s.rps.value for s in opened], [s.p95_ms.value for s in opened], "kx", markersize=6, label="p95, open loop"
    )
    if targets is not None:
        plot.axvline(
            targets.target_rps, color="tab:green", linestyle="--", label=f"target, {targets.target_rps:.0f} rps"
        )
    plot = figure("latency-in-flight", "Latency against in-flight requests", "in flight", "latency, ms")
    draw(plot, levels, PERCENTILES)
    mark(plot)
    plot = figure("throughput-in-flight", "Throughput against in-flight requests", "in flight", "requests per second")
    errors = [min(step.rps.half_width, step.rps.value) for step in steps]
    plot.errorbar(levels, rates, yerr=errors, fmt="o-", capsize=2)
    plot.set_ylim(bottom=0)
    mark(plot)
    for name, title, series in (("queue-batches", "Queue and batches", QUEUE), ("busy", "How busy", SHARES)):
        if any(of(step) is not None for of in series.values() for step in steps):
            plot = figure(name, title, "in flight", "")
            draw(plot, levels, series)
            plot.set_ylim(bottom=0)
    for each in made.values():
        each.axes[0].legend()
    return made
