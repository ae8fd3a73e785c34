"""The texts that become golden: given or built in, with those that a tokenizer or a window is most often wrong at."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from app.errors import ArtifactError

# A text, or a query and a text.
Text = str | tuple[str, str]
# Short, long, plain, marked, and in other scripts: any tokenizer has something to do.
GOLDEN_TEXTS = (
    "I love this, it works like a charm!",
    "Terrible. It broke after two days and nobody answered my calls.",
    "ok",
    "The parcel came on Tuesday.",
    "We waited for an hour, the soup was cold and the waiter shrugged, but the dessert almost made up for all of it.",
    "¿Qué tal? 不错 👍",
)
GOLDEN_PAIRS = (
    ("How long does delivery take?", "Parcels within the country arrive in two to three days."),
    ("How long does delivery take?", "Our founders met at university in Lisbon."),
    ("refund", "You may return anything within 30 days, and we pay you back."),
    ("ok", "no"),
    ("¿Qué tal? 不错", "Muy bien 👍, 谢谢"),
)
NEARLY_EMPTY, NOT_ASCII = "ok", "¿Qué tal? 不错 👍"
# Each is run when a replica starts.
MOST_GOLDEN = 32
MOST_GENERATED = 200


def read_texts(path: Path, *, pairs: bool = False) -> list[Text]:
    """Texts from a file, one a line, without the blank ones; pairs: a query, a tab and a text a line.

    Raises ArtifactError if it is not UTF-8, or a line has no pair.
    """
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise ArtifactError(f"{path}: expected UTF-8") from None
    if not lines:
        raise ArtifactError(f"{path}: expected at least one text that is not blank, found none")
    if not pairs:
        return list(lines)
    split = [line.partition("\t") for line in lines]
    for number, (query, _, text) in enumerate(split, 1):
        if not query.strip() or not text.strip():
            raise ArtifactError(f"{path}: text {number}: expected a query, a tab and a text")
    return [(query, text) for query, _, text in split]


def probes(texts: Sequence[Text], *, window: int, pairs: bool) -> list[Text]:
    """What must be golden beside `texts`: a text longer than a window of so many tokens, a nearly empty one and one in
    other scripts, unless they are there."""
    parts = [text if isinstance(text, str) else text[1] for text in texts]
    more: list[str] = []
    if all(len(part) > 3 for part in parts):
        more.append(NEARLY_EMPTY)
    if all(part.isascii() for part in parts):
        more.append(NOT_ASCII)
    more.append(longer_than(window))
    return [(GOLDEN_PAIRS[0][0], text) for text in more] if pairs else list(more)


def longer_than(window: int) -> str:
    """A text of more words than a window has tokens."""
    words = GOLDEN_TEXTS[4].split()
    return " ".join((words * (window // len(words) + 1))[: window + 1])


def generated_texts(tokenizer: Path, count: int) -> Iterator[str]:
    """Seeded nonsense of the tokenizer's own words: some of it has labels that no other text has."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(tokenizer))
    rng, size = np.random.default_rng(0), vocabulary.get_vocab_size()
    for _ in range(count):
        text = vocabulary.decode(rng.integers(0, size, rng.integers(1, 12)).tolist())
        if text.strip():
            yield text


def chosen(labels: Sequence[set[str]], *, keep: Collection[int]) -> list[int]:
    """Places of at most MOST_GOLDEN texts, in order: those to `keep`, the first of each label, then as they come.

    labels: of each text, what the model says it is.
    """
    seen: set[str] = set()
    first = list(keep)
    for place, found in enumerate(labels):
        if not found <= seen:
            first.append(place)
        seen |= found
    wanted = dict.fromkeys([*first, *range(len(labels))])
    return sorted(list(wanted)[: max(MOST_GOLDEN, len(keep))])
