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
from loadtest.capacity import schema
from loadtest.capacity.schema import Report
from loadtest.simulate import plots, sweep
from loadtest.simulate.fleet import Signal, World
from loadtest.simulate.hpa import Behavior
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
    best: sweep.Trial | None
    trials: list[sweep.Trial]
    schema_version: int = SCHEMA_VERSION


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: simulated; 1: with --check, the derived target does not hold; 2: wrong use."""
    args = _parser().parse_args(arguments)
    try:
        report = schema.read(args.report)
        if report.derivation is None:
            raise schema.ReportError(f"{args.report}: has no targets: not even one request met the objective")
        setup = _setup(report, args)
    except (schema.ReportError, shapes.ShapeError) as error:
        print(f"loadtest.simulate: {error}", file=sys.stderr)
        return 2
    floor = report.derivation.min_replicas if args.min_replicas is None else args.min_replicas
    least = sorted({max(1, round(floor * factor)) for factor in (1.0, 1.5, 2.0)})
    trials = [each for signal in args.signals for each in sweep.sweep(setup, signal, least)]
    derived = sweep.trial(setup, "inflight", report.derivation.target_in_flight, floor)
    best = sweep.cheapest(trials)
    verdict = _verdict(derived, best, args.allowed_violation_percent)
    print(verdict)
    for signal in args.signals:
        of_signal = sweep.cheapest([each for each in trials if each.signal == signal])
        print(f"  {signal:<9} {_words(of_signal) if of_signal else 'no target holds'}")
    written = _write(setup, args.out, Simulation(report.run.id, derived.holds, best, trials), verdict)
    print("written: " + " ".join(str(path) for path in written))
    return 1 if args.check and not derived.holds else 0


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
    parser.add_argument("--peak-rps", type=float, help="of the shapes; default: the capacity run's, or 5 × base")
    parser.add_argument("--min-replicas", type=int, help="swept from this to twice; default: the derived")
    parser.add_argument("--max-replicas", type=int, help="default: twice what the highest rate needs at the target")
    parser.add_argument("--signals", nargs="+", default=SIGNALS, choices=SIGNALS, help="what to scale on")
    parser.add_argument("--allowed-violation-percent", type=float, default=1.0, help="of a trace's requests")
    parser.add_argument("--bound", type=int, default=BOUND, help="requests a replica holds before it refuses")
    parser.add_argument("--lose", nargs=2, type=float, action="append", default=[], metavar=("SECOND", "PODS"))
    parser.add_argument("--check", action="store_true", help="exit code 1 if the derived target does not hold")
    parser.add_argument("--seed", type=int, default=0, help="of the metric's noise")
    return parser


def _setup(report: Report, args: argparse.Namespace) -> sweep.Setup:
    targets, options = report.derivation, report.options
    assert targets is not None
    if args.trace:
        chosen = [shapes.read_trace(path) for path in args.trace]
    else:
        base = args.base_rps or options.base_rps or targets.target_rps
        peak = args.peak_rps or options.peak_rps or 5 * base
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
        behavior=Behavior(),
    )


def _words(trial: sweep.Trial) -> str:
    unit = {"inflight": "in flight", "cpu": "of the CPU request", "queue": "ms queue wait"}[trial.signal]
    return (
        f"{trial.target:.3g} {unit}, at least {trial.min_replicas} replicas: {trial.replica_hours:.2f} replica-hours, "
        f"{trial.violation_share:.2%} of the worst trace's requests in violation"
    )


def _verdict(derived: sweep.Trial, best: sweep.Trial | None, allowed: float) -> str:
    verb = "holds" if derived.holds else "does not hold"
    first = f"The derived target {verb} (at most {allowed:g} % in violation): {_words(derived)}."
    return f"{first} {'Cheapest that holds: ' + _words(best) if best else 'No target tried holds'}."


def _write(setup: sweep.Setup, folder: Path, result: Simulation, verdict: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"cost": plots.cost(result.trials, result.best, setup.allowed_violation)}
    shown = result.best or min(result.trials, key=lambda each: each.violation_share)
    signal = next(name for name in SIGNALS if name == shown.signal)
    for shape in setup.shapes:
        line = sweep.run(setup, signal, shown.target, shown.min_replicas, shape)
        figures["trace-" + re.sub(r"[^\w.-]+", "-", shape.name)] = plots.timeline(
            f"{shape.name}: {_words(shown)}", line, setup.replica.slo_ms
        )
    world = setup.world
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    text = page.render(
        run_id=result.run_id,
        verdict=verdict,
        best=result.best,
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
