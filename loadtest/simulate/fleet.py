"""The fleet over time: arrivals split evenly over ready replicas, metrics with their delays, a HPA that reacts.

A fluid model: replicas that became ready together are one cohort and share their numbers, so that thousands of replicas
cost as much as their cohorts. What it leaves out: uneven balancing, single slow requests, retries of clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from loadtest.capacity.openloop import Array
from loadtest.shapes import Rate
from loadtest.simulate.hpa import SYNC_SECONDS, Autoscaler, Metric, Pods
from loadtest.simulate.replica import Replica

Signal = Literal["inflight", "cpu"]


@dataclass(frozen=True)
class World:
    """The delays around the HPA. `losses`: (second, how many ready Pods die)."""

    scrape_seconds: float = 15.0
    window_seconds: float = 60.0
    sync_seconds: float = SYNC_SECONDS
    pending_seconds: float = 10.0
    start_seconds: float = 4.0
    losses: tuple[tuple[float, int], ...] = ()
    noise: bool = True
    seed: int = 0


@dataclass
class Timeline:
    """What happened, one row for each step of time."""

    seconds: list[float] = field(default_factory=list)
    rps: list[float] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    p95_ms: list[float] = field(default_factory=list)
    in_flight: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    step_seconds: float = 1.0

    @property
    def replica_hours(self) -> float:
        """Pods that exist, ready or not: they are paid for."""
        return sum(self.wanted) * self.step_seconds / 3600

    def violation_share(self, slo_ms: float, allowed_failures: float = 0.01) -> float:
        """Share of requests sent while p95 was over the objective or more than allowed were refused."""
        rps, p95, refused = np.array(self.rps), np.array(self.p95_ms), np.array(self.refused)
        bad = (p95 > slo_ms) | (refused > allowed_failures * np.maximum(rps, 1e-9))
        return float(rps[bad].sum() / max(rps.sum(), 1e-9))


class Fleet:
    """Cohorts of Pods: how many, when they run and are ready, what each has in flight, its latest samples."""

    def __init__(self, replica: Replica, world: World, replicas: int) -> None:
        self._replica, self._world = replica, world
        self._rng = np.random.default_rng(world.seed)
        self._keep = max(1, round(world.window_seconds / world.scrape_seconds))
        self.count = np.zeros(0, dtype=np.int64)
        self.ready_at, self.n, self.served, self.cpu = (np.zeros(0) for _ in range(4))
        self.samples: Array = np.zeros((0, self._keep))
        self._add(replicas, ready_at=-1e9)

    @property
    def total(self) -> int:
        return int(self.count.sum())

    def resize(self, now: float, wanted: int) -> None:
        """Creates Pods, or removes the youngest: not ready ones first, as a ReplicaSet does."""
        if wanted > self.total:
            self._add(wanted - self.total, now + self._world.pending_seconds + self._world.start_seconds)
        self._remove(self.total - wanted, from_end=True)

    def lose(self, now: float, pods: int) -> None:
        """Pods die, the oldest for a change; their Deployment makes new ones at once."""
        before = self.total
        self._remove(min(pods, int(self.count[self.ready_at <= now].sum())), from_end=False)
        self.resize(now, before)

    def _add(self, pods: int, ready_at: float) -> None:
        self.count, self.ready_at = np.append(self.count, pods), np.append(self.ready_at, ready_at)
        self.n, self.served, self.cpu = np.append(self.n, 0.0), np.append(self.served, 0.0), np.append(self.cpu, np.nan)
        self.samples = np.vstack((self.samples, np.full((1, self._keep), np.nan)))

    def _remove(self, pods: int, *, from_end: bool) -> None:
        order = range(len(self.count) - 1, -1, -1) if from_end else range(len(self.count))
        for index in order:
            taken = min(max(pods, 0), int(self.count[index]))
            self.count[index] -= taken
            pods -= taken
        keep = self.count > 0
        self.count, self.ready_at, self.n = self.count[keep], self.ready_at[keep], self.n[keep]
        self.served, self.samples, self.cpu = self.served[keep], self.samples[keep], self.cpu[keep]

    def serve(self, now: float, rps: float, seconds: float) -> tuple[int, float, float, float]:
        """One step of time: ready Pods, p95, in flight, refused per second."""
        ready = self.ready_at <= now
        pods = self.count[ready]
        if not pods.sum():
            self.served[:] = 0.0
            return 0, float("inf"), 0.0, rps
        each = rps / float(pods.sum())
        n, served, refused, is_steady = self._replica.step(self.n[ready], each, seconds)
        p95 = self._replica.latency(n, each, is_steady)
        self.n[ready], self.served[ready] = n, served
        # The slowest cohort's matters: an objective is not met by half of the fleet.
        return int(pods.sum()), float(p95.max()), float(pods @ n), float(pods @ refused)

    def scrape(self, now: float, cpu_request: float) -> None:
        """A sample of every ready Pod."""
        ready, value = self.ready_at <= now, self.n
        if self._world.noise:
            # A gauge read at an instant: as far from its mean as a count of independent things is.
            spread = np.sqrt(np.maximum(value, 0.0) / np.maximum(self.count, 1))
            value = np.maximum(0.0, value + spread * self._rng.standard_normal(len(value)))
        self.samples = np.roll(self.samples, 1, axis=1)
        self.samples[:, 0] = np.where(ready, value, np.nan)
        cores = np.interp(self.served, self._replica.rates, self._replica.cpu_cores)
        self.cpu = np.where(ready, cores / cpu_request, np.nan)

    def pods(self, now: float, signal: Signal) -> Pods:
        """What the HPA sees now."""
        running = self.ready_at - self._world.start_seconds <= now
        # CPU takes the last reading; a metric of Prometheus is averaged over a window.
        columns = self.cpu[:, np.newaxis] if signal == "cpu" else self.samples
        seen = ~np.isnan(columns).all(axis=1)
        means = np.nanmean(columns[seen], axis=1) if seen.any() else np.zeros(0)
        # A Pod that runs without a sample is missing, one that waits for its node or image is ignored.
        missing, ignored = int(self.count[running & ~seen].sum()), int(self.count[~running].sum())
        return Pods(np.repeat(means, self.count[seen]), missing, ignored)


def simulate(
    replica: Replica,
    scaler: Autoscaler,
    world: World,
    rate: Rate,
    seconds: float,
    *,
    signal: Signal = "inflight",
    cpu_request: float = 1.0,
    cpu_target: float | None = None,
    replicas: int | None = None,
    step_seconds: float = 1.0,
) -> Timeline:
    """Runs the fleet for `seconds`, from `replicas` (None: the HPA's least). `cpu_target`: CPU as a second metric."""
    fleet = Fleet(replica, world, replicas or scaler.min_replicas)
    line = Timeline(step_seconds=step_seconds)
    wanted = fleet.total
    losses: Sequence[tuple[float, int]] = sorted(world.losses)
    next_scrape, next_sync = 0.0, world.sync_seconds
    for index in range(round(seconds / step_seconds)):
        now = index * step_seconds
        while losses and losses[0][0] <= now:
            fleet.lose(now, losses[0][1])
            losses = losses[1:]
        rps = rate(now)
        ready, p95, in_flight, refused = fleet.serve(now, rps, step_seconds)
        if now >= next_scrape:
            fleet.scrape(now, cpu_request)
            next_scrape += world.scrape_seconds
        if now >= next_sync:
            also = [] if cpu_target is None else [Metric(cpu_target, fleet.pods(now, "cpu"), cpu=True)]
            wanted = scaler.sync(now, wanted, fleet.pods(now, signal), also)
            fleet.resize(now, wanted)
            next_sync += world.sync_seconds
        line.seconds.append(now)
        line.rps.append(rps)
        line.ready.append(ready)
        line.wanted.append(fleet.total)
        line.p95_ms.append(p95)
        line.in_flight.append(in_flight)
        line.refused.append(refused)
    return line
