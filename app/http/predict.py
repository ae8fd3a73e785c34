"""/predict and /predict/batch: text in, what the task makes of it out, as JSON. Knows no task by name."""

from collections.abc import Sequence
from typing import Generic, TypeVar, cast

import msgspec
from msgspec import Struct

from app.errors import Invalid
from app.http.request import InferenceRequest, decode_json
from app.http.response import Response, json_response
from app.runtime.tasks import PredictTask

T = TypeVar("T")


class PredictRequest(Struct):
    text: str


class BatchRequest(Struct):
    texts: list[str]


class BatchResponse(Struct, Generic[T]):
    predictions: Sequence[T]


ONE, MANY = msgspec.json.Decoder(PredictRequest), msgspec.json.Decoder(BatchRequest)


async def predict(request: InferenceRequest) -> Response:
    """Predict from one text."""
    request.require_json()
    body = decode_json(await request.body(), ONE)
    (prediction,) = await predictions(request, [body.text])
    return json_response(prediction, request.model_headers())


async def predict_batch(request: InferenceRequest) -> Response:
    """Predict from several texts: all of them, in the same order, or one error."""
    found = await predictions(request, await texts_of(request))
    return json_response(BatchResponse(found), request.model_headers())


async def texts_of(request: InferenceRequest) -> list[str]:
    """The texts of a BatchRequest."""
    request.require_json()
    body = decode_json(await request.body(), MANY)
    if not body.texts:
        raise Invalid("texts: expected at least one")
    return body.texts


async def predictions(request: InferenceRequest, inputs: Sequence[object]) -> Sequence[Struct]:
    """One answer for each of the task's inputs."""
    task = cast(PredictTask, request.predictor.model.task)
    work = request.predictor.run(inputs, task.predictions, request.deadline, request.usage)
    return await request.unless_client_leaves(work)
