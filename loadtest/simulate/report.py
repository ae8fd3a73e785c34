"""What people read of a simulation: the verdict on the terminal, `simulation.html`, `simulation.json`, PNG figures."""

import re
from pathlib import Path

import msgspec

from loadtest.capacity import plots as capacity_plots
from loadtest.capacity import schema
from loadtest.capacity.report import render
from loadtest.simulate import plots, sweep
from loadtest.simulate.sweep import Setup, Trial

SCHEMA_VERSION = 2
TEMPLATE = Path(__file__).with_name("simulation.html.j2")


class Simulation(msgspec.Struct, frozen=True):
    """`simulation.json`."""

    run_id: str
    derived_holds: bool
    generated: list[Trial]
    best: Trial | None
    trials: list[Trial]
    schema_version: int = SCHEMA_VERSION


def verdict(result: Simulation, setup: Setup) -> list[str]:
    """What the generated components do, and the cheapest of what was swept, in one line each."""
    hours = sum(shape.seconds for shape in setup.shapes) / 3600
    traces = ", ".join(f"{shape.name} to {shape.highest:.0f} rps" for shape in setup.shapes)
    lines = [f"Simulated: {hours:.1f} h of traffic ({traces}); at most {setup.allowed_violation:.0%} in violation."]
    for each in result.generated:
        verb = "holds" if each.holds else "DOES NOT HOLD"
        lines.append(f"component/{each.signal} {verb}: {_words(each)}.")
    for signal in dict.fromkeys(each.signal for each in result.trials):
        best = sweep.cheapest([each for each in result.trials if each.signal == signal])
        lines.append(f"Cheapest by {signal}: {_words(best) if best else 'no target tried holds'}.")
    return lines


def _words(trial: Trial) -> str:
    cpu = trial.signal == "cpu"
    target = f"{trial.target:.0%} of the CPU request" if cpu else f"{trial.target:.3g} in flight"
    also = "" if trial.cpu_target is None else f" and {trial.cpu_target:.0%} of the CPU request"
    return (
        f"{target}{also}, at least {trial.min_replicas} replicas: {trial.replica_hours:.1f} replica-hours, "
        f"{trial.violation_share:.2%} of the worst trace's requests in violation"
    )


def write(setup: Setup, folder: Path, result: Simulation) -> list[Path]:
    """Everything, into `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"cost": plots.cost(result.trials, result.best, setup.allowed_violation)}
    for made in result.generated:
        for shape in setup.shapes:
            line = sweep.run(setup, made.signal, made.target, made.min_replicas, shape, made.cpu_target)
            name = re.sub(r"[^\w.-]+", "-", shape.name).strip("-")
            title = f"component/{made.signal}, {shape.name}"
            figures[f"trace-{made.signal}-{name}"] = plots.timeline(title, line, setup.replica.slo_ms)
    page = render(
        TEMPLATE,
        result=result,
        world=setup.world,
        shapes=setup.shapes,
        verdict=verdict(result, setup),
        drawings=[capacity_plots.svg(figure) for figure in figures.values()],
    )
    (folder / "simulation.html").write_text(page)
    schema.write(result, folder / "simulation.json")
    return [folder / "simulation.json", folder / "simulation.html", *capacity_plots.save(figures, folder)]
