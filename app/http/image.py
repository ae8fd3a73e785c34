"""/predict where the model takes images: a JPEG or PNG file in, what the task makes of it out. Decodes none itself."""

from app.http.predict import predictions
from app.http.request import InferenceRequest
from app.http.response import Response, json_response

IMAGE_TYPES = ("image/jpeg", "image/png")


async def predict(request: InferenceRequest) -> Response:
    """Predict from one image."""
    request.require_type(*IMAGE_TYPES)
    (prediction,) = await predictions(request, [await request.body()])
    return json_response(prediction, request.model_headers())
