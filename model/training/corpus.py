"""Training and evaluation text: reads the rated TSV files, splits them, and varies the spelling.

Knows nothing of models or tokenizers. The data itself never enters the repository.
"""

import csv
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path

from app.errors import ConfigError
from model.training.emoji import NEGATIVE, POSITIVE
from model.training.record import file_digest

RATED = ("tweets", "amazon")
FILES = ("sst2-train.tsv", "sst2-dev.tsv", *(f"{name}-train.tsv" for name in RATED))
# A rating below this is neutral or mixed: too little signal for a binary target.
MIN_TRAIN_VALENCE = 0.3
POLAR_VALENCE = 1.0
SENTENCE_WORDS = 14
HELD_OUT_PERCENT = 15


@dataclass(frozen=True, slots=True)
class Example:
    """One text and the probability (0 to 1) that it is positive."""

    text: str
    positive: float


def read_tsv(path: Path) -> list[tuple[float, str]]:
    """Rows of (label or valence, text). Raises ConfigError naming the file and line of a bad row."""
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(reader, None)
        for number, row in enumerate(reader, start=2):
            try:
                value, text = row
                rows.append((float(value), text))
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: expected 'number<TAB>text'") from error
    return rows


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of the corpus. Raises ConfigError if one is not there."""
    for name in FILES:
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name}: not there; model/README.md says what the data is")
    return {name: file_digest(folder / name) for name in FILES}


def held_out(text: str) -> bool:
    """Whether a rated text belongs to the development split: a stable hash, so the split never moves."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def evaluation_sets(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Name → [(label, text)]: SST-2 dev and the clearly polar held-out part of each rated file."""
    sets = {"sst2-dev": [(int(label), text) for label, text in read_tsv(folder / "sst2-dev.tsv")]}
    for name in RATED:
        sets[f"{name}-held-out"] = [
            (int(valence > 0), text)
            for valence, text in read_tsv(folder / f"{name}-train.tsv")
            if abs(valence) >= POLAR_VALENCE and held_out(text)
        ]
    return sets


def training_set(folder: Path, rated_repeats: int) -> list[Example]:
    """SST-2, with whole sentences twice and the shortest fragments left out (most of its rows are fragments);
    the rated files and our own sentences `rated_repeats` times (they are few, and closer to use)."""
    examples = []
    for label, text in read_tsv(folder / "sst2-train.tsv"):
        words = text.count(" ")
        examples += [Example(text, label)] * (0 if words < 3 else 2 if words >= SENTENCE_WORDS else 1)
    for name in RATED:
        for valence, text in read_tsv(folder / f"{name}-train.tsv"):
            if abs(valence) >= MIN_TRAIN_VALENCE and not held_out(text):
                # The raters' mean becomes a soft target: certain where they were.
                examples += [Example(text, 1 / (1 + exp(-1.5 * valence)))] * rated_repeats
    return examples + [Example(text, label) for label, text in own_sentences()] * rated_repeats


_DETOKENISE = [
    (re.compile(r"\b(\w+) n't\b"), r"\1n't"),
    (re.compile(r" ('(?:s|re|ve|ll|d|m))\b"), r"\1"),
    (re.compile(r" ([.,!?;:%])"), r"\1"),
    (re.compile(r"-lrb- ?"), "("),
    (re.compile(r" ?-rrb-"), ")"),
    (re.compile(r"`` ?"), '"'),
    (re.compile(r" ?''"), '"'),
]


def detokenise(text: str) -> str:
    """Treebank spelling (`do n't`, `it 's`, `-lrb-`) → ordinary spelling."""
    for pattern, replacement in _DETOKENISE:
        text = pattern.sub(replacement, text)
    return text.strip()


def vary(example: Example, rng: random.Random) -> Example:
    """The same example as people type it: ordinary spelling, a final mark, an agreeing emoji, or several."""
    text = example.text
    if rng.random() < 0.5:
        text = detokenise(text)
    if rng.random() < 0.1 and text and text[-1].isalnum():
        text += rng.choice([".", "!", "!!", "..."])
    certain = abs(example.positive - 0.5) > 0.35
    if certain and rng.random() < 0.08:
        emoji = rng.choice(list(POSITIVE if example.positive > 0.5 else NEGATIVE))
        text = f"{text}{rng.choice(['', ' '])}{emoji * rng.choice([1, 1, 1, 2, 3])}"
    return Example(text, example.positive)


_GOOD = (
    "love it", "works like a charm", "10/10 would recommend", "so good", "made my day", "worth every penny",
    "exceeded my expectations", "can't stop using it", "five stars", "best purchase this year", "no complaints at all",
    "not bad at all", "couldn't be happier", "fast and friendly service", "super easy to set up", "a game changer",
    "I'm obsessed", "this slaps", "absolute fire", "blown away", "can't complain", "never disappoints",
    "finally an app that just works", "the update fixed everything", "the team was so helpful", "such a lovely evening",
    "what a win", "we'll definitely be back", "nothing to dislike here", "I wasn't disappointed",
    "it isn't cheap, but it's worth it", "I expected little and got a lot", "delicious from start to finish",
    "shipping was quick and the box arrived in perfect shape", "the new design is gorgeous", "super happy with this",
    "it saved me hours", "thank you so much for this", "hands down the best", "my kids adore it",
)  # fmt: skip
_BAD = (
    "hate it", "total waste of money", "do not buy", "stopped working after a week", "0/10", "so disappointed",
    "customer support never replied", "keeps crashing", "want my money back", "worst purchase ever", "not worth it",
    "not good at all", "I don't like it", "couldn't be more annoyed", "never again", "this is a scam", "what a joke",
    "the update broke everything", "it doesn't work", "battery dies in an hour", "the food was cold and bland",
    "rude staff and a dirty table", "I regret buying this", "it isn't as good as they say", "nobody asked for this",
    "I wanted to love it but I can't", "it looked great online and fell apart at home", "slow, buggy and overpriced",
    "still waiting for my refund", "package arrived damaged", "absolute garbage", "this is trash", "so cringe",
    "I'm fed up", "made me sick", "way too expensive for what it is", "ads everywhere", "the app logs me out every day",
    "nothing works as described", "I was hoping for better",
)  # fmt: skip
_SUBJECTS = (
    "",
    "Honestly, ",
    "OMG ",
    "tbh ",
    "Update: ",
    "ok so ",
    "Well... ",
    "Just tried it: ",
    "The phone: ",
    "@team ",
)


def own_sentences() -> Iterator[tuple[int, str]]:
    """(label, text): short modern remarks written for this project, and each emoji by itself."""
    for label, phrases, emojis in ((1, _GOOD, list(POSITIVE)), (0, _BAD, list(NEGATIVE))):
        rng = random.Random(label)
        for phrase in phrases:
            for _ in range(3):
                tail = rng.choice(["", "!", ".", "!!", " " + rng.choice(emojis), rng.choice(emojis)])
                yield label, f"{rng.choice(_SUBJECTS)}{phrase}{tail}"
        for emoji in emojis:
            yield label, emoji
