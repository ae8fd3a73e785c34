"""/jobs: texts in, an id out, and later what became of them. Knows no model, and of the queue only what it is asked."""

import re
from typing import TYPE_CHECKING

import msgspec
from fastapi import Request
from fastapi.responses import Response
from msgspec import Struct

from app.errors import BadRequest
from app.http.predict import texts_of
from app.http.request import InferenceRequest
from app.http.response import Response as InferenceResponse

if TYPE_CHECKING:
    from app.jobs.queue import JobQueue

IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,256}")


class Accepted(Struct):
    id: str


class JobAnswer(Struct, omit_defaults=True):
    """status: `queued`, `running`, `done` (with predictions) or `failed` (with the error)."""

    id: str
    status: str
    predictions: msgspec.Raw | None = None
    error: str | None = None


async def submit(request: InferenceRequest) -> InferenceResponse:
    """Take texts that workers answer; `GET /jobs/{id}` says how far they are. With an `Idempotency-Key`, the same
    request once more is the same job."""
    texts, key = await texts_of(request), request.header(b"idempotency-key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        raise BadRequest("idempotency-key: expected 1 to 256 ASCII characters")
    request.usage.rows = len(texts)
    trace = request.usage.trace
    job_id = await request.jobs.submit(texts, key, trace.carrier if trace is not None else None)
    location = (b"location", f"/jobs/{job_id}".encode())
    return InferenceResponse(202, msgspec.json.encode(Accepted(job_id)), [location])


async def status(request: Request) -> Response:
    """How far a job is; its predictions, until they expire."""
    queue: JobQueue = request.app.state.lifecycle.jobs
    job_id = request.path_params["job_id"]
    found = await queue.status(job_id)
    answer = JobAnswer(job_id, found.status)
    if found.status == "done":
        answer.predictions = msgspec.Raw(found.content)
    elif found.status == "failed":
        answer.error = found.content.decode()
    return Response(msgspec.json.encode(answer), media_type="application/json")
