"""From findings to targets, as arithmetic that a person can check with the numbers in it."""

import math
from collections.abc import Sequence

from loadtest.capacity import sizes
from loadtest.capacity.openloop import Curve, steady
from loadtest.capacity.schema import Delay, Derivation, Findings, Line, Options, Step

# The HPA does nothing while the metric is within this share of the target (kube-controller-manager's default).
TOLERANCE = 0.1
# The scale-up policies of k8s/base/hpa.yaml: twice the replicas, or four more, in each 30 s.
POLICY_FACTOR, POLICY_SECONDS = 2.0, 30.0
# Never aim nearer to the limit than this, however slowly traffic grows: a measurement is not better.
MARGIN = 0.9
NODE = "node is provisioned"


def delays(options: Options, start_seconds: float, start_source: str) -> list[Delay]:
    """The parts of the time from a growing load to a replica that helps, in their order."""
    return [
        Delay("metric is scraped", options.scrape_seconds, "--scrape-seconds"),
        Delay("metric is a mean, half its window old", options.window_seconds / 2, "--window-seconds"),
        Delay("HPA looks", options.sync_seconds, "--sync-seconds"),
        Delay(NODE, options.node_seconds, "--node-seconds"),
        Delay("image is pulled", options.pull_seconds, "--pull-seconds"),
        Delay("process starts and is ready", start_seconds, start_source),
        Delay("readiness is probed and routed", options.probe_seconds, "--probe-seconds"),
    ]


def limit(findings: Findings) -> tuple[float, str]:
    """The rate within the objective, and how it is known. Of findings with an objective that holds."""
    assert findings.objective_rps is not None
    held = findings.open_loop_rps or MARGIN * findings.objective_rps
    how = "measured with open-loop arrivals" if findings.open_loop_rps else f"as {MARGIN:g} × closed loop"
    return min(findings.objective_rps, held), f"min({findings.objective_rps:.1f} closed loop, {held:.1f} {how})"


def growth(options: Options, seconds: float) -> float:
    return float((1 + options.growth_percent_per_second / 100) ** seconds)


def trigger(findings: Findings, options: Options, waits: list[Delay]) -> float:
    """The rate at which scaling must begin, so that traffic may grow until new replicas help."""
    rate = limit(findings)[0]
    return min(rate / growth(options, sum(wait.seconds for wait in waits)), MARGIN * rate)


def derive(
    steps: Sequence[Step], findings: Findings, options: Options, waits: list[Delay], at_trigger: Step | None = None
) -> Derivation | None:
    """Targets; None if no load is within the objective. `at_trigger`: open-loop arrivals at the rate of `trigger`."""
    if findings.objective_rps is None or findings.open_loop_rps == 0:
        return None
    lines: list[Line] = []

    def line(what: str, arithmetic: str, result: str) -> None:
        lines.append(Line(what, arithmetic, result))

    limit_rps, how = limit(findings)
    reaction = sum(wait.seconds for wait in waits)
    grown, percent = growth(options, reaction), options.growth_percent_per_second
    trigger_rps = trigger(findings, options, waits)
    arithmetic = f"min({limit_rps:.1f} / {grown:.3f}, {MARGIN:g} × {limit_rps:.1f})"
    line("Rate within the objective, one replica", how, f"{limit_rps:.1f} rps")
    line("Time until a new replica helps", " + ".join(f"{w.seconds:.4g}" for w in waits), f"{reaction:.1f} s")
    line("Growth meanwhile", f"(1 + {percent:g}/100)^{reaction:.1f}", f"× {grown:.3f}")
    line("Rate at which scaling must begin", arithmetic, f"{trigger_rps:.1f} rps")
    if options.node_seconds:
        room = trigger(findings, options, [wait for wait in waits if wait.name != NODE])
        line(
            "The same with room held by a placeholder", f"without {NODE}, {options.node_seconds:g} s", f"{room:.1f} rps"
        )

    state = steady(Curve.of(steps), trigger_rps)
    # The least of what is known, so that scaling never begins too late. The knee caps it: beyond, in-flight says how
    # long the queue is, and no longer how much traffic there is.
    known = [
        (state.in_flight, f"E[k] of p(k) ∝ Π {trigger_rps:.1f} / X(j) = {state.in_flight:.2f}"),
        (findings.knee_in_flight, f"knee {findings.knee_in_flight:.2f}"),
    ]
    if at_trigger is not None and at_trigger.requests:
        # As the server counts, because that is what an HPA reads.
        told = at_trigger.server.in_flight
        value, by = (at_trigger.in_flight, "client") if told is None else (told, "server")
        known.append((value, f"{value:.2f} counted by the {by} with open-loop arrivals"))
    least = min(value for value, _ in known)
    in_flight, target_rps = _floor_nice(least / (1 + TOLERANCE)), trigger_rps / (1 + TOLERANCE)
    line("In flight at that rate", f"min({', '.join(text for _, text in known)})", f"{least:.2f}")
    line("In-flight target", f"{least:.2f} / (1 + tolerance {TOLERANCE:g}), rounded down", f"{in_flight:g}")
    line("Rate target", f"{trigger_rps:.1f} / (1 + {TOLERANCE:g})", f"{target_rps:.1f} rps")

    request, cpu_limit, cpu_percent = sizes.cpu(steps, limit_rps, target_rps, line)
    memory_request, memory_limit = sizes.memory(steps, line)
    low, high = sizes.replicas(options, limit_rps, target_rps, line)
    return Derivation(
        delays=waits,
        growth_factor=grown,
        trigger_rps=trigger_rps,
        target_rps=target_rps,
        target_in_flight=in_flight,
        target_cpu_percent=cpu_percent,
        cpu_request_cores=request,
        cpu_limit_cores=cpu_limit,
        memory_request_bytes=memory_request,
        memory_limit_bytes=memory_limit,
        min_replicas=low,
        max_replicas=high,
        lines=lines,
        notes=_notes(growth(options, POLICY_SECONDS), grown, in_flight),
    )


def _floor_nice(value: float) -> float:
    """Rounded down to what a manifest may say: whole above 10, tenths above 1, hundredths below."""
    scale = 1.0 if value >= 10 else 10.0 if value >= 1 else 100.0
    return max(0.01, math.floor(value * scale) / scale)


def _notes(in_a_period: float, meanwhile: float, in_flight: float) -> list[str]:
    said = (
        (
            in_a_period > POLICY_FACTOR,
            f"Traffic grows × {in_a_period:.2f} in {POLICY_SECONDS:g} s; the HPA's policy (k8s/base) adds at most "
            f"× {POLICY_FACTOR:g}: give it a faster one, or keep more replicas.",
        ),
        (
            meanwhile > 3,
            f"Traffic multiplies by {meanwhile:.1f} before a replica helps: scaling follows too late to be the main "
            "answer. Keep spare replicas (min replicas), pre-pulled images, or refuse the excess.",
        ),
        (
            in_flight < 3,
            f"A target of {in_flight:g} in flight is a noisy signal when read at an instant: average the gauge over "
            "a minute (avg_over_time) where the metric is defined, or scale on CPU.",
        ),
    )
    return [text for holds, text in said if holds]
