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
    words = [rng.choice(_WORDS) for _ in range(count)]
    return " ".join(words).capitalize() + rng.choice((".", ".", "!", "?"))


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` sentences, the same for the same seed."""
    rng = random.Random(seed)
    return [sentence(rng) for _ in range(count)]
