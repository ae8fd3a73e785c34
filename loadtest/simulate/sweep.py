"""Which target is cheapest of those that hold: every target and least number of replicas over every trace."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from loadtest.capacity.component import second_cpu_percent
from loadtest.capacity.schema import Derivation
from loadtest.shapes import Shape
from loadtest.simulate.fleet import Signal, Timeline, World, simulate
from loadtest.simulate.hpa import DEPLOYED, Autoscaler
from loadtest.simulate.replica import Replica

# Of the derived target.
FACTORS = (0.55, 0.75, 1.0, 1.3, 1.7, 2.2, 3.0, 4.0)
# A trace is cut into about this many steps of time, at least a quarter second each, and five between two syncs.
MOST_STEPS, LEAST_STEP_SECONDS = 1800, 0.25


class Trial(msgspec.Struct, frozen=True):
    """One setting over all traces. `violation_share` is the worst trace's, replica-hours are summed. `cpu_target`: of
    CPU as a second metric."""

    signal: Signal
    target: float
    min_replicas: int
    cpu_target: float | None
    replica_hours: float
    violation_share: float
    most_replicas: int
    holds: bool


@dataclass(frozen=True)
class Setup:
    """What does not change between trials."""

    targets: Derivation
    replica: Replica
    world: World
    shapes: Sequence[Shape]
    max_replicas: int
    allowed_violation: float

    def derived_target(self, signal: Signal) -> float | None:
        """The report's target for a signal, in the signal's unit: in flight, share of the request."""
        if signal == "inflight":
            return self.targets.target_in_flight
        return None if self.targets.target_cpu_percent is None else self.targets.target_cpu_percent / 100


def run(
    setup: Setup, signal: Signal, target: float, min_replicas: int, shape: Shape, cpu_target: float | None = None
) -> Timeline:
    """One setting over one trace. It begins as if its load had been there for long."""
    settled = math.ceil(shape.rate(0.0) / setup.targets.target_rps)
    return simulate(
        setup.replica,
        Autoscaler(min_replicas, setup.max_replicas, target, DEPLOYED, cpu=signal == "cpu"),
        setup.world,
        shape.rate,
        shape.seconds,
        signal=signal,
        cpu_request=setup.targets.cpu_request_cores or 1.0,
        cpu_target=cpu_target,
        replicas=min(setup.max_replicas, max(min_replicas, settled)),
        step_seconds=min(setup.world.sync_seconds / 5, max(LEAST_STEP_SECONDS, shape.seconds / MOST_STEPS)),
    )


def trial(setup: Setup, signal: Signal, target: float, min_replicas: int, cpu_target: float | None = None) -> Trial:
    """One setting over all traces."""
    lines = [run(setup, signal, target, min_replicas, shape, cpu_target) for shape in setup.shapes]
    violation = max(line.violation_share(setup.replica.slo_ms) for line in lines)
    return Trial(
        signal=signal,
        target=target,
        min_replicas=min_replicas,
        cpu_target=cpu_target,
        replica_hours=sum(line.replica_hours for line in lines),
        violation_share=violation,
        most_replicas=max(max(line.wanted) for line in lines),
        holds=violation <= setup.allowed_violation,
    )


def generated(setup: Setup, min_replicas: int) -> list[Trial]:
    """The HPAs of the components that the capacity run wrote: in flight with CPU beside it, and CPU alone."""
    percent, cpu = setup.targets.target_cpu_percent, setup.derived_target("cpu")
    beside = None if percent is None else second_cpu_percent(percent) / 100
    found = [trial(setup, "inflight", setup.targets.target_in_flight, min_replicas, beside)]
    return found if cpu is None else [*found, trial(setup, "cpu", cpu, min_replicas)]


def sweep(setup: Setup, signal: Signal, least: Sequence[int], factors: Sequence[float] = FACTORS) -> list[Trial]:
    """Targets around the derived one, with each least number of replicas; none if the signal was not measured."""
    derived = setup.derived_target(signal)
    if derived is None:
        return []
    targets = [derived * factor for factor in factors if signal != "cpu" or derived * factor <= 1.0]
    return [trial(setup, signal, target, count) for count in least for target in targets]


def cheapest(trials: Sequence[Trial]) -> Trial | None:
    """The one that holds for the fewest replica-hours; None if none holds."""
    return min((each for each in trials if each.holds), key=lambda each: each.replica_hours, default=None)
