"""The records of a capacity run, as `report.json` has them, and its options. Base units but for names that end in
another (`_ms`, `_percent`).
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

# Raised when a field changes its meaning or goes away; a reader refuses what it does not know.
SCHEMA_VERSION = 2


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
    queue_wait_ms: float | None = None
    run_ms: float | None = None
    batch_rows: float | None = None
    padding_share: float | None = None
    runner_busy_share: float | None = None
    runners: float | None = None
    gpu_utilization: float | None = None


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

    def holds(self, options: "Options") -> bool:
        """Whether the objective is met."""
        allowed = options.allowed_failure_percent / 100
        return self.requests > 0 and self.p95_ms.value <= options.slo_p95_ms and self.failed_share <= allowed


class Findings(msgspec.Struct, frozen=True):
    """What the steps say. In-flight and rates are of one replica."""

    peak_rps: float
    peak_in_flight: float
    knee_in_flight: float
    knee_rps: float
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
    growth_factor: float
    trigger_rps: float
    target_rps: float
    target_in_flight: float
    target_cpu_percent: int | None
    cpu_request_cores: float | None
    cpu_limit_cores: float | None
    memory_request_bytes: int | None
    memory_limit_bytes: int | None
    min_replicas: int
    max_replicas: int
    lines: list[Line]
    notes: list[str]


def _says(description: str) -> Meta:
    return Meta(description=description)


class Options(msgspec.Struct, frozen=True):
    """What was asked for; each field is an option of the command line, with its help."""

    slo_p95_ms: Annotated[float, _says("objective")] = 100.0
    allowed_failure_percent: Annotated[float, _says("requests that may be refused or fail")] = 1.0
    max_in_flight: Annotated[int, _says("never more than this")] = 512
    precision_percent: Annotated[float, _says("a step ends when the 95 %% interval of its rate is this narrow")] = 5.0
    min_step_seconds: Annotated[float, _says("a step takes at least this")] = 2.0
    max_step_seconds: Annotated[float, _says("a step ends after this even if not stable")] = 10.0
    growth_percent_per_second: Annotated[float, _says("how fast traffic may grow while new replicas start")] = 1.0
    scrape_seconds: Annotated[float, _says("how old the metric may be")] = 15.0
    window_seconds: Annotated[float, _says("the metric is a mean over this; it is half as old")] = 60.0
    sync_seconds: Annotated[float, _says("HPA sync period")] = 15.0
    pull_seconds: Annotated[float, _says("image pull on a new replica's node")] = 10.0
    node_seconds: Annotated[float, _says("provisioning of a new node; 0: there is room")] = 0.0
    probe_seconds: Annotated[float, _says("readiness probe period and routing")] = 2.0
    start_seconds: Annotated[float | None, _says("process start to ready; default: measured")] = None
    base_rps: Annotated[float | None, _says("the service's traffic at its quietest; default: one replica's target")] = (
        None
    )
    peak_rps: Annotated[float | None, _says("the service's traffic at its highest; default: 10 × base")] = None
    survive: Annotated[Literal["replica", "zone"], _says("loss that must not break the objective")] = "replica"
    zones: Annotated[int, _says("zones the replicas are spread over")] = 3


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


def write(record: msgspec.Struct, path: Path) -> None:
    """Indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read(path: Path) -> Report:
    """The report in a file. Raises ReportError: one line naming the file and what is wrong with it."""
    try:
        # JSON has no infinity: where nothing is known of a value, it says null.
        raw: Any = json.loads(path.read_bytes(), object_hook=_with_infinities)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ReportError(f"{path}: schema_version is {version!r}, this code reads {SCHEMA_VERSION}")
        return msgspec.convert(raw, Report)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise ReportError(f"{path}: not a capacity report: {error}") from None
    except ValueError as error:
        raise ReportError(f"{path}: not JSON: {error}") from None


def _with_infinities(found: dict[str, Any]) -> dict[str, Any]:
    estimate = found.keys() == {"value", "half_width"}
    return {key: math.inf if estimate and value is None else value for key, value in found.items()}
