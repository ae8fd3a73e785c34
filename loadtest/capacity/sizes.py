"""Requests, limits and replica bounds from what was measured. Arithmetic only; each result says how it came about."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from loadtest.capacity.schema import Options, Step

Say = Callable[[str, str, str], None]

MIB = 1024 * 1024
MEMORY_REQUEST_FACTOR = 1.2
# For large bodies and batches that the measured load did not send.
MEMORY_ROOM_MIB = 256
# Kubernetes takes any amount of CPU; people read tenths.
CPU_UNIT = 0.1
# Without a peak given, the fleet may grow to this many times its base.
PEAK_FACTOR = 10
# A HPA keeps away from 100 % of the request: there it could not see more.
MAX_CPU_PERCENT = 90


def at_rate(
    steps: Sequence[Step], rps: float, of: Callable[[Step], float | None], *, proportional: bool = False
) -> float | None:
    """A value of the closed-loop steps, interpolated by their rates up to the peak. Below the least loaded step it is
    that step's, or in proportion to the rate."""
    rates, values = [0.0] if proportional else [], [0.0] if proportional else []
    for step in sorted(steps, key=lambda step: step.in_flight):
        value = of(step)
        if value is not None and step.rps.value > max(rates, default=0.0):
            rates.append(step.rps.value)
            values.append(value)
    return float(np.interp(rps, rates, values)) if any(rates) else None


def cpu(
    steps: Sequence[Step], limit_rps: float, target_rps: float, say: Say
) -> tuple[float | None, float | None, int | None]:
    """Request and limit in cores, and the utilisation target of an HPA on CPU, in percent of the request."""
    at_limit = at_rate(steps, limit_rps, lambda step: step.server.cpu_cores, proportional=True)
    at_target = at_rate(steps, target_rps, lambda step: step.server.cpu_cores, proportional=True)
    if not at_limit or at_target is None:
        say("CPU", "the server shows no CPU time (process_cpu_seconds_total)", "not derived")
        return None, None, None
    request = math.ceil(round(at_limit / CPU_UNIT, 6)) * CPU_UNIT
    say("CPU request", f"cores in use at {limit_rps:.1f} rps: {at_limit:.2f}, rounded up", f"{request:.1f}")
    runners = max((step.server.runners or 0 for step in steps), default=0)
    most = max(step.server.cpu_cores or 0 for step in steps)
    limit = float(max(runners, math.ceil(round(request, 6))) if runners else math.ceil(max(most, request)))
    why = f"{runners:g} runners, one CPU each" if runners else f"most cores in use {most:.2f}, rounded up"
    # The server starts as many runners as its CPU limit allows, so the limit is part of what was measured.
    say("CPU limit", why, f"{limit:g}")
    percent = min(MAX_CPU_PERCENT, math.floor(100 * at_target / request))
    say(
        "CPU utilisation target",
        f"{at_target:.2f} cores at {target_rps:.1f} rps / {request:.1f} × 100 %",
        f"{percent} %",
    )
    return round(request, 1), limit, max(1, percent)


def memory(steps: Sequence[Step], say: Say) -> tuple[int | None, int | None]:
    """Request and limit in bytes, from the largest resident size seen in any step, overload included."""
    most = max((step.server.memory_bytes or 0 for step in steps), default=0)
    if not most:
        say("Memory", "the server shows no memory (process_resident_memory_bytes)", "not derived")
        return None, None
    request = math.ceil(most * MEMORY_REQUEST_FACTOR / (16 * MIB)) * 16 * MIB
    limit = request + MEMORY_ROOM_MIB * MIB
    how = f"most seen {most / MIB:.0f} MiB × {MEMORY_REQUEST_FACTOR:g}, in steps of 16 MiB"
    say("Memory request", how, f"{request // MIB} MiB")
    say("Memory limit", f"{request // MIB} + {MEMORY_ROOM_MIB} for what this load did not send", f"{limit // MIB} MiB")
    return request, limit


def replicas(options: Options, limit_rps: float, target_rps: float, say: Say) -> tuple[int, int]:
    """The least and most replicas. The least carry the base rate, and within the objective after a loss too."""
    base = options.base_rps if options.base_rps is not None else target_rps
    peak = options.peak_rps if options.peak_rps is not None else PEAK_FACTOR * base
    source = "--base-rps" if options.base_rps is not None else "base rate not given, so one replica's target"

    def lost(count: int) -> int:
        return 1 if options.survive == "replica" else math.ceil(count / options.zones)

    low = max(2 if options.survive == "replica" else options.zones, math.ceil(base / target_rps))
    while (low - lost(low)) * limit_rps < base:
        low += 1
    say(
        "Min replicas",
        f"n ≥ {base:.1f} / {target_rps:.1f} ({source}) with (n - {lost(low)} lost) × {limit_rps:.1f} ≥ {base:.1f}",
        str(low),
    )
    high = max(low + 1, math.ceil(peak / target_rps) + lost(math.ceil(peak / target_rps)))
    how = "--peak-rps" if options.peak_rps is not None else f"{PEAK_FACTOR} × base"
    say("Max replicas", f"{peak:.1f} ({how}) / {target_rps:.1f}, and what is lost", str(high))
    return low, high
