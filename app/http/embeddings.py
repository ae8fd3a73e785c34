"""/embed and /v1/embeddings: vectors of texts, in the shapes of Text Embeddings Inference and of OpenAI."""

from base64 import b64encode
from functools import partial
from typing import Any, Literal, cast

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from app.errors import BadRequest, Invalid
from app.http.request import InferenceRequest, decode_json
from app.http.response import Response, json_response
from app.predictor import aside
from app.runtime.tasks.text_embedding import TextEmbedding

Vectors = NDArray[np.float32]
# Writing more numbers than that takes longer than a thread does to start.
QUICK_NUMBERS = 8192
Direction = Literal["right", "Right", "left", "Left"]


class EmbedRequest(Struct):
    """normalize: as the model's manifest says, if not given. truncate: whether a longer text is cut to the model's
    window, or refused."""

    inputs: str | list[str]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: int | None = None


class EmbeddingsRequest(Struct):
    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class Embedding(Struct):
    """`embedding` is base64 of little-endian float32 if `encoding_format` says so."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class TokenUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Struct):
    data: list[Embedding]
    model: str
    usage: TokenUsage
    object: Literal["list"] = "list"


EMBED, EMBEDDINGS = msgspec.json.Decoder(EmbedRequest), msgspec.json.Decoder(EmbeddingsRequest)


async def embed(request: InferenceRequest) -> Response:
    """Embed texts: one vector for each, in the same order."""
    request.require_json()
    body = decode_json(await request.body(), EMBED)
    require_right(body.truncation_direction)
    if body.prompt_name is not None:
        raise Invalid("prompt_name: this model has no prompts; put the prompt before the text")
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    if not texts:
        raise Invalid("inputs: expected at least one")
    found = await _vectors(request, texts, body.dimensions, body.normalize, truncate=body.truncate is not False)
    return json_response(await _written(found, packed=False), request.model_headers())


async def embeddings(request: InferenceRequest) -> Response:
    """Embed texts, as OpenAI's clients ask for it."""
    request.require_json()
    body = decode_json(await request.body(), EMBEDDINGS)
    if body.model is not None:
        request.predictor.named(body.model, None)
    texts: list[Any] = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise Invalid("input: expected at least one text")
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest("input: expected a text or a list of texts; token ids are not taken, send the text itself")
    found = await _vectors(request, texts, body.dimensions, None, truncate=True)
    vectors = await _written(found, packed=body.encoding_format == "base64")
    data = [Embedding(index, vector) for index, vector in enumerate(vectors)]
    tokens, name = request.usage.tokens, request.predictor.model.artifact.manifest.name
    return json_response(EmbeddingsResponse(data, name, TokenUsage(tokens, tokens)), request.model_headers())


async def _vectors(
    request: InferenceRequest, texts: list[str], dimensions: int | None, normalize: bool | None, *, truncate: bool
) -> Vectors:
    task = cast(TextEmbedding, request.predictor.model.task)
    if dimensions not in (None, task.dimensions):
        raise Invalid(f"dimensions: expected {task.dimensions}, as the model has, or none given")
    answer = partial(task.embeddings, normalize=normalize)
    work = request.predictor.run(texts, answer, request.deadline, request.usage, truncate=truncate)
    return await request.unless_client_leaves(work)


def require_right(direction: Direction | None) -> None:
    """Raises Invalid if a text is to lose its start instead of its end."""
    if direction is not None and direction.lower() == "left":
        raise Invalid("truncation_direction: expected right; texts are cut at their end")


async def _written(rows: Vectors, *, packed: bool) -> list[Any]:
    """Each row as JSON has it; where that is much in a thread, which lets others go on between rows."""
    write = _packed if packed else _as_json
    return await aside(rows.size > QUICK_NUMBERS, lambda: [write(row) for row in rows])


def _as_json(row: Vectors) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(row.tolist()))


def _packed(row: Vectors) -> str:
    return b64encode(row.astype("<f4").tobytes()).decode()
