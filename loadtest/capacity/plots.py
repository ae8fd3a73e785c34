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
matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "capacity"})
SIZE_INCHES = (7.0, 3.8)
Series = tuple[str, Callable[[Step], float | None]]
PERCENTILES: tuple[tuple[str, Callable[[Step], float]], ...] = (
    ("p50", lambda step: step.p50_ms),
    ("p95", lambda step: step.p95_ms.value),
    ("p99", lambda step: step.p99_ms),
)


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def figures(report: Report) -> dict[str, Figure]:
    """All figures by name."""
    steps = sorted((s for s in report.steps if s.requests > 0), key=lambda step: step.in_flight)
    made = {
        "latency-throughput": _latency_throughput(report, steps),
        "latency-in-flight": _latency_in_flight(report, steps),
        "throughput-in-flight": _throughput_in_flight(report, steps),
    }
    queue = _server(
        steps,
        "Queue and batches",
        [
            ("queue wait, ms", lambda step: step.server.queue_wait_ms),
            ("model run, ms", lambda step: step.server.run_ms),
            ("rows in a batch", lambda step: step.server.batch_rows),
        ],
    )
    shares = _server(
        steps,
        "How busy",
        [
            ("CPU, cores", lambda step: step.server.cpu_cores),
            ("runners busy, share", lambda step: step.server.runner_busy_share),
            ("padding, share of tokens", lambda step: step.server.padding_share),
            ("GPU busy, share", lambda step: step.server.gpu_utilization),
            ("client CPU, cores", lambda step: step.client_cpu_share),
        ],
    )
    return made | {name: figure for name, figure in (("queue-batches", queue), ("busy", shares)) if figure is not None}


def save(made: dict[str, Figure], folder: Path) -> list[Path]:
    """PNG files in `folder`."""
    paths = []
    for name, figure in made.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        paths.append(folder / f"{name}.png")
    return paths


def axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """One figure with one pair of axes."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    plot = figure.subplots()
    plot.set(title=title, xlabel=x, ylabel=y)
    return figure, plot


def _log_x(plot: Axes) -> None:
    """Doublings, with numbers as people write them."""
    plot.set_xscale("log", base=2)
    plot.xaxis.set_major_formatter(PLAIN)


def _log_y(plot: Axes) -> None:
    plot.set_yscale("log")
    plot.yaxis.set_major_formatter(PLAIN)


def _latency_throughput(report: Report, steps: Sequence[Step]) -> Figure:
    figure, plot = axes("Latency against throughput", "requests per second", "latency, ms")
    rates = [step.rps.value for step in steps]
    for name, of in PERCENTILES:
        plot.plot(rates, [of(step) for step in steps], "o-", label=f"{name}, closed loop", markersize=3)
    if report.open_loop:
        opened = [step for step in report.open_loop if step.requests > 0]
        plot.plot(
            [step.rps.value for step in opened], [step.p95_ms.value for step in opened], "kx", label="p95, open loop"
        )
    _log_y(plot)
    _objective(plot, report)
    if report.derivation is not None:
        target = report.derivation.target_rps
        plot.axvline(target, color="tab:green", linestyle="--", label=f"target, {target:.0f} rps")
    plot.legend(fontsize=8)
    return figure


def _latency_in_flight(report: Report, steps: Sequence[Step]) -> Figure:
    figure, plot = axes("Latency against in-flight requests", "in flight", "latency, ms")
    levels = [step.in_flight for step in steps]
    for name, of in PERCENTILES:
        plot.plot(levels, [of(step) for step in steps], "o-", label=name, markersize=3)
    _log_x(plot)
    _log_y(plot)
    _objective(plot, report)
    _marks(plot, report)
    plot.legend(fontsize=8)
    return figure


def _throughput_in_flight(report: Report, steps: Sequence[Step]) -> Figure:
    figure, plot = axes("Throughput against in-flight requests", "in flight", "requests per second")
    levels = [step.in_flight for step in steps]
    errors = [min(step.rps.half_width, step.rps.value) for step in steps]
    plot.errorbar(levels, [step.rps.value for step in steps], yerr=errors, fmt="o-", markersize=3, capsize=2)
    _log_x(plot)
    plot.set_ylim(bottom=0)
    _marks(plot, report)
    plot.legend(fontsize=8)
    return figure


def _server(steps: Sequence[Step], title: str, series: list[Series]) -> Figure | None:
    """Lines of what the server said against in-flight; None if it said nothing of it."""
    figure, plot = axes(title, "in flight", "")
    _log_x(plot)
    drawn = 0
    for name, of in series:
        points = [(step.in_flight, value) for step in steps if (value := of(step)) is not None]
        if points:
            plot.plot(*zip(*points, strict=True), "o-", label=name, markersize=3)
            drawn += 1
    if not drawn:
        return None
    plot.set_ylim(bottom=0)
    plot.legend(fontsize=8)
    return figure


def _objective(plot: Axes, report: Report) -> None:
    plot.axhline(
        report.options.slo_p95_ms,
        color="tab:red",
        linestyle=":",
        label=f"objective, p95 {report.options.slo_p95_ms:g} ms",
    )


def _marks(plot: Axes, report: Report) -> None:
    knee = report.findings.knee_in_flight
    plot.axvline(knee, color="tab:purple", linestyle=":", label=f"knee, {knee:.1f}")
    if report.derivation is not None:
        target = report.derivation.target_in_flight
        plot.axvline(target, color="tab:green", linestyle="--", label=f"target, {target:g}")
