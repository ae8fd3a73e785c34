"""One frozen Settings, read from `APP_*` variables, and what "auto" means on this machine's CPU quota."""

import argparse
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import ConfigError

PREFIX = "APP_"
Auto = Literal["auto"]
AutoOrCount = Auto | Annotated[int, Field(ge=1)]


AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)


class Settings(BaseSettings):
    """All settings. Environment names are these in capitals behind `APP_`; units are in the names.

    One that holds a credential says `json_schema_extra={"configmap": False}`: it belongs in a Secret.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", protected_namespaces=())

    model_dir: Path = Field(Path("model/sentiment"), description="artifact folder")
    model_digest: str = Field(
        "", pattern="(?i)^((sha256:)?[0-9a-f]{64})?$", description="sha256 that manifest.json must have"
    )
    model_public_key: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = Field(
        None, description="file of public keys in PEM; one of them must have signed the model"
    )
    provider: Annotated[Literal["auto", "cpu", "cuda"], AnyCase] = Field(
        "auto", description="execution provider; auto may fall back"
    )
    # Far beyond any use, so that a slip of the hand does not end in a want of memory.
    runners: Auto | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto", description="concurrent model runs; auto: CPU quota, or 2 on CUDA"
    )
    runner_threads: Auto | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto", description="threads of one run; auto: 1, since runs go side by side"
    )
    gpu_memory_bytes: int = Field(0, ge=0, description="CUDA memory that ONNX Runtime may take; 0: all there is")
    max_batch_rows: Auto | Annotated[int, Field(ge=1, le=65536)] = Field(
        "auto", description="rows in one run; auto: by provider"
    )
    max_batch_tokens: AutoOrCount = Field("auto", description="rows x longest row in one run; auto: by provider")
    batch_delay_ms: float = Field(0, ge=0, le=1000, description="how long a free runner waits for a fuller batch")
    max_queue_rows: int = Field(512, ge=1, le=1_000_000, description="rows that may wait; beyond: 503")
    max_queue_wait_ms: float = Field(160, gt=0, description="estimated wait for a run; beyond: 503")
    request_timeout_ms: float = Field(5000, gt=0, le=3_600_000, description="from first byte to answer")
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1, description="request body; beyond: 413")
    max_connections: int = Field(4096, ge=1, le=1_000_000, description="beyond: the longest idle is closed")
    max_connection_seconds: float = Field(
        60, ge=0, le=86_400, description="age at which a connection's next answer closes it; 0: none"
    )
    drain_delay_seconds: float = Field(0, ge=0, le=3600, description="after SIGTERM, before new requests are refused")
    drain_timeout_seconds: float = Field(20, ge=0, le=3600, description="after SIGTERM, for accepted requests")
    runner_timeout_seconds: float = Field(30, gt=0, description="a run longer than this makes /live answer 503")
    http_processes: int = Field(1, ge=1, le=64, description="processes for HTTP; beyond 1, beside one for the model")
    role: Annotated[Literal["server", "gateway"], AnyCase] = Field(
        "server", description="gateway: no model, only jobs, which workers answer"
    )
    queue_url: SecretStr = Field(
        SecretStr(""),
        description="redis:// or rediss:// of the queue of jobs; none: no jobs",
        json_schema_extra={"configmap": False},
    )
    max_jobs: int = Field(10_000, ge=1, description="jobs that may wait or run; beyond: 503")
    job_result_seconds: int = Field(3600, ge=1, description="how long a job's result is kept")
    job_lease_seconds: float = Field(30, ge=1, le=3600, description="silence after which a worker's jobs are others'")
    job_max_deliveries: int = Field(3, ge=1, le=1000, description="tries of a job; beyond: dead letter")
    api_keys_file: Path | None = Field(None, description="lines of NAME:KEY; inference takes one of these keys")
    admin_port: int = Field(0, ge=0, le=65535, description="port for metrics and documentation alone; 0: the same")
    cors_origins: str = Field("", description="origins whose pages may ask, with commas; *: all of them")
    host: str = Field("0.0.0.0", description="address to listen on")  # noqa: S104 - a container serves its Pod's address
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    page: bool = Field(True, description="the page at / and its /state; /docs stays")
    grpc_port: int = Field(0, ge=0, le=65535, description="port for gRPC; 0: none")
    grpc_max_connection_age_seconds: float = Field(
        10, ge=1, le=86400, description="then a gRPC client connects anew, and may reach another replica"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = Field(
        "info", description="debug, info, warning or error"
    )
    log_format: Annotated[Literal["json", "text"], AnyCase] = Field("json", description="json, or text for people")

    @property
    def takes_jobs(self) -> bool:
        """Whether the server has the routes of jobs."""
        return self.role == "gateway" or bool(self.queue_url)


def read_settings() -> Settings:
    """Settings from the environment. Raises ConfigError: one line naming the variable and what it may be."""
    try:
        return Settings()
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        field = errors[0]["loc"][0]
        name = PREFIX + str(field).upper()
        found = os.environ.get(name, errors[0].get("input"))
        # A setting that may be of two types has an error for each.
        reasons = " or ".join(each["msg"] for each in errors if each["loc"][0] == field)
        raise ConfigError(f"{name}={found!r} is not valid: {reasons}") from None


SERVES = "Serves the model in APP_MODEL_DIR until SIGTERM. /ready answers 200 once it passed every check."


def parse_arguments(
    arguments: list[str] | None = None, command: str = "python -m app", description: str = SERVES
) -> None:
    """A command line that has nothing but `--help`: that says what all settings are."""
    lines = [
        f"  {PREFIX + name.upper():28} {field.description} (default: {'' if field.default is None else field.default})"
        for name, field in Settings.model_fields.items()
    ]
    argparse.ArgumentParser(
        prog=command,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        epilog="\n".join(
            ["settings, from the environment:", *lines, "", "example:", f"  APP_MODEL_DIR=my-model {command}"]
        ),
    ).parse_args(arguments)


def unknown_variables() -> list[str]:
    """`APP_*` variables that no setting reads: most likely misspelt."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs this process may use: the smaller of its affinity and its cgroup quota (v2, then v1), at least 1.

    A container with a quota of 2 on a 64-core node must not start 64 runners and be throttled.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            quota = period = "max"
    if quota not in ("max", "-1"):
        cpus = min(cpus, int(quota) / int(period))
    return max(1, int(cpus))
