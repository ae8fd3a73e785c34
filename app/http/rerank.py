"""/rerank: how well texts fit a query, best first, in the shape of Text Embeddings Inference."""

from functools import partial
from typing import cast

import msgspec
from msgspec import Struct

from app.errors import Invalid
from app.http.embeddings import Direction, require_right
from app.http.request import InferenceRequest, decode_json
from app.http.response import Response, json_response
from app.runtime.tasks.text_pair import TextPair


class RerankRequest(Struct):
    """raw_scores: as the model gives them. truncate: whether a longer pair is cut to the model's window, or refused."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None
    truncation_direction: Direction | None = None


class Rank(Struct, omit_defaults=True):
    """`index` is the text's place in the request; `text` is there if it was asked for."""

    index: int
    score: float
    text: str | None = None


DECODER = msgspec.json.Decoder(RerankRequest)


async def rerank(request: InferenceRequest) -> Response:
    """Rank texts by how well they fit a query, best first."""
    request.require_json()
    body = decode_json(await request.body(), DECODER)
    require_right(body.truncation_direction)
    if not body.texts:
        raise Invalid("texts: expected at least one")
    task = cast(TextPair, request.predictor.model.task)
    pairs = [(body.query, text) for text in body.texts]
    answer, truncate = partial(task.scored, raw=body.raw_scores), body.truncate is not False
    work = request.predictor.run(pairs, answer, request.deadline, request.usage, truncate=truncate)
    scores = (await request.unless_client_leaves(work)).tolist()
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    texts = body.texts if body.return_text else [None] * len(scores)
    return json_response([Rank(index, scores[index], texts[index]) for index in order], request.model_headers())
