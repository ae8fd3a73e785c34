"""What the benchmark's report amounts to: figures of merit beside their targets, and the table that people read. Knows
no server.
"""

import heapq
import random
import statistics
from dataclasses import dataclass
from typing import Any

# The loads of the report: connections of closed loops, rates of open loops as shares of capacity, APP_HTTP_PROCESSES.
CONNECTIONS = (1, 8, 64, 256)
OVERLOADS = (0.5, 0.8, 1.2, 2.0, 5.0)
HTTP_PROCESSES = (1, 2)


@dataclass(frozen=True)
class Target:
    """One line of the table of targets: `value` must be at least (or at most) `bound`. `limit` is what a server could
    reach here whose web side costs no more than the floor, and whose model runs as the ceiling's."""

    name: str
    value: float
    bound: float
    at_least: bool
    limit: float | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def client_cpu_ms(load: dict[str, float]) -> float:
    """CPU milliseconds of the load generator for each answer."""
    share = load["client_cpu_share"]
    return load["server_cpu_ms_per_request"] * share / (1 - share)


def queue_p99_ms(service_ms: list[float], rate: float, servers: int, arrivals: int = 100_000) -> float:
    """Of the time in a queue for `servers`, first come, first served: Poisson arrivals at `rate` a second, and times of
    service drawn from `service_ms`."""
    rng = random.Random(0)
    free = [0.0] * servers
    now, times = 0.0, []
    for _ in range(arrivals):
        now += rng.expovariate(rate) * 1e3
        end = max(now, heapq.heappop(free)) + rng.choice(service_ms)
        heapq.heappush(free, end)
        times.append(end - now)
    return sorted(times)[int(0.99 * arrivals)]


def targets(report: dict[str, Any]) -> list[Target]:
    """The figures of merit, each a ratio within the run."""
    ceilings = [report["ceiling_before"], report["ceiling_after"]]
    best = statistics.mean(each["with_tokenising"]["per_second"] for each in ceilings)
    cpu = statistics.mean(each["with_tokenising"]["cpu_ms"] for each in ceilings)
    singles = sorted(ceilings[0]["single_ms"] + ceilings[1]["single_ms"])
    single = singles[len(singles) // 2]
    loops, opens, strict, cpus = report["closed"], report["open"], report["open_100"], report["cpus"]
    floor = report["floor"]
    web, alone = floor[64]["server_cpu_ms_per_request"], loops[1]["p50_ms"]
    half_load = queue_p99_ms(singles, loops[64]["requests_per_second"] / 2, cpus) / single

    def throughput(connections: int, bound: float, of: str = "ceiling") -> Target:
        load = loops[connections]
        limit = cpu / (cpu + web + client_cpu_ms(load))
        return Target(
            f"throughput at {connections} connections / {of}", load["requests_per_second"] / best, bound, True, limit
        )

    def goodput(load: dict[str, float], capacity: float, factor: float, ms: int, bound: float) -> Target:
        rate = load["requests_per_second"] + load["refused_per_second"]
        left = (1e3 * cpus - rate * (web + client_cpu_ms(load))) / cpu
        name = f"goodput within {ms} ms at {factor:g}x / capacity"
        return Target(name, load[f"goodput_{ms}ms_per_second"] / capacity, bound, True, min(factor, left / capacity))

    def at_most(name: str, value: float, bound: float, limit: float | None = None) -> Target:
        return Target(name, value, bound, False, limit)

    return [
        throughput(64, 0.90, "ceiling with tokenisation"),
        throughput(8, 0.70),
        throughput(256, 0.92),
        at_most(
            "CPU per request at 64 / ceiling's CPU", loops[64]["server_cpu_ms_per_request"] / cpu, 1.15, 1 + web / cpu
        ),
        at_most("p50 at 1 connection / (run + tokenise + web floor)", alone / (single + floor[1]["p50_ms"]), 1.25, 1.0),
        at_most("p99 at half load / p50 at 1 connection", report["half_load"]["p99_ms"] / alone, 4, half_load),
        *(goodput(opens[f], report["open_capacity"], f, 250, 0.95) for f in (1.2, 2.0, 5.0)),
        goodput(strict[2.0], report["open_100_capacity"], 2.0, 100, 0.90),
        at_most("p99 / p50 of what is accepted at 2x", opens[2.0]["p99_ms"] / opens[2.0]["p50_ms"], 1.4),
        # Of who comes back too early: at once for all others.
        at_most("time to a refusal at 2x, p99, ms", opens[2.0]["refusal_p99_ms"], 300),
        at_most("time to a refusal at 5x, p99, ms", opens[5.0]["refusal_p99_ms"], 300),
        at_most("process start to ready, s", report["start_seconds"], 1.0),
        at_most("peak memory, MB", report["peak_bytes"] / 1e6, 200),
    ]


def table(report: dict[str, Any]) -> str:
    """What people read."""
    ceilings = [report[name]["with_tokenising"]["per_second"] for name in ("ceiling_before", "ceiling_after")]
    lines = [
        f"ceiling with tokenisation {ceilings[0]:.0f} then {ceilings[1]:.0f} sentences/s on {report['cpus']} CPUs",
        "",
        f"{'load':<24}{'req/s':>9}{'/ceiling':>10}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms':>8}{'client':>8}",
    ]
    rows = {f"closed loop, {n}": row for n, row in report["closed"].items()}
    rows |= {f"open loop, {f:g} x capacity": row for f, row in report["open"].items()}
    rows |= {f"plain FastAPI, {w} worker": report[f"plain_{w}"] for w in (1, 2)}
    for name, row in rows.items():
        rate = row["requests_per_second"]
        lines.append(
            f"{name:<24}{rate:>9.0f}{rate / statistics.mean(ceilings):>10.2f}{row['p50_ms']:>9.1f}{row['p99_ms']:>9.1f}"
            f"{row['server_cpu_ms_per_request']:>8.2f}{row['client_cpu_share']:>8.2f}"
        )
    lines.append("")
    for processes, row in report["free_model"].items():
        engine = row["engine_cpu_ms_per_request"]
        lines.append(
            f"web side alone, APP_HTTP_PROCESSES={processes}: {row['requests_per_second']:.0f} req/s at "
            f"{row['server_cpu_ms_per_request']:.3f} CPU ms; the first process spends {engine:.3f}, enough for "
            f"{1e3 / engine:.0f} req/s"
        )
    lines += ["", f"{'figure':<58}{'value':>9}{'target':>9}{'limit':>9}"]
    for target in targets(report):
        limit = "" if target.limit is None else f"{target.limit:.2f}"
        sign, missed = ">=" if target.at_least else "<=", "" if target.met else "MISSED"
        lines.append(f"{target.name:<58}{target.value:>9.2f}{sign:>4}{target.bound:>5.4g}{limit:>9} {missed}")
    return "\n".join(lines)
