"""What of OpenTelemetry's variables turns tracing on, and what is refused that OpenTelemetry would only warn of."""

import pytest

from app.errors import ConfigError
from app.telemetry.tracing import check, is_asked_for

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, False),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_an_endpoint_turns_it_on_and_the_standard_switches_off(variables: dict[str, str], asked: bool):
    assert is_asked_for(variables) is asked


@pytest.mark.parametrize(
    "sampler", ["always_on", "always_off", "traceidratio", "parentbased_traceidratio", "PARENTBASED_ALWAYS_ON"]
)
def test_the_standards_samplers_are_taken(sampler: str):
    check(ENDPOINT | {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": "0.01"})


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: expected http/protobuf"),
        (
            {"OTEL_TRACES_SAMPLER": "sometimes"},
            "OTEL_TRACES_SAMPLER=sometimes: expected one of parentbased_",
        ),
        ({"OTEL_TRACES_SAMPLER_ARG": "1 %"}, "OTEL_TRACES_SAMPLER_ARG=1 %: expected a ratio from 0 to 1"),
        ({"OTEL_TRACES_SAMPLER_ARG": "2"}, "OTEL_TRACES_SAMPLER_ARG=2: expected a ratio from 0 to 1"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "me:secret@collector"}, "OTEL_EXPORTER_OTLP_ENDPOINT: expected http://HOST"),
    ],
)
def test_what_is_wrong_is_one_line_that_quotes_no_address(variables: dict[str, str], line: str):
    with pytest.raises(ConfigError) as caught:
        check(ENDPOINT | variables)
    assert str(caught.value).startswith(line)
    assert "secret" not in str(caught.value)
