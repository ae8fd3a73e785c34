"""What the steps say: peak, knee, the largest load within the objective, what gives out first, and what a reader must
know before trusting the numbers. Knows no targets.
"""

import math
import os
from collections.abc import Sequence

from loadtest.capacity import explore
from loadtest.capacity.explore import AT_PEAK, first_at_peak, objective
from loadtest.capacity.openloop import Curve, largest_rate
from loadtest.capacity.schema import Findings, Options, Step

KNEE_RULE = f"throughput reaches {AT_PEAK:.0%} of its peak"
# A client this busy measures itself.
CLIENT_BUSY = 0.85
BUSY = 0.9
# More than what a machine at rest does.
OTHERS_CORES = 0.2
# Open-loop rates as shares of the first; the last are for servers that refuse, or collapse, when a few arrive at once.
RATE_SHARES = (1.0, 0.93, 0.86, 0.78, 0.68, 0.55, 0.42, 0.3, 0.2, 0.1)


class NoAnswer(Exception):
    """No step got an answer; the message is one line for people."""


def usable(steps: Sequence[Step]) -> dict[int, Step]:
    """Closed-loop steps by in-flight."""
    found = {level: step for level, step in explore.merge(steps).items() if step.requests > 0}
    if not found:
        status = "refusals" if any(step.refused for step in steps) else "errors"
        raise NoAnswer(f"no request was answered with 200: only {status}; is the URL right and the server ready?")
    return found


def find(steps: Sequence[Step], open_loop: Sequence[Step], options: Options, *, local: bool) -> Findings:
    """All findings. Raises NoAnswer."""
    by_level = usable(steps)
    peak = max(by_level.values(), key=lambda step: step.rps.value)
    knee, knee_rps = find_knee(by_level)
    within, _ = objective(by_level, options)
    cause, why = gives_out(by_level, within, local=local)
    return Findings(
        peak_rps=peak.rps.value,
        peak_in_flight=peak.in_flight,
        knee_in_flight=knee,
        knee_rps=knee_rps,
        objective_in_flight=within,
        objective_rps=max((s.rps.value for n, s in by_level.items() if within and n <= within), default=None),
        open_loop_rps=confirmed(open_loop, options),
        gives_out=cause,
        gives_out_why=why,
        warnings=warnings(steps, open_loop, within, options, local=local),
    )


def find_knee(by_level: dict[int, Step]) -> tuple[float, float]:
    """The in-flight beyond which more of it mostly waits, and its rate: where throughput reaches AT_PEAK of its peak,
    interpolated between the steps on either side. Not where the asymptotes cross (peak × latency alone): that is too
    early for a server that batches, and too late for one that waits for a batch to fill."""
    high = first_at_peak(by_level)
    low = max((level for level in by_level if level < high), default=None)
    at_high = by_level[high].rps.value
    if low is None:
        return float(high), at_high
    at_knee, at_low = AT_PEAK * max(step.rps.value for step in by_level.values()), by_level[low].rps.value
    return low + (high - low) * (at_knee - at_low) / (at_high - at_low), at_knee


def confirmed(open_loop: Sequence[Step], options: Options) -> float | None:
    """The largest offered rate at which arrivals that do not wait were served within the objective; 0 if none was, None
    if none was tried."""
    rates = [step.offered_rps for step in open_loop if step.offered_rps is not None and step.holds(options)]
    return max(rates, default=0.0 if open_loop else None)


def rates_to_try(steps: Sequence[Step], options: Options) -> list[float]:
    """Open-loop rates, highest first: the model's largest, then what remains if reality is worse."""
    curve = Curve.of(steps)
    start = min(max(largest_rate(curve, options.slo_p95_ms), 0.5 * curve.peak_rps), 0.98 * curve.peak_rps)
    return [start * share for share in RATE_SHARES]


def most_unanswered(steps: Sequence[Step], options: Options) -> float:
    """So many in flight are far beyond the objective: arrivals that pile up to it have failed."""
    within, _ = objective(usable(steps), options)
    return math.inf if within is None else 4.0 * within


def gives_out(by_level: dict[int, Step], within: int | None, *, local: bool) -> tuple[str, str]:
    """What limits the step just past the objective (or the last one): name and evidence."""
    past = [step for level, step in by_level.items() if within is None or level > within]
    step = past[0] if past else list(by_level.values())[-1]
    server, all_requests = step.server, step.requests + step.refused + step.errors
    # Without a quota in sight, the machine's CPUs are the limit, and only if the server is on this machine.
    cpus = server.runners or (os.cpu_count() if local else None)
    client, gpu, runners = step.client_cpu_share, server.gpu_utilization or 0.0, server.runner_busy_share or 0.0
    cores = server.cpu_cores or 0.0
    causes = (
        (client >= CLIENT_BUSY, "client", f"this client used {client:.0%} of a CPU: the server may carry more"),
        (gpu >= BUSY, "gpu", f"GPU busy {gpu:.0%} of the time"),
        (runners >= BUSY, "runners", f"model runners busy {runners:.0%} of the time"),
        (cpus is not None and cores >= BUSY * cpus, "cpu", f"{cores:.2f} of {cpus or 0:g} CPUs in use"),
        (step.refused > 0.01 * all_requests, "queue", f"{step.refused} of {all_requests} requests refused"),
        (step.errors > 0.01 * all_requests, "errors", f"{step.errors} of {all_requests} requests broke or failed"),
        (True, "latency", f"p95 {step.p95_ms.value:.1f} ms, no resource seen at its limit: waits, locks or sleep"),
    )
    name, why = next((name, why) for holds, name, why in causes if holds)
    return name, f"at {step.in_flight:.0f} in flight: {why}"


def others_cores(step: Step) -> float:
    """CPUs of this machine that neither client nor server used; 0 where that cannot be told."""
    if step.machine_cpu_cores is None or step.server.cpu_cores is None:
        return 0.0
    return step.machine_cpu_cores - step.client_cpu_share - step.server.cpu_cores


def disturbed(step: Step) -> bool:
    """Whether other processes took from a server on this machine."""
    return others_cores(step) > OTHERS_CORES


def warnings(
    steps: Sequence[Step], open_loop: Sequence[Step], within: int | None, options: Options, *, local: bool
) -> list[str]:
    """What a reader must know before trusting the numbers."""

    def levels(chosen: Sequence[Step]) -> str:
        return ", ".join(f"{step.in_flight:.0f}" for step in chosen)

    everything = [*steps, *open_loop]
    busy = max(step.client_cpu_share for step in steps)
    others = [step for step in everything if local and disturbed(step)]
    # A few of the closed loop's steps do no harm, but each of the open loop's decides.
    harmful = len(others) > len(everything) / 10 or any(step in others for step in open_loop)
    unstable = [step for step in steps if not step.stable]
    repeated = [step for step in steps if step.repeats]
    none_held = confirmed(open_loop, options) == 0
    said = (
        (busy >= CLIENT_BUSY, f"The client used up to {busy:.0%} of a CPU; run it from more or other machines."),
        (local, "Client and server shared this machine: a replica with its CPUs to itself carries more."),
        (
            harmful,
            f"Other processes used up to {max(map(others_cores, others), default=0):.1f} CPUs of this machine during "
            f"{len(others)} of {len(everything)} steps: measure again when it is quiet.",
        ),
        (unstable, f"Not stable within the time for a step, at in-flight {levels(unstable)}: see the intervals."),
        (repeated, f"Measured twice, because a heavier load did better, at in-flight {levels(repeated)}."),
        (
            within is None,
            f"p95 is over {options.slo_p95_ms:g} ms even with one request in flight: no target can hold it.",
        ),
        (
            within is not None and within >= options.max_in_flight,
            f"The objective held up to --max-in-flight {options.max_in_flight}: the limit was not found.",
        ),
        (
            none_held,
            "No rate of arrivals was within the objective, not even "
            f"{min((step.offered_rps or 0.0 for step in open_loop), default=0.0):.1f} rps, though waiting clients "
            "were: a few that arrive at once are refused or late, so no target can hold it.",
        ),
    )
    return [text for holds, text in said if holds]
