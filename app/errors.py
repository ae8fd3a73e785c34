"""Every error this service raises on purpose, with the exit code or HTTP status it ends in.

    ServiceError
    ├── StartupError                 the process ends
    │   ├── ConfigError                  exit 2
    │   ├── ArtifactError                exit 3
    │   ├── ProviderError                exit 4
    │   ├── StorageError                 exit 5  not fetched or not stored; it may pass
    │   └── TooManyBadRows               exit 6  of a data set; trying again does not help
    └── RequestError                 one request ends
        ├── BadRequest                   400  not parseable
        ├── Unauthorized                 401  a hook does not know who asks
        ├── Forbidden                    403  a hook does not let them
        ├── NotFound                     404  unknown model or version
        ├── BodyTimeout                  408  body not received before the deadline
        ├── BodyTooLarge                 413
        ├── UnsupportedMedia             415  content type or encoding
        ├── Invalid                      422  parseable, but not acceptable
        ├── TooManyRows                  429  more rows than the queue can ever hold
        ├── ClientClosed                 499  the client left; nobody reads this answer
        ├── RunFailed                    500  the model failed on these rows
        ├── Unavailable                  503  full, not ready, draining; Retry-After
        └── DeadlineExceeded             504  not answered before the deadline

Messages name fields, sizes and limits, never the content of a request.
"""

from math import ceil


def one_line(text: str) -> str:
    """`text` as a terminal and a log may show it: names of files and tensors, and what servers and libraries say, may
    hold line breaks, sequences that control a terminal, or characters that turn the direction of what is read."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


class ServiceError(Exception):
    """Root of the family. `str(error)` is one line fit for an operator or a client."""


class StartupError(ServiceError):
    """The server cannot start or serve; the process ends with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(StartupError):
    exit_code = 2


class ArtifactError(StartupError):
    exit_code = 3


class ProviderError(StartupError):
    exit_code = 4


class StorageError(StartupError):
    exit_code = 5


class TooManyBadRows(StartupError):
    exit_code = 6


class RequestError(ServiceError):
    """One request cannot be answered; the client gets `status` and the message."""

    status = 500
    # The label of `inference_rejected_total`, for errors that refuse work the model never saw.
    reason: str | None = None
    # Whether the connection must not be used again (its body was not read to the end).
    close = False
    retry_after_seconds: int | None = None
    # What the client may do to be known: `WWW-Authenticate`.
    challenge: str | None = None


class BadRequest(RequestError):
    status = 400
    reason = "invalid"


class Unauthorized(RequestError):
    status = 401
    reason = "unauthorized"
    close = True
    challenge = "Bearer"


class Forbidden(RequestError):
    status = 403
    reason = "unauthorized"
    close = True


class NotFound(RequestError):
    status = 404
    reason = "invalid"


class BodyTimeout(RequestError):
    status = 408
    reason = "body_timeout"
    close = True


class BodyTooLarge(RequestError):
    status = 413
    reason = "body_too_large"
    close = True


class UnsupportedMedia(RequestError):
    status = 415
    reason = "invalid"
    close = True


class Invalid(RequestError):
    status = 422
    reason = "invalid"


class TooManyRows(RequestError):
    status = 429
    reason = "too_many_rows"


class ClientClosed(RequestError):
    status = 499
    reason = "client_closed"


class RunFailed(RequestError):
    status = 500


class Unavailable(RequestError):
    """`reason` is one of `queue_full`, `late` (would miss its deadline), `not_ready`, `draining`, `memory`."""

    status = 503

    def __init__(self, message: str, reason: str, retry_after_seconds: float = 1.0, *, close: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_seconds = max(1, ceil(retry_after_seconds))
        self.close = close


class DeadlineExceeded(RequestError):
    status = 504
    reason = "deadline"


REJECT_REASONS = (
    "invalid", "unauthorized", "body_timeout", "body_too_large", "too_many_rows", "client_closed",
    "queue_full", "late", "not_ready", "draining", "memory", "deadline",
)  # fmt: skip
# Of connections that a limit ended: too many, too much that waits, answers that are not read.
SHED_REASONS = ("count", "memory", "unread")
STATUSES = (200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 499, 500, 503, 504)
