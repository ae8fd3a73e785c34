"""What tasks answer over plain HTTP, as JSON has it: one class for each shape. Knows neither tensors nor HTTP."""

from collections.abc import Iterable, Iterator

from msgspec import Struct


class Label(Struct, omit_defaults=True):
    """The likeliest label and its probability. `truncated` is there, and true, when the text was longer than the
    model's window."""

    label: str
    score: float
    truncated: bool = False


class LabelScore(Struct):
    label: str
    score: float


class Labels(Struct, omit_defaults=True):
    """The labels at or over the threshold, likeliest first; none of them may be."""

    labels: list[LabelScore]
    truncated: bool = False


class Value(Struct, omit_defaults=True):
    """A number; by name where the model answers several."""

    value: float | dict[str, float]
    truncated: bool = False


class Entity(Struct):
    """A part of the text: `word` is what stands at its characters `start` to `end`, counted in Unicode code points."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


class Entities(Struct, omit_defaults=True):
    """In the order of the text."""

    entities: list[Entity]
    truncated: bool = False


def predicted(answers: Iterable[Struct]) -> Iterator[tuple[str, float]]:
    """Each label that the answers hold, and its score."""
    for answer in answers:
        match answer:
            case Label():
                yield answer.label, answer.score
            case Labels():
                yield from ((each.label, each.score) for each in answer.labels)
            case Entities():
                yield from ((each.entity_group, each.score) for each in answer.entities)
