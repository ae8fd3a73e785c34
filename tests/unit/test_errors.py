"""The error family: statuses, exit codes and labels agree with the contract and with each other."""

import pytest

from app import errors
from app.errors import (
    REJECT_REASONS,
    STATUSES,
    RequestError,
    ServiceError,
    StartupError,
    Unavailable,
)


def family(root: type[ServiceError]) -> list[type[ServiceError]]:
    return [kind for child in root.__subclasses__() for kind in [child, *family(child)]]


REQUEST_ERRORS = {
    "BadRequest": 400,
    "Unauthorized": 401,
    "Forbidden": 403,
    "NotFound": 404,
    "BodyTimeout": 408,
    "BodyTooLarge": 413,
    "UnsupportedMedia": 415,
    "Invalid": 422,
    "TooManyRows": 429,
    "ClientClosed": 499,
    "RunFailed": 500,
    "Unavailable": 503,
    "DeadlineExceeded": 504,
}


def test_every_request_error_ends_in_the_status_of_the_contract() -> None:
    assert {kind.__name__: kind.status for kind in family(RequestError)} == REQUEST_ERRORS


def test_every_startup_error_ends_in_the_exit_code_of_the_contract() -> None:
    # A tool has errors of its own.
    codes = {kind.__name__: kind.exit_code for kind in family(StartupError) if kind.__module__ == errors.__name__}
    assert codes == {
        "ConfigError": 2, "ArtifactError": 3, "ProviderError": 4, "StorageError": 5, "TooManyBadRows": 6,
    }  # fmt: skip


def test_every_error_this_service_raises_is_of_one_family() -> None:
    raised = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, ServiceError) for kind in raised)
    assert not issubclass(StartupError, RequestError)


@pytest.mark.parametrize("kind", family(RequestError), ids=lambda kind: kind.__name__)
def test_every_status_and_reason_has_its_metric_label(kind: type[RequestError]) -> None:
    assert kind.status in STATUSES
    assert kind.reason is None or kind.reason in REJECT_REASONS


def test_labels_are_listed_once() -> None:
    assert len(set(STATUSES)) == len(STATUSES)
    assert len(set(REJECT_REASONS)) == len(REJECT_REASONS)
    assert {200, 405} <= set(STATUSES), "an answer, and a method that no route takes"


@pytest.mark.parametrize("reason", ["queue_full", "late", "not_ready", "draining", "memory"])
def test_unavailable_names_a_reason_that_has_its_label(reason: str) -> None:
    assert reason in REJECT_REASONS
    assert Unavailable("busy", reason).reason == reason


@pytest.mark.parametrize(("wait", "header"), [(0, 1), (0.2, 1), (1.0, 1), (1.2, 2), (59.01, 60)])
def test_retry_after_is_whole_seconds_and_at_least_one(wait: float, header: int) -> None:
    assert Unavailable("busy", "queue_full", wait).retry_after_seconds == header


def test_only_who_is_not_known_is_told_how_to_be() -> None:
    challenges = {kind.__name__: kind.challenge for kind in family(RequestError) if kind.challenge}
    assert challenges == {"Unauthorized": "Bearer"}


def test_the_reason_a_server_cannot_start_is_one_line() -> None:
    assert str(StartupError("model\nfile: not\r\nfound")) == "model file: not found"


@pytest.mark.parametrize(
    ("character", "shown"),
    [
        ("\x1b", r"\x1b"),
        ("\x07", r"\x07"),
        ("\x00", r"\x00"),
        ("\x9b", r"\x9b"),
        ("\u202e", r"\u202e"),
        ("\u2066", r"\u2066"),
        ("\u200b", r"\u200b"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
        ("\u2028", " "),
        ("\x85", " "),
        ("é", "é"),
        ("模", "模"),
    ],
)
def test_the_reason_a_server_cannot_start_controls_no_terminal(character: str, shown: str) -> None:
    assert str(StartupError(f"model{character}file")) == f"model{shown}file"


def test_connections_are_closed_only_where_the_body_may_be_left_unread_or_the_server_ends() -> None:
    assert {kind.__name__ for kind in family(RequestError) if kind.close} == {
        "Unauthorized",
        "Forbidden",
        "BodyTimeout",
        "BodyTooLarge",
        "UnsupportedMedia",
    }
    assert Unavailable("busy", "queue_full").close is False
    assert Unavailable("ending", "draining", close=True).close is True
