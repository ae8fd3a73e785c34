"""What is asked of a release, and what the answers mean together: go on, wait, or go back."""

from .answers import answer_checks
from .evidence import BAD, WAIT, Bounds, Check, Evidence
from .pods import pod_checks


def checks(evidence: Evidence, bounds: Bounds) -> list[Check]:
    release = Check("release", {each.name: each.release for each in evidence.tracks})
    return [release, *pod_checks(evidence), *answer_checks(evidence, bounds)]


def verdict(found: list[Check]) -> tuple[str, str]:
    """`promote`, `wait` or `roll back`, and why."""
    for state, word in ((BAD, "roll back"), (WAIT, "wait")):
        if reasons := [f"{each.name}: {each.reason}" for each in found if each.state == state]:
            return word, "; ".join(reasons)
    return "promote", "every check holds"
