"""Command line of `python -m loadtest.capacity`."""

import argparse
import sys
from pathlib import Path
from typing import get_args
from urllib.parse import urljoin

import msgspec
import uvloop

from loadtest.benchmark.load import allow_connections
from loadtest.capacity import report
from loadtest.capacity.analysis import NoAnswer
from loadtest.capacity.run import Load, given, run, tensors, texts
from loadtest.capacity.schema import Options
from loadtest.connection import Target, TargetError
from loadtest.payloads import Payload, PayloadError, Served

EXIT_OBJECTIVE, EXIT_TARGET = 1, 2


def main() -> int:
    """Exit code 0: targets derived; 1: no load is within the objective; 2: wrong use or no server."""
    args = _parser().parse_args()
    options = msgspec.convert({name: getattr(args, name) for name in Options.__struct_fields__}, Options)
    allow_connections()
    try:
        target = Target.of(args.url)
        metrics_url = None if args.metrics_url == "none" else args.metrics_url or urljoin(args.url, "/metrics")
        found = uvloop.run(run(target, options, _load(target, args), metrics_url, quiet=args.quiet))
        written = report.write(found, args.out)
    except (TargetError, PayloadError, NoAnswer, OSError) as error:
        print(f"loadtest.capacity: {error}", file=sys.stderr)
        return EXIT_TARGET
    for name, value in report.answer(found).items():
        print(f"{name + ':':<52} {value}")
    for warning in found.findings.warnings:
        print(f"note: {warning}", file=sys.stderr)
    print("written: " + " ".join(str(path) for path in written))
    return 0 if found.derivation is not None else EXIT_OBJECTIVE


def _load(target: Target, args: argparse.Namespace) -> Load:
    """What to send: what the options say, else what the server's model takes."""
    if args.body:
        return Load([Payload(target.path or "/predict", args.body.read_bytes())], "one given body")
    if target.path:
        return texts(target)
    served = Served.ask(target.root, args.model)
    if args.inputs:
        return given(served, args.inputs)
    return texts(target) if served.takes_text else tensors(served, args.size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.capacity",
        description="Finds what one replica carries within the objective; writes report and Kustomize components. "
        "Sends what the served model takes: texts, or random tensors of its inputs.",
        epilog="example: python -m loadtest.capacity --url http://127.0.0.1:8000 --slo-p95-ms 50 --out capacity",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="one replica; with a path: texts are posted there"
    )
    parser.add_argument("--model", default="", help="its name, if the server has several or does not list them")
    parser.add_argument("--size", type=int, default=8, help="most that an axis of a random tensor that may vary has")
    parser.add_argument("--inputs", type=Path, help=".npz with one array for each input, in place of random tensors")
    parser.add_argument("--body", type=Path, help="file with a JSON body for every request, for the path in --url")
    parser.add_argument("--metrics-url", help="the server's /metrics, or 'none'; default: beside --url")
    parser.add_argument("--out", type=Path, default=Path("capacity"), help="folder for report, figures, component")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for name, annotated in Options.__annotations__.items():
        kind, says = get_args(annotated)
        value = getattr(Options(), name)
        option = {"choices": get_args(kind)} if isinstance(value, str) else {"type": float if value is None else kind}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=says.description, **option)
    return parser


if __name__ == "__main__":
    sys.exit(main())
