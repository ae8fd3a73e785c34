"""Texts for load: made by this code, with the lengths of ordinary sentences."""

import random

_WORDS = tuple(
    """
    the a this that it we they my our your was is are were has had have will would can could never always really
    very quite almost just only still even so too not and but or because when while after before if though with
    without for from into over under about good great bad awful nice lovely terrible perfect broken slow fast
    cheap late early warm cold fresh noisy quiet helpful rude friendly boring funny clever useful useless food
    coffee room hotel train flight phone screen battery keyboard app update price service waiter driver package
    box book film story actor ending song garden kitchen weather morning evening weekend week month year day
    friend family team support refund ticket seat love like hate enjoy regret recommend return buy order wait call
    write read watch eat sleep walk arrived worked failed stopped opened closed helped cost took made felt looked
    sounded tasted seemed
    """.split()
)


def sentence(rng: random.Random) -> str:
    """One sentence of log-normal length: half have 13 words or fewer, one in twenty over 35."""
    count = min(120, max(2, round(rng.lognormvariate(2.6, 0.6))))
    return text_of_words(count, rng) + rng.choice((".", ".", "!", "?"))


def text_of_words(count: int, rng: random.Random) -> str:
    """So many words, with nothing behind the last."""
    return " ".join(rng.choice(_WORDS) for _ in range(count)).capitalize()


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` sentences, the same for the same seed."""
    rng = random.Random(seed)
    return [sentence(rng) for _ in range(count)]


# What traffic looks like, in words: most of it a sentence or two, some of it a word or two, some of it a whole review.
MIX = {"short": (0.30, 2, 8), "medium": (0.55, 9, 30), "long": (0.15, 60, 180)}


def text_of(kind: str, rng: random.Random) -> str:
    """One text of a kind of MIX, its number of words even between that kind's bounds."""
    _, low, high = MIX[kind]
    return text_of_words(rng.randint(low, high), rng) + "."


def shares_of(text: str) -> tuple[float, ...]:
    """Shares of MIX's kinds, as people write them: `0.3,0.55,0.15`. Raises ValueError, one line for people."""
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != len(MIX) or min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"--mix {text!r}: needs {len(MIX)} shares ({', '.join(MIX)})")
    return shares


def mixed(count: int, seed: int = 0, shares: tuple[float, ...] | None = None) -> list[str]:
    """`count` texts of all kinds in MIX's shares (or these, in its order), the same for the same seed."""
    rng = random.Random(seed)
    weights = shares or tuple(share for share, _, _ in MIX.values())
    return [text_of(kind, rng) for kind in rng.choices(list(MIX), weights, k=count)]
