"""The records of a capacity run, as `report.json` has them. Base units; `_ms` and `_percent` where it says so."""

from pathlib import Path
from typing import Any

import msgspec

# Raised when a field changes its meaning or goes away; a reader refuses what it does not know.
SCHEMA_VERSION = 1


class ReportError(Exception):
    """A file that is not a report this code can read; the message is one line for people."""


class Estimate(msgspec.Struct, frozen=True):
    """A mean or percentile with the half-width of its 95 % confidence interval."""

    value: float
    half_width: float

    @property
    def relative(self) -> float:
        return self.half_width / self.value if self.value > 0 else float("inf")


class ServerSide(msgspec.Struct, frozen=True):
    """What the server said about one step; None where it does not say."""

    cpu_cores: float | None = None
    memory_bytes: float | None = None
    in_flight: float | None = None
    queue_rows: float | None = None
    queue_wait_ms: float | None = None
    run_ms: float | None = None
    batch_rows: float | None = None
    padding_share: float | None = None
    runner_busy_share: float | None = None
    runners: float | None = None
    rejected: float | None = None
    gpu_utilization: float | None = None
    gpu_memory_bytes: float | None = None


class Step(msgspec.Struct, frozen=True):
    """One load held until its estimates were stable. `loop` is closed (in-flight is given) or open (rate is given)."""

    loop: str
    in_flight: float
    rps: Estimate
    mean_ms: float
    p50_ms: float
    p95_ms: Estimate
    p99_ms: float
    requests: int
    refused: int
    errors: int
    seconds: float
    stable: bool
    client_cpu_share: float
    server: ServerSide
    machine_cpu_cores: float | None = None
    offered_rps: float | None = None
    repeats: int = 0

    @property
    def failed_share(self) -> float:
        """Requests that were refused or broke, as a share of all."""
        return (self.refused + self.errors) / max(1, self.requests + self.refused + self.errors)

    def holds(self, slo_p95_ms: float, allowed_failures: float) -> bool:
        """Whether the objective is met."""
        return self.requests > 0 and self.p95_ms.value <= slo_p95_ms and self.failed_share <= allowed_failures


class Findings(msgspec.Struct, frozen=True):
    """What the steps say. In-flight and rates are of one replica."""

    peak_rps: float
    peak_in_flight: float
    knee_in_flight: float
    knee_rps: float
    knee_rule: str
    objective_in_flight: float | None
    objective_rps: float | None
    open_loop_rps: float | None
    gives_out: str
    gives_out_why: str
    warnings: list[str]


class Delay(msgspec.Struct, frozen=True):
    """One part of the time until a new replica helps."""

    name: str
    seconds: float
    source: str


class Line(msgspec.Struct, frozen=True):
    """One line of the derivation: what, the arithmetic with the numbers in it, the result."""

    what: str
    arithmetic: str
    result: str


class Derivation(msgspec.Struct, frozen=True):
    """Targets for one replica, and the bounds of the fleet."""

    delays: list[Delay]
    reaction_seconds: float
    growth_factor: float
    trigger_rps: float
    target_rps: float
    target_in_flight: float
    target_queue_wait_ms: float | None
    target_cpu_percent: int | None
    cpu_request_cores: float | None
    cpu_limit_cores: float | None
    memory_request_bytes: int | None
    memory_limit_bytes: int | None
    min_replicas: int
    max_replicas: int
    lines: list[Line]
    notes: list[str]


class Options(msgspec.Struct, frozen=True):
    """What was asked for; defaults are README's."""

    slo_p95_ms: float = 100.0
    allowed_failure_percent: float = 1.0
    max_in_flight: int = 512
    precision_percent: float = 5.0
    min_step_seconds: float = 2.0
    max_step_seconds: float = 10.0
    growth_percent_per_second: float = 1.0
    scrape_seconds: float = 15.0
    window_seconds: float = 60.0
    sync_seconds: float = 15.0
    pull_seconds: float = 10.0
    node_seconds: float = 0.0
    probe_seconds: float = 2.0
    start_seconds: float | None = None
    base_rps: float | None = None
    peak_rps: float | None = None
    survive: str = "replica"
    zones: int = 3


class Run(msgspec.Struct, frozen=True):
    """Which run this is: when, against what, from where."""

    id: str
    url: str
    started: str
    seconds: float
    machine: str
    load: str
    server: dict[str, str]


class Report(msgspec.Struct, frozen=True):
    """`report.json`."""

    run: Run
    options: Options
    steps: list[Step]
    open_loop: list[Step]
    findings: Findings
    derivation: Derivation | None
    schema_version: int = SCHEMA_VERSION


def write(report: Report, path: Path) -> None:
    """Indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read(path: Path) -> Report:
    """The report in a file. Raises ReportError: one line naming the file and what is wrong with it."""
    try:
        raw: Any = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ReportError(f"{path}: not JSON: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ReportError(f"{path}: schema_version is {version!r}, this code reads {SCHEMA_VERSION}")
    try:
        return msgspec.convert(raw, Report)
    except msgspec.ValidationError as error:
        raise ReportError(f"{path}: not a capacity report: {error}") from None
