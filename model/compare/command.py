"""Command line of `python -m model.compare`. Exit 0 promote; 10 do not; 2 bad usage or data; 3 an artifact that does
not pass the gate, is of another task or has other labels."""

import argparse
import hashlib
import logging
import sys
from pathlib import Path

from app.errors import ConfigError, StartupError
from model.compare.comparison import Comparison, compare
from model.compare.rows import read_rows
from model.compare.verdict import add_thresholds, thresholds_of
from model.compare.write import write

# Beside the codes of the server and the other tools, 0 to 5.
DO_NOT_PROMOTE = 10


def main() -> None:
    """Ends the process with the code that says promote or not."""
    parser = argparse.ArgumentParser(
        prog="python -m model.compare",
        description="Holds a candidate to a champion: both artifacts pass the gate and answer the same labelled rows. "
        "Writes comparison.json and comparison.html. Exit code 0: promote; 10: do not.",
        epilog="example: python -m model.compare model/sentiment artifacts/sentiment --data held-out.jsonl",
    )
    parser.add_argument("champion", type=Path, help="artifact folder of what is served")
    parser.add_argument("candidate", type=Path, help="artifact folder of what may take its place")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help=".jsonl or .csv with text, label and perhaps slice"
    )
    parser.add_argument("--data-digest", default="", metavar="SHA256", help="that the file must have")
    parser.add_argument("--out", type=Path, default=Path("comparison"), metavar="DIR", help="(default %(default)s)")
    parser.add_argument(
        "--show-texts", action="store_true", help="on the page: of rows that the two answer differently"
    )
    add_thresholds(parser)
    args = parser.parse_args()
    logging.captureWarnings(True)
    try:
        rows = read_rows(args.data)
        data = {"file": args.data.name, "sha256": _digest(args.data, args.data_digest)}
        found = compare((args.champion, args.candidate), rows, data, thresholds_of(args))
        write(found, args.out, rows if args.show_texts else ())
    except (StartupError, OSError) as error:
        print(f"model.compare: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", ConfigError.exit_code))
    print("\n".join(summary(found, str(args.out))))
    sys.exit(0 if found.promote else DO_NOT_PROMOTE)


def summary(found: Comparison, place: str) -> list[str]:
    """The lines that a log needs. place: where the files are, a folder or an address."""
    difference = found.difference
    lines = [
        f"accuracy   {found.champion.accuracy.estimate:.4f} → {found.candidate.accuracy.estimate:.4f} of "
        f"{found.data['rows']} rows, difference {difference.estimate:+.4f} ({difference.low:+.4f} to "
        f"{difference.high:+.4f}); {found.disagreements.count} answered differently",
        f"time       {found.time_ratio:g} ×, size {found.size_ratio:g} ×",
        f"details    {place}/comparison.html",
    ]
    failed = [f"fails      {check.name}: {check.found:g}, held to {check.limit:g}" for check in found.checks
              if not check.passed]  # fmt: skip
    return [*lines, *failed, "verdict    promote" if found.promote else "verdict    do not promote"]


def _digest(path: Path, pinned: str) -> str:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if pinned and pinned.lower().removeprefix("sha256:") != found:
        raise ConfigError(f"{path}: --data-digest: expected sha256 {pinned}, found {found}")
    return found
