"""The thresholds that a candidate is held to, as options of a command, and which of them it fails."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from msgspec import Struct

from app.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Differences and losses in accuracy, 0 to 1; ratios are the candidate's over the champion's."""

    min_difference: float = -0.005
    max_slice_loss: float = 0.03
    min_slice_rows: int = 100
    max_time_ratio: float = 1.2
    max_size_ratio: float = 1.5
    confidence: float = 0.95


HELP = {
    "min_difference": "the lower bound of the candidate's accuracy less the champion's",
    "max_slice_loss": "how much accuracy it may lose on any slice",
    "min_slice_rows": "a smaller slice is shown, and judged by nothing",
    "max_time_ratio": "its time for the same texts",
    "max_size_ratio": "its bytes",
    "confidence": "of all intervals, two-sided",
}


class Check(Struct, frozen=True):
    """One threshold: what was found, what it is held to (at least or at most `limit`), and whether it holds."""

    name: str
    found: float
    limit: float
    passed: bool


def checks(
    thresholds: Thresholds, low: float, slices: Mapping[str, tuple[int, float]], time_ratio: float, size_ratio: float
) -> list[Check]:
    """low: the lower bound of the difference; slices: the rows of each and its difference."""
    judged: Iterable[tuple[str, float]] = (
        (name, found) for name, (rows, found) in slices.items() if rows >= thresholds.min_slice_rows
    )
    at_least = [("accuracy difference, lower bound", low, thresholds.min_difference)]
    at_least += [(f"accuracy difference, slice {name}", found, -thresholds.max_slice_loss) for name, found in judged]
    at_most = [
        ("time ratio", time_ratio, thresholds.max_time_ratio),
        ("size ratio", size_ratio, thresholds.max_size_ratio),
    ]
    return [Check(name, found, limit, found >= limit) for name, found, limit in at_least] + [
        Check(name, found, limit, found <= limit) for name, found, limit in at_most
    ]


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """An option for each field of Thresholds."""
    group = parser.add_argument_group("thresholds")
    for name, value in asdict(Thresholds()).items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{HELP[name]} (default %(default)s)"
        )


def thresholds_of(args: argparse.Namespace) -> Thresholds:
    """Raises ConfigError for a confidence outside 0 to 1."""
    if not 0 < args.confidence < 1:
        raise ConfigError(f"--confidence {args.confidence}: expected above 0 and below 1")
    return Thresholds(**{field.name: getattr(args, field.name) for field in fields(Thresholds)})
