"""/predict and /predict/batch: JSON in, the predictor, JSON out."""

import msgspec
from msgspec import Struct

from app.errors import Invalid
from app.http.request import InferenceRequest, decode_json
from app.http.response import Response, json_response
from app.runtime.tasks import Prediction


class PredictRequest(Struct):
    text: str


class BatchRequest(Struct):
    texts: list[str]


class PredictResponse(Struct, omit_defaults=True):
    """`truncated` is there, and true, when the text was longer than the model's window."""

    label: str
    score: float
    truncated: bool = False


class BatchResponse(Struct):
    predictions: list[PredictResponse]


ONE, MANY = msgspec.json.Decoder(PredictRequest), msgspec.json.Decoder(BatchRequest)


async def predict(request: InferenceRequest) -> Response:
    """Classify one text."""
    request.require_json()
    body = decode_json(await request.body(), ONE)
    (prediction,) = await _classify(request, [body.text])
    return json_response(_as_response(prediction), request.model_headers())


async def predict_batch(request: InferenceRequest) -> Response:
    """Classify several texts: all of them, in the same order, or one error."""
    request.require_json()
    body = decode_json(await request.body(), MANY)
    if not body.texts:
        raise Invalid("texts: expected at least one")
    predictions = await _classify(request, body.texts)
    content = BatchResponse([_as_response(prediction) for prediction in predictions])
    return json_response(content, request.model_headers())


async def _classify(request: InferenceRequest, texts: list[str]) -> list[Prediction]:
    return await request.unless_client_leaves(request.predictor.classify(texts, request.deadline, request.usage))


def _as_response(prediction: Prediction) -> PredictResponse:
    return PredictResponse(prediction.label, prediction.score, prediction.truncated)
