"""The simulator's figures: cost against violation, and what happened over one trace."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from loadtest.capacity.plots import PLAIN, axes
from loadtest.simulate.fleet import Timeline
from loadtest.simulate.sweep import Trial

MARKERS = {"inflight": "o", "cpu": "s"}
# On a logarithmic scale nothing has no place.
LEAST_SHARE = 1e-5


def cost(trials: Sequence[Trial], best: Trial | None, allowed: float) -> Figure:
    """Every trial as a point: what it costs and how much of the traffic it fails."""
    figure, plot = axes("Cost against violation", "replica-hours", f"requests in violation ({LEAST_SHARE:g}: none)")
    for signal in dict.fromkeys(trial.signal for trial in trials):
        points = sorted((t.replica_hours, max(t.violation_share, LEAST_SHARE)) for t in trials if t.signal == signal)
        plot.plot(*zip(*points, strict=True), MARKERS[signal], label=signal, markersize=5, alpha=0.7)
    plot.axhline(max(allowed, LEAST_SHARE), color="tab:red", linestyle=":", label="allowed")
    if best is not None:
        label = f"cheapest that holds: {best.signal} {best.target:.3g}, at least {best.min_replicas}"
        plot.plot(best.replica_hours, max(best.violation_share, LEAST_SHARE), "k*", markersize=12, label=label)
    plot.set_yscale("log")
    plot.legend()
    return figure


def timeline(name: str, line: Timeline, slo_ms: float) -> Figure:
    """Traffic, replicas and p95 of one trace."""
    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    rate, replicas, latency = figure.subplots(3, 1, sharex=True)
    rate.plot(line.seconds, line.rps)
    rate.set(title=name, ylabel="requests per second")
    replicas.plot(line.seconds, line.wanted, label="wanted", drawstyle="steps-post")
    replicas.plot(line.seconds, line.ready, label="ready", drawstyle="steps-post")
    replicas.set(ylabel="replicas")
    replicas.legend()
    latency.plot(line.seconds, line.p95_ms)
    latency.axhline(slo_ms, color="tab:red", linestyle=":")
    latency.set(ylabel="p95, ms", xlabel="seconds", yscale="log")
    latency.yaxis.set_major_formatter(PLAIN)
    return figure
