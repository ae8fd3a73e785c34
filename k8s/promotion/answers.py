"""What clients saw of a release: how many there were, errors, refusals, latency, and what the model told them."""

import math
from collections.abc import Iterator
from typing import Any

from .chance import at_least, more_often
from .evidence import BAD, OK, SHOWN, WAIT, Bounds, Check, Evidence
from .traffic import stability_index

# A verdict may be asked for again and again, so one look in twenty must not be wrong by chance.
CHANCE = 0.01
# One error on a quiet service is no finding, however unlikely it was.
LEAST_CASES = 5


def answer_checks(evidence: Evidence, bounds: Bounds) -> Iterator[Check]:
    yield _requests(evidence, bounds)
    yield _errors(evidence, bounds)
    yield _refused(evidence, bounds)
    yield from _latency(evidence, bounds)
    yield from _predictions(evidence, bounds)


def _requests(evidence: Evidence, bounds: Bounds) -> Check:
    values = {name: each.requests for name, each in evidence.traffic.items()}
    few = values[evidence.judged.name] < bounds.requests
    reason = f"too few requests to judge by: {values[evidence.judged.name]} of {bounds.requests}" if few else ""
    return Check("requests", values, f"at least {bounds.requests}", WAIT if few else OK, reason)


def _share(
    name: str, evidence: Evidence, counts: dict[str, tuple[int, int]], bound: float, *, compared: bool = True
) -> Check:
    """A share of cases that is to be small: within the bound and, compared, as the stable Pods' but for chance."""
    cases, of = counts[evidence.judged.name]
    other_cases, other_of = counts[evidence.stable.name] if evidence.stable and compared else (0, 0)
    values = {track: round(some / whole, 4) if whole else None for track, (some, whole) in counts.items()}
    check = Check(name, values, f"at most {bound:g}", OK)
    if cases >= LEAST_CASES and at_least(cases, of, bound) < CHANCE:
        check.state, check.reason = BAD, f"{cases} of {of}, beyond {bound:g}"
    elif (
        other_of
        and cases >= LEAST_CASES
        and cases * other_of > 2 * other_cases * of
        and more_often(cases, of, other_cases, other_of) < CHANCE
    ):
        check.state, check.reason = BAD, f"{cases} of {of}, and of the stable Pods' {other_cases} of {other_of}"
    elif cases > of * bound:
        check.state, check.reason = WAIT, f"{cases} of {of}: it may be chance"
    return check


def _errors(evidence: Evidence, bounds: Bounds) -> Check:
    counts = {name: (each.errors, each.requests) for name, each in evidence.traffic.items()}
    return _share("errors", evidence, counts, bounds.error_ratio)


def _refused(evidence: Evidence, bounds: Bounds) -> Check:
    counts = {name: (each.refused, each.requests) for name, each in evidence.traffic.items()}
    check = _share("refused", evidence, counts, bounds.refused_ratio)
    if check.state != OK:
        check.reason += "; capacity: less weight, or more replicas"
    return check


def _latency(evidence: Evidence, bounds: Bounds) -> Iterator[Check]:
    def seconds(share: float) -> dict[str, Any]:
        values = {name: each.quantile(share) for name, each in evidence.traffic.items()}
        return {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}

    yield Check("p50 seconds", seconds(0.5))
    # That p95 is within the bound says that at most 5 % are slower: counts, which chance can be told of.
    slower = {name: (each.slower(bounds.p95_seconds), each.timed) for name, each in evidence.traffic.items()}
    check = _share("p95 seconds", evidence, slower, 0.05, compared=False)
    check.values, check.bound = seconds(0.95), f"at most {bounds.p95_seconds:g}"
    stable, judged = evidence.of_stable(), evidence.of_judged()
    edge = stable.edge(0.95)
    if check.reason:
        check.reason += f" (slower than {bounds.p95_seconds:g} s)"
    elif stable.timed >= bounds.requests and not math.isinf(edge):
        cases, other = judged.slower(edge), stable.slower(edge)
        worse = more_often(cases, judged.timed, other, stable.timed) < CHANCE
        # At most 5 % of the stable Pods' answers are beyond it.
        if cases >= LEAST_CASES and cases > 0.1 * judged.timed and worse:
            check.state = BAD
            check.reason = (
                f"{cases} of {judged.timed} took more than {edge:g} s, the stable Pods' {other} of {stable.timed}"
            )
    yield check
    yield Check("p99 seconds", seconds(0.99))


def _predictions(evidence: Evidence, bounds: Bounds) -> Iterator[Check]:
    counted = {name: round(sum(each.predictions.values())) for name, each in evidence.traffic.items()}
    if not any(counted.values()):
        return
    judged, stable = evidence.of_judged(), evidence.of_stable()
    indices = {name: stability_index(each.predictions, each.reference) for name, each in evidence.traffic.items()}
    between = stability_index(judged.predictions, stable.predictions)
    shown = {name: None if math.isnan(value) else round(value, 3) for name, value in indices.items()}
    check = Check("predictions", shown, f"index at most {bounds.stability_index:g}", OK)
    index, least = indices[evidence.judged.name], bounds.predictions(len(judged.reference))
    if not judged.reference:
        check.state, check.reason = SHOWN, "the model has no reference distribution"
    elif counted[evidence.judged.name] < least:
        check.state = WAIT
        check.reason = f"too few predictions to judge by: {counted[evidence.judged.name]} of {least}"
    elif index > bounds.stability_index:
        if evidence.stable is None:
            # Who came with other inputs is not known.
            check.state, check.reason = WAIT, "not as the model's reference: the model or what it is asked is another"
        elif indices[evidence.stable.name] > bounds.stability_index or between <= bounds.stability_index:
            check.state, check.reason = WAIT, "the stable Pods' have moved as well: what is asked is another"
        else:
            check.state, check.reason = BAD, f"not distributed as the model's reference (index {index:.2f})"
    yield check
    if not math.isnan(between):
        yield Check("predictions, both", {evidence.judged.name: round(between, 3)})
