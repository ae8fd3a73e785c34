"""Token classification: texts → token ids → scores of each token's labels → the entities that tokens make up.

A payload is token ids, where in the text each token stands (None for those that mark a text's ends) and that text. A
result is for each token the place of its likeliest label, and its probability.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding

from app.artifact.datatypes import Tensors
from app.artifact.manifest import Artifact, TensorSpec
from app.errors import ArtifactError
from app.runtime.tasks import Encoded
from app.runtime.tasks.answers import Entities, Entity
from app.runtime.tasks.golden import repeated
from app.runtime.tasks.scores import LabelScores
from app.runtime.tasks.text import TextTask

# The label of a token that belongs to no entity.
OUTSIDE_LABEL = "O"


class TokenClassification(TextTask):
    """See `app.runtime.tasks.Task`."""

    outputs = (
        TensorSpec("row", "INT64", [-1]),
        TensorSpec("entity_group", "BYTES", [-1]),
        TensorSpec("score", "FP32", [-1]),
        TensorSpec("word", "BYTES", [-1]),
        TensorSpec("start", "INT64", [-1]),
        TensorSpec("end", "INT64", [-1]),
    )

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError as TextTask and LabelScores do, and for several labels of one token."""
        super().__init__(artifact, batch_rows)
        if artifact.manifest.problem_type != "single_label":
            raise ArtifactError(f"{self._where}: `problem_type`: expected single_label for task token-classification")
        self._labels = LabelScores(artifact, rank=3)
        # A label without B- before it goes on with an entity of its kind.
        self._begins = [label.startswith("B-") for label in self._labels.labels]
        self._groups = [label[2:] if label[:2] in ("B-", "I-") else label for label in self._labels.labels]
        self.labels = [group for group in dict.fromkeys(self._groups) if group != OUTSIDE_LABEL]
        self._encode_batch = self._tokenizer.encode_batch

    def payload(self, encoding: Encoding, text: str) -> Any:
        marks = encoding.special_tokens_mask
        places = [None if mark else place for mark, place in zip(marks, encoding.offsets, strict=True)]
        end = max((place[1] for place in places if place is not None), default=0)
        return encoding.ids, places, text[:end]

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        return super().assemble([ids for ids, _, _ in payloads])

    def stretched(self, payload: Any, length: int) -> Any:
        ids, places, text = payload
        return repeated(ids, length), repeated(places, length), text

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Each token's likeliest label. Raises ValueError unless there is a score for each label."""
        lengths = [len(ids) for ids, _, _ in payloads]
        scores = self.scores(outputs, (len(payloads), max(lengths), len(self._labels.labels)))
        found: list[Any] = []
        for length, row in zip(lengths, scores, strict=True):
            # What the model says of padding means nothing, and need not be a number.
            probabilities = self._labels.probabilities(row[:length])
            found.append((probabilities.argmax(axis=-1), probabilities.max(axis=-1)))
        return found

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """As TextTask's, and that golden texts' scores are what the manifest says they are."""
        super().check(infer)
        self._labels.check(self.golden_scores(infer))

    def predictions(self, units: Sequence[Encoded], results: Sequence[Any]) -> list[Entities]:
        """The entities of each text, in order."""
        pairs = zip(units, results, strict=True)
        return [Entities(self._entities(unit.payload, result), unit.truncated) for unit, result in pairs]

    def _entities(self, payload: Any, result: Any) -> list[Entity]:
        """Neighbouring tokens of one kind are an entity, unless one of them begins another; its score is their mean."""
        _, places, text = payload
        runs: list[tuple[str, list[tuple[int, int]], list[float]]] = []
        for place, label, score in zip(places, *(part.tolist() for part in result), strict=True):
            if place is None:
                continue
            group = self._groups[label]
            if not runs or self._begins[label] or runs[-1][0] != group:
                runs.append((group, [], []))
            runs[-1][1].append(place)
            runs[-1][2].append(score)
        found = []
        for group, spans, scores in runs:
            if group != OUTSIDE_LABEL:
                start, end = spans[0][0], spans[-1][1]
                found.append(Entity(group, round(float(np.mean(scores)), 6), text[start:end], start, end))
        return found

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        """The entities of all rows, one after the other; `row` says whose each is."""
        rows: list[int] = []
        found: list[Entity] = []
        for index, each in enumerate(self.predictions(units, results)):
            rows += [index] * len(each.entities)
            found += each.entities
        return {
            "row": np.array(rows, np.int64),
            "entity_group": np.array([each.entity_group for each in found], np.object_),
            "score": np.array([each.score for each in found], np.float32),
            "word": np.array([each.word for each in found], np.object_),
            "start": np.array([each.start for each in found], np.int64),
            "end": np.array([each.end for each in found], np.int64),
        }
