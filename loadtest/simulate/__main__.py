"""Command line of `python -m loadtest.simulate`."""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import msgspec

from loadtest import shapes
from loadtest.capacity import plots as capacity_plots
from loadtest.capacity import schema, sizes
from loadtest.capacity.schema import Report
from loadtest.simulate import plots, sweep
from loadtest.simulate.fleet import Signal, World
from loadtest.simulate.hpa import DEPLOYED
from loadtest.simulate.replica import BOUND, Replica

SCHEMA_VERSION = 1
SIGNALS: tuple[Signal, ...] = ("inflight", "cpu", "queue")
DEFAULT_SHAPES = ("growth", "ramp", "diurnal")
SHAPES = ("growth", *shapes.NAMES[:-1])
TEMPLATE = Path(__file__).with_name("simulation.html.j2")


class Simulation(msgspec.Struct, frozen=True):
    """`simulation.json`."""

    run_id: str
    derived_holds: bool
    generated: list[sweep.Trial]
    best: sweep.Trial | None
    trials: list[sweep.Trial]
    schema_version: int = SCHEMA_VERSION


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: simulated; 1: with --check, a generated HPA does not hold; 2: wrong use."""
    args = _parser().parse_args(arguments)
    try:
        report = schema.read(args.report)
        if report.derivation is None:
            raise schema.ReportError(f"{args.report}: has no targets: nothing met the objective, see its report.html")
        setup = _setup(report, args)
    except (schema.ReportError, shapes.ShapeError) as error:
        print(f"loadtest.simulate: {error}", file=sys.stderr)
        return 2
    floor = report.derivation.min_replicas if args.min_replicas is None else args.min_replicas
    least = sorted({max(1, round(floor * factor)) for factor in (1.0, 1.5, 2.0)})
    trials = [each for signal in args.signals for each in sweep.sweep(setup, signal, least)]
    made = sweep.generated(setup, floor)
    holds = all(each.holds for each in made)
    result = Simulation(report.run.id, holds, made, sweep.cheapest(trials), trials)
    verdict = _verdict(result, setup)
    print("\n".join(verdict))
    written = _write(setup, args.out, result, verdict)
    print("written: " + " ".join(str(path) for path in written))
    return 1 if args.check and not holds else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.simulate",
        description="Does the target hold under these traces, and which is the cheapest that does?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("report", type=Path, help="report.json of python -m loadtest.capacity")
    parser.add_argument("--out", type=Path, default=Path("capacity/simulation"), help="folder for the results")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=DEFAULT_SHAPES,
        choices=SHAPES,
        help="traffic; growth: as the targets were derived for",
    )
    parser.add_argument("--trace", type=Path, action="append", default=[], help="CSV seconds,rate, not --shapes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="length of each shape")
    parser.add_argument("--base-rps", type=float, help="of the shapes; default: the capacity run's, or one replica's")
    parser.add_argument("--peak-rps", type=float, help="of the shapes; default: the capacity run's, or 10 × base")
    parser.add_argument("--min-replicas", type=int, help="swept from this to twice; default: the derived")
    parser.add_argument("--max-replicas", type=int, help="default: twice what the highest rate needs at the target")
    parser.add_argument("--signals", nargs="+", default=SIGNALS, choices=SIGNALS, help="what to scale on")
    parser.add_argument("--allowed-violation-percent", type=float, default=1.0, help="of a trace's requests")
    parser.add_argument("--bound", type=int, default=BOUND, help="requests a replica holds before it refuses")
    parser.add_argument("--lose", nargs=2, type=float, action="append", default=[], metavar=("SECOND", "PODS"))
    parser.add_argument("--check", action="store_true", help="exit code 1 if a generated HPA does not hold")
    parser.add_argument("--seed", type=int, default=0, help="of the metric's noise")
    return parser


def _setup(report: Report, args: argparse.Namespace) -> sweep.Setup:
    targets, options = report.derivation, report.options
    assert targets is not None
    if args.trace:
        chosen = [shapes.read_trace(path) for path in args.trace]
    else:
        base = args.base_rps or options.base_rps or targets.target_rps
        peak = args.peak_rps or options.peak_rps or sizes.PEAK_FACTOR * base
        grown = shapes.growth(base, max(base, peak), args.seconds, options.growth_percent_per_second)
        chosen = [
            grown if name == "growth" else shapes.shape(name, base, max(base, peak), args.seconds)
            for name in args.shapes
        ]
    highest = max(shape.highest for shape in chosen)
    start = sum(delay.seconds for delay in targets.delays if delay.name.startswith(("process", "readiness")))
    world = World(
        scrape_seconds=options.scrape_seconds,
        window_seconds=options.window_seconds,
        sync_seconds=options.sync_seconds,
        pending_seconds=options.node_seconds + options.pull_seconds,
        start_seconds=start,
        losses=tuple((second, int(pods)) for second, pods in args.lose),
        seed=args.seed,
    )
    return sweep.Setup(
        report=report,
        replica=Replica.of(report, args.bound),
        world=world,
        shapes=chosen,
        max_replicas=args.max_replicas or max(targets.max_replicas, math.ceil(2 * highest / targets.target_rps)),
        allowed_violation=args.allowed_violation_percent / 100,
        behavior=DEPLOYED,
    )


def _words(trial: sweep.Trial) -> str:
    target = f"{trial.target:.0%}" if trial.signal == "cpu" else f"{trial.target:.3g}"
    unit = {"inflight": "in flight", "cpu": "of the CPU request", "queue": "ms queue wait"}[trial.signal]
    also = "" if trial.cpu_target is None else f" and {trial.cpu_target:.0%} of the CPU request"
    return (
        f"{target} {unit}{also}, at least {trial.min_replicas} replicas: {trial.replica_hours:.1f} replica-hours, "
        f"{trial.violation_share:.2%} of the worst trace's requests in violation"
    )


def _verdict(result: Simulation, setup: sweep.Setup) -> list[str]:
    """What the generated components do, and the cheapest of what was swept, in one line each."""
    hours = sum(shape.seconds for shape in setup.shapes) / 3600
    traces = ", ".join(f"{shape.name} to {shape.highest:.0f} rps" for shape in setup.shapes)
    lines = [f"Simulated: {hours:.1f} h of traffic ({traces}); at most {setup.allowed_violation:.0%} in violation."]
    for each in result.generated:
        verb = "holds" if each.holds else "DOES NOT HOLD"
        lines.append(f"component/{each.signal} {verb}: {_words(each)}.")
    for signal in dict.fromkeys(each.signal for each in result.trials):
        best = sweep.cheapest([each for each in result.trials if each.signal == signal])
        words = _words(best) if best else "no target tried holds"
        lines.append(f"Cheapest by {signal}: {words}.")
    return lines


def _write(setup: sweep.Setup, folder: Path, result: Simulation, verdict: list[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"cost": plots.cost(result.trials, result.best, setup.allowed_violation)}
    for made in result.generated:
        signal = next(name for name in SIGNALS if name == made.signal)
        for shape in setup.shapes:
            line = sweep.run(setup, signal, made.target, made.min_replicas, shape, made.cpu_target)
            safe = re.sub(r"[^\w.-]+", "-", shape.name).strip("-")
            figures[f"trace-{signal}-{safe}"] = plots.timeline(
                f"component/{signal}, {shape.name}", line, setup.replica.slo_ms
            )
    world = setup.world
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    text = page.render(
        run_id=result.run_id,
        verdict=verdict,
        best=result.best,
        generated=result.generated,
        trials=result.trials,
        traces=", ".join(f"{shape.name} ({shape.seconds:g} s)" for shape in setup.shapes),
        delays=f"scrape {world.scrape_seconds:g} s, mean over {world.window_seconds:g} s, "
        f"sync {world.sync_seconds:g} s, pending {world.pending_seconds:g} s, start {world.start_seconds:.1f} s",
        drawings=[capacity_plots.svg(figure) for figure in figures.values()],
    )
    (folder / "simulation.html").write_text(text)
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=2)
    (folder / "simulation.json").write_bytes(encoded + b"\n")
    return [folder / "simulation.json", folder / "simulation.html", *capacity_plots.save(figures, folder)]


if __name__ == "__main__":
    sys.exit(main())
