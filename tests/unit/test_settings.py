"""Settings from the environment, and the CPU quota that "auto" means."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.errors import ConfigError
from app.settings import Settings, cpu_quota, parse_arguments, read_settings, unknown_variables


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("APP_"):
            monkeypatch.delenv(name)


def test_without_any_variable_the_bundled_model_is_served_on_port_8000():
    settings = read_settings()
    assert (settings.model_dir, settings.port, settings.provider) == (Path("model/sentiment"), 8000, "auto")
    assert (settings.runners, settings.batch_delay_ms, settings.model_digest) == ("auto", 0, "")


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("APP_MODEL_DIR", "/models/mine", "model_dir", Path("/models/mine")),
        ("APP_MODEL_DIGEST", "0a" * 32, "model_digest", "0a" * 32),
        ("APP_MODEL_DIGEST", "", "model_digest", ""),
        ("APP_MODEL_PUBLIC_KEY", "/keys/public.pem", "model_public_key", Path("/keys/public.pem")),
        ("APP_MODEL_PUBLIC_KEY", "", "model_public_key", None),
        ("APP_PROVIDER", "cuda", "provider", "cuda"),
        ("APP_PROVIDER", "CPU", "provider", "cpu"),
        ("APP_PROVIDER", "Auto", "provider", "auto"),
        ("APP_RUNNERS", "3", "runners", 3),
        ("APP_RUNNERS", "auto", "runners", "auto"),
        ("APP_RUNNER_THREADS", "4", "runner_threads", 4),
        ("APP_GPU_MEMORY_BYTES", "1073741824", "gpu_memory_bytes", 1 << 30),
        ("APP_MAX_CONNECTIONS", "100", "max_connections", 100),
        ("APP_MAX_CONNECTION_SECONDS", "0", "max_connection_seconds", 0),
        ("APP_MAX_BATCH_ROWS", "64", "max_batch_rows", 64),
        ("APP_MAX_BATCH_TOKENS", "4096", "max_batch_tokens", 4096),
        ("APP_BATCH_DELAY_MS", "1.5", "batch_delay_ms", 1.5),
        ("APP_MAX_QUEUE_ROWS", "9", "max_queue_rows", 9),
        ("APP_REQUEST_TIMEOUT_MS", "250", "request_timeout_ms", 250),
        ("APP_MAX_BODY_BYTES", "1024", "max_body_bytes", 1024),
        ("APP_DRAIN_TIMEOUT_SECONDS", "0", "drain_timeout_seconds", 0),
        ("APP_RUNNER_TIMEOUT_SECONDS", "7", "runner_timeout_seconds", 7),
        ("APP_HOST", "::1", "host", "::1"),
        ("APP_PORT", "0", "port", 0),
        ("APP_LOG_LEVEL", "debug", "log_level", "debug"),
        ("APP_LOG_LEVEL", "WARNING", "log_level", "warning"),
        ("APP_LOG_FORMAT", "text", "log_format", "text"),
        ("APP_LOG_FORMAT", "JSON", "log_format", "json"),
        ("app_port", "81", "port", 81),
    ],
)
def test_a_variable_sets_its_field(monkeypatch, variable, text, field, value):
    monkeypatch.setenv(variable, text)
    assert getattr(read_settings(), field) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("APP_MODEL_DIGEST", "0a" * 32 + "\n"),
        ("APP_MODEL_DIGEST", "0g" * 32),
        ("APP_MODEL_DIGEST", "0a" * 31),
        ("APP_MODEL_DIGEST", "sha256:"),
        ("APP_MODEL_DIGEST", "sha512:" + "0a" * 32),
        ("APP_PROVIDER", "gpu"),
        ("APP_PROVIDER", "GPU"),
        ("APP_PROVIDER", " cpu"),
        ("APP_RUNNERS", "0"),
        ("APP_RUNNERS", "many"),
        ("APP_RUNNERS", "1.5"),
        ("APP_RUNNERS", "1000000"),
        ("APP_MAX_BATCH_ROWS", "-1"),
        ("APP_MAX_BATCH_ROWS", "99999999999"),
        ("APP_MAX_BATCH_TOKENS", ""),
        ("APP_BATCH_DELAY_MS", "-0.1"),
        ("APP_BATCH_DELAY_MS", "nan"),
        ("APP_MAX_QUEUE_ROWS", "0"),
        ("APP_MAX_QUEUE_ROWS", "1e3"),
        ("APP_REQUEST_TIMEOUT_MS", "0"),
        ("APP_REQUEST_TIMEOUT_MS", "inf"),
        ("APP_REQUEST_TIMEOUT_MS", "5s"),
        ("APP_MAX_BODY_BYTES", "4MB"),
        ("APP_MAX_CONNECTION_SECONDS", "-1"),
        ("APP_DRAIN_TIMEOUT_SECONDS", "-1"),
        ("APP_RUNNER_TIMEOUT_SECONDS", "0"),
        ("APP_PORT", "65536"),
        ("APP_PORT", "-1"),
        ("APP_PORT", "http"),
        ("APP_LOG_LEVEL", "loud"),
        ("APP_LOG_FORMAT", "xml\nxml"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_variable_and_the_value(monkeypatch, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError) as caught:
        read_settings()
    assert str(caught.value).startswith(f"{variable}={text!r} is not valid: ")
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("variable", ["APP_RUNNERS", "APP_MAX_BATCH_ROWS", "APP_MAX_BATCH_TOKENS"])
def test_a_bad_count_is_told_that_a_number_would_do_as_well_as_auto(monkeypatch, variable):
    monkeypatch.setenv(variable, "0")
    with pytest.raises(ConfigError, match=r"(?i)greater than or equal to 1|at least 1|>= ?1"):
        read_settings()


@pytest.mark.parametrize("text", ["0A" * 32, "sha256:" + "0a" * 32, "SHA256:" + "0A" * 32])
def test_a_digest_may_be_pasted_in_any_case_and_behind_its_algorithm(monkeypatch, text):
    monkeypatch.setenv("APP_MODEL_DIGEST", text)
    assert read_settings().model_digest.lower().removeprefix("sha256:") == "0a" * 32


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError):
        read_settings().port = 1  # type: ignore[misc]


def test_other_programs_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("PORT", "99999")
    monkeypatch.setenv("MODEL_DIR", "/nowhere")
    assert read_settings() == Settings()
    assert unknown_variables() == []


def test_a_misspelt_variable_is_reported(monkeypatch):
    monkeypatch.setenv("APP_MAX_BATCH_ROW", "8")
    monkeypatch.setenv("APP_PORT", "8080")
    assert unknown_variables() == ["APP_MAX_BATCH_ROW"]


def test_every_setting_is_described():
    undescribed = {name for name, field in Settings.model_fields.items() if not field.description}
    assert undescribed <= {"log_level", "log_format"}


@pytest.fixture
def cores(monkeypatch):
    """Lets this process run on a given number of cores, as far as it can tell."""

    def have(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))

    return have


def v2(cgroup: Path, content: str) -> Path:
    (cgroup / "cpu.max").write_text(content)
    return cgroup


def v1(cgroup: Path, quota: str, period: str) -> Path:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu/cpu.cfs_quota_us").write_text(quota)
    (cgroup / "cpu/cpu.cfs_period_us").write_text(period)
    return cgroup


@pytest.mark.parametrize(
    ("content", "cpus"),
    [
        ("200000 100000\n", 2),
        ("max 100000\n", 64),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("100000 50000\n", 2),
        ("9900000 100000\n", 64),
    ],
    ids=["two", "no limit", "two and a half", "a half", "other period", "more than there are"],
)
def test_the_quota_is_read_from_cgroup_v2(cores, tmp_path, content, cpus):
    cores(64)
    assert cpu_quota(v2(tmp_path, content)) == cpus


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("300000\n", 3), ("-1\n", 64), ("150000\n", 1), ("10000\n", 1)],
    ids=["three", "no limit", "one and a half", "a tenth"],
)
def test_the_quota_is_read_from_cgroup_v1(cores, tmp_path, quota, cpus):
    cores(64)
    assert cpu_quota(v1(tmp_path, quota, "100000\n")) == cpus


def test_version_2_counts_where_both_are_mounted(cores, tmp_path):
    cores(64)
    assert cpu_quota(v2(v1(tmp_path, "300000", "100000"), "500000 100000")) == 5


def test_without_any_cgroup_the_affinity_counts(cores, tmp_path):
    cores(6)
    assert cpu_quota(tmp_path) == 6


def test_an_affinity_smaller_than_the_quota_counts(cores, tmp_path):
    cores(1)
    assert cpu_quota(v2(tmp_path, "800000 100000")) == 1


def test_this_machine_has_at_least_one_cpu():
    assert 1 <= cpu_quota() <= len(os.sched_getaffinity(0))


def test_help_says_what_every_setting_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    words = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"APP_{name.upper()} " in words
        assert field.description
        assert field.description in words
    assert "example:" in words


def test_an_argument_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--port", "80"])
    assert caught.value.code == 2
    assert "--port" in capsys.readouterr().err
