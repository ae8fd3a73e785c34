"""What the steps say: peak, knee, the largest load within the objective, and what gives out first."""

import math
import os
from collections.abc import Sequence

from loadtest.capacity import explore
from loadtest.capacity.explore import AT_PEAK, first_at_peak, objective
from loadtest.capacity.openloop import Curve, largest_rate
from loadtest.capacity.schema import Findings, Options, Step

# A client this busy measures itself.
CLIENT_BUSY = 0.85
BUSY = 0.9
# More than what a machine at rest does.
OTHERS_CORES = 0.2


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
    knee, rule = find_knee(by_level)
    within, _ = objective(by_level, options)
    best_within = max((s.rps.value for n, s in by_level.items() if within is not None and n <= within), default=None)
    cause, why = gives_out(by_level, within, local=local)
    return Findings(
        peak_rps=peak.rps.value,
        peak_in_flight=peak.in_flight,
        knee_in_flight=knee,
        knee_rps=_rps_at(by_level, knee),
        knee_rule=rule,
        objective_in_flight=None if within is None else float(within),
        objective_rps=best_within,
        open_loop_rps=confirmed(open_loop, options),
        gives_out=cause,
        gives_out_why=why,
        warnings=warnings(steps, open_loop, within, options, local=local),
    )


def find_knee(by_level: dict[int, Step]) -> tuple[float, str]:
    """The in-flight beyond which more of it mostly waits: where throughput reaches AT_PEAK of its peak, interpolated
    between the steps on either side. Not where the asymptotes cross (peak × latency alone): that is too early for a
    server that batches, and too late for one that waits for a batch to fill."""
    share = AT_PEAK * max(step.rps.value for step in by_level.values())
    high = first_at_peak(by_level)
    low = max((level for level in by_level if level < high), default=None)
    rule = f"throughput reaches {AT_PEAK:.0%} of its peak"
    if low is None:
        return float(high), rule
    at_low, at_high = by_level[low].rps.value, by_level[high].rps.value
    return low + (high - low) * (share - at_low) / (at_high - at_low), rule


def _rps_at(by_level: dict[int, Step], in_flight: float) -> float:
    index = round(in_flight) - 1
    throughput = Curve.of(list(by_level.values())).throughput
    return float(throughput[min(max(index, 0), len(throughput) - 1)])


def confirmed(open_loop: Sequence[Step], options: Options) -> float | None:
    """The largest offered rate at which arrivals that do not wait were served within the objective; 0 if none was, None
    if none was tried."""
    rates = [
        step.offered_rps
        for step in open_loop
        if step.offered_rps is not None and step.holds(options.slo_p95_ms, options.allowed_failure_percent / 100)
    ]
    return max(rates, default=0.0 if open_loop else None)


def _bursts(open_loop: Sequence[Step], options: Options) -> list[str]:
    if confirmed(open_loop, options) != 0:
        return []
    least = min(step.offered_rps or 0.0 for step in open_loop)
    return [
        f"No rate of arrivals was within the objective, not even {least:.1f} rps, though waiting clients were: a few "
        "that arrive at once are refused or late, so no target can hold it."
    ]


def rates_to_try(steps: Sequence[Step], options: Options) -> list[float]:
    """Open-loop rates, highest first: the model's largest, then what remains if reality is worse."""
    curve = Curve.of(steps)
    predicted = largest_rate(curve, options.slo_p95_ms)
    start = min(max(predicted, 0.5 * curve.peak_rps), 0.98 * curve.peak_rps)
    # The last are for servers that refuse, or collapse, when a few arrive at once.
    return [start * share for share in (1.0, 0.93, 0.86, 0.78, 0.68, 0.55, 0.42, 0.3, 0.2, 0.1)]


def most_unanswered(steps: Sequence[Step], options: Options) -> float:
    """So many in flight are far beyond the objective: arrivals that pile up to it have failed."""
    within, _ = objective(usable(steps), options)
    return math.inf if within is None else 4.0 * within


def gives_out(by_level: dict[int, Step], within: int | None, *, local: bool) -> tuple[str, str]:
    """What limits the step just past the objective (or the last one): name and evidence."""
    past = [step for level, step in by_level.items() if within is None or level > within]
    step = past[0] if past else list(by_level.values())[-1]
    server = step.server
    # Without a quota in sight, the machine's CPUs are the limit, and only if the server is on this machine.
    cpus = server.runners or (os.cpu_count() if local else None)
    where = f"at {step.in_flight:.0f} in flight"
    if step.client_cpu_share >= CLIENT_BUSY:
        return "client", f"this client used {step.client_cpu_share:.0%} of a CPU {where}: the server may carry more"
    if server.gpu_utilization is not None and server.gpu_utilization >= BUSY:
        return "gpu", f"GPU busy {server.gpu_utilization:.0%} of the time {where}"
    if server.runner_busy_share is not None and server.runner_busy_share >= BUSY:
        return "runners", f"model runners busy {server.runner_busy_share:.0%} of the time {where}"
    if server.cpu_cores is not None and cpus and server.cpu_cores >= BUSY * cpus:
        return "cpu", f"{server.cpu_cores:.2f} of {cpus:g} CPUs in use {where}"
    if step.refused > 0.01 * (step.requests + step.refused):
        return "queue", f"{step.refused} of {step.requests + step.refused} requests refused {where}"
    if step.errors > 0.01 * (step.requests + step.errors):
        return "errors", f"{step.errors} of {step.requests + step.errors} requests broke or failed {where}"
    return (
        "latency",
        f"p95 {step.p95_ms.value:.1f} ms {where}, no resource seen at its limit: waits, locks or sleep",
    )


def others_cores(step: Step) -> float:
    """CPUs of this machine that neither client nor server used; 0 where that cannot be told."""
    if step.machine_cpu_cores is None or step.server.cpu_cores is None:
        return 0.0
    return step.machine_cpu_cores - step.client_cpu_share - step.server.cpu_cores


def disturbed(step: Step) -> bool:
    """Whether other processes took from a server on this machine."""
    return others_cores(step) > OTHERS_CORES


def _company(steps: Sequence[Step], open_loop: Sequence[Step]) -> list[str]:
    """A few of the closed loop's steps do no harm, but each of the open loop's decides."""
    everything = [*steps, *open_loop]
    found = [step for step in everything if disturbed(step)]
    if len(found) <= len(everything) / 10 and not any(disturbed(step) for step in open_loop):
        return []
    most = max(others_cores(step) for step in found)
    return [
        f"Other processes used up to {most:.1f} CPUs of this machine during {len(found)} of {len(everything)} steps: "
        "measure again when it is quiet."
    ]


def warnings(
    steps: Sequence[Step], open_loop: Sequence[Step], within: int | None, options: Options, *, local: bool
) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    busy = max(step.client_cpu_share for step in steps)
    if busy >= CLIENT_BUSY:
        found.append(f"The client used up to {busy:.0%} of a CPU; run it from more or other machines.")
    if local:
        found.append("Client and server shared this machine: a replica with its CPUs to itself carries more.")
        found += _company(steps, open_loop)
    unstable = [f"{step.in_flight:.0f}" for step in steps if not step.stable]
    if unstable:
        found.append(f"Not stable within the time for a step, at in-flight {', '.join(unstable)}: see the intervals.")
    repeated = [f"{step.in_flight:.0f}" for step in steps if step.repeats]
    if repeated:
        found.append(f"Measured twice, because a heavier load did better, at in-flight {', '.join(repeated)}.")
    if within is None:
        found.append(f"p95 is over {options.slo_p95_ms:g} ms even with one request in flight: no target can hold it.")
    elif within >= options.max_in_flight:
        found.append(f"The objective held up to --max-in-flight {options.max_in_flight}: the limit was not found.")
    return [*found, *_bursts(open_loop, options)]
