"""Command line of `python -m loadtest.simulate`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest import shapes
from loadtest.capacity import schema, sizes
from loadtest.capacity.schema import Derivation, Report
from loadtest.simulate import report, sweep
from loadtest.simulate.fleet import Signal, World
from loadtest.simulate.replica import BOUND, Replica

SIGNALS: tuple[Signal, ...] = ("inflight", "cpu")
DEFAULT_SHAPES = ("growth", "ramp", "diurnal")
SHAPES = ("growth", *shapes.NAMES[:-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: simulated; 1: with --check, a generated HPA does not hold; 2: wrong use."""
    args = _parser().parse_args(arguments)
    try:
        measured = schema.read(args.report)
        targets = measured.derivation
        if targets is None:
            raise schema.ReportError(f"{args.report}: has no targets: nothing met the objective, see its report.html")
        setup = _setup(measured, targets, args)
    except (schema.ReportError, shapes.ShapeError) as error:
        print(f"loadtest.simulate: {error}", file=sys.stderr)
        return 2
    floor = targets.min_replicas if args.min_replicas is None else args.min_replicas
    least = sorted({max(1, round(floor * factor)) for factor in (1.0, 1.5, 2.0)})
    trials = [each for signal in SIGNALS for each in sweep.sweep(setup, signal, least)]
    made = sweep.generated(setup, floor)
    holds = all(each.holds for each in made)
    result = report.Simulation(measured.run.id, holds, made, sweep.cheapest(trials), trials)
    print("\n".join(report.verdict(result, setup)))
    print("written: " + " ".join(str(path) for path in report.write(setup, args.out, result)))
    return 1 if args.check and not holds else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.simulate",
        description="Does the target hold under these traces, and which is the cheapest that does?",
        epilog="example: python -m loadtest.simulate capacity/report.json --shapes ramp diurnal --check",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("report", type=Path, help="report.json of python -m loadtest.capacity")
    parser.add_argument("--out", type=Path, default=Path("capacity/simulation"), help="folder for the results")
    text = "traffic; growth: as the targets were derived for"
    parser.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, choices=SHAPES, help=text)
    parser.add_argument("--trace", type=Path, action="append", default=[], help="CSV seconds,rate, not --shapes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="length of each shape")
    parser.add_argument("--base-rps", type=float, help="of the shapes; default: the capacity run's, or one replica's")
    parser.add_argument("--peak-rps", type=float, help="of the shapes; default: the capacity run's, or 10 × base")
    parser.add_argument("--min-replicas", type=int, help="swept from this to twice; default: the derived")
    parser.add_argument("--max-replicas", type=int, help="default: twice what the highest rate needs at the target")
    parser.add_argument("--allowed-violation-percent", type=float, default=1.0, help="of a trace's requests")
    parser.add_argument("--bound", type=int, default=BOUND, help="requests a replica holds before it refuses")
    parser.add_argument("--lose", nargs=2, type=float, action="append", default=[], metavar=("SECOND", "PODS"))
    parser.add_argument("--check", action="store_true", help="exit code 1 if a generated HPA does not hold")
    return parser


def _setup(measured: Report, targets: Derivation, args: argparse.Namespace) -> sweep.Setup:
    options = measured.options
    base = args.base_rps or options.base_rps or targets.target_rps
    peak = max(base, args.peak_rps or options.peak_rps or sizes.PEAK_FACTOR * base)
    chosen = [shapes.read_trace(path) for path in args.trace] or [
        shapes.growth(base, peak, args.seconds, options.growth_percent_per_second)
        if name == "growth"
        else shapes.shape(name, base, peak, args.seconds)
        for name in args.shapes
    ]
    highest = max(shape.highest for shape in chosen)
    world = World(
        scrape_seconds=options.scrape_seconds,
        window_seconds=options.window_seconds,
        sync_seconds=options.sync_seconds,
        pending_seconds=options.node_seconds + options.pull_seconds,
        start_seconds=sum(wait.seconds for wait in targets.delays if wait.name.startswith(("process", "readiness"))),
        losses=tuple((second, int(pods)) for second, pods in args.lose),
    )
    return sweep.Setup(
        targets=targets,
        replica=Replica.of(measured, args.bound),
        world=world,
        shapes=chosen,
        max_replicas=args.max_replicas or max(targets.max_replicas, math.ceil(2 * highest / targets.target_rps)),
        allowed_violation=args.allowed_violation_percent / 100,
    )
