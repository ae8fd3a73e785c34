"""Which labels an answer holds, for whoever counts them."""

from app.runtime.tasks.answers import Entities, Entity, Label, Labels, LabelScore, Value, predicted


def test_every_label_that_answers_hold_comes_with_its_score() -> None:
    several = Labels([LabelScore("insult", 0.9), LabelScore("threat", 0.6)])
    entities = Entities([Entity("PER", 0.8, "Zoë", 0, 3), Entity("PER", 0.7, "Bob", 8, 11)])

    assert list(predicted([Label("wet", 0.5), several, Labels([]), entities])) == [
        ("wet", 0.5),
        ("insult", 0.9),
        ("threat", 0.6),
        ("PER", 0.8),
        ("PER", 0.7),
    ]


def test_numbers_are_no_labels() -> None:
    assert list(predicted([Value(0.4), Value({"joy": 0.1})])) == []
