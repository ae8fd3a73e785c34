"""Which in-flight to measure next: doubling first, then halving the brackets around the peak and the objective. Knows
the steps so far, not how they are measured.
"""

from collections.abc import Sequence

import msgspec

from loadtest.capacity.schema import Options, Step

# A step is at the peak when it has this share of the best throughput.
AT_PEAK = 0.95
# More load that gives less than this share of the best is a collapse, and the peak lies before it.
COLLAPSED = 0.90
# Doubling goes on while it gains this much.
GAINING = 1.05
# Brackets are refined to this share of their upper end.
RESOLUTION = 0.1
MAX_STEPS = 32
# A machine so disturbed that more than this would be repeated gives no better numbers by repeating.
MAX_REPEATS = 4
Bracket = tuple[int | None, int | None]


def next_in_flight(steps: Sequence[Step], options: Options) -> int | None:
    """The in-flight of the next step, or None when knee, peak and objective are bracketed finely enough."""
    if not steps:
        return 1
    if len(steps) >= MAX_STEPS:
        return None
    by_level = merge(steps)
    if _may_double(by_level, options):
        return min(options.max_in_flight, max(by_level) * 2)
    doubtful = _doubtful(by_level, options)
    if doubtful is not None:
        return doubtful
    for low, high in (_rising(by_level), _falling(by_level), objective(by_level, options)):
        if low is not None and high is not None and high - low > max(1, RESOLUTION * high):
            return (low + high) // 2
    return None


def merge(steps: Sequence[Step]) -> dict[int, Step]:
    """Steps by in-flight, ascending. Of two at the same, the faster: what else ran on the machine only adds latency."""
    found: dict[int, Step] = {}
    for step in sorted(steps, key=lambda step: (step.in_flight, step.p95_ms.value)):
        best = found.setdefault(int(step.in_flight), step)
        if best is not step:
            found[int(step.in_flight)] = msgspec.structs.replace(best, repeats=best.repeats + 1)
    return found


def _doubtful(by_level: dict[int, Step], options: Options) -> int | None:
    """A step that violates the objective where a heavier load holds it: something else disturbed it, so once more."""
    if sum(step.repeats for step in by_level.values()) >= MAX_REPEATS:
        return None
    heaviest = max((level for level, step in by_level.items() if step.holds(options)), default=0)
    doubtful = (n for n, step in by_level.items() if n < heaviest and not step.holds(options) and not step.repeats)
    return next(doubtful, None)


def _may_double(by_level: dict[int, Step], options: Options) -> bool:
    highest = max(by_level)
    last = by_level[highest]
    if highest >= options.max_in_flight or any(level & (level - 1) for level in by_level):
        return False
    if last.holds(options):
        return True
    best_before = max((step.rps.value for step in by_level.values() if step is not last), default=0.0)
    return last.failed_share < 0.5 and last.rps.value > GAINING * best_before


def first_at_peak(by_level: dict[int, Step]) -> int:
    """The smallest in-flight that gives nearly the best throughput."""
    best = max(step.rps.value for step in by_level.values())
    return next(level for level, step in by_level.items() if step.rps.value >= AT_PEAK * best)


def _rising(by_level: dict[int, Step]) -> Bracket:
    """Where throughput reaches its peak."""
    high = first_at_peak(by_level)
    return max((level for level in by_level if level < high), default=None), high


def _falling(by_level: dict[int, Step]) -> Bracket:
    """Where throughput falls again, if it does: the best lies between the neighbours of the best so far."""
    best = max(by_level, key=lambda level: by_level[level].rps.value)
    after = min((level for level in by_level if level > best), default=None)
    if after is None or by_level[after].rps.value > COLLAPSED * by_level[best].rps.value:
        return None, None
    return best, after


def objective(by_level: dict[int, Step], options: Options) -> Bracket:
    """The largest in-flight within the objective with everything below it within it too, and the next above."""
    low = None
    for level, step in by_level.items():
        if not step.holds(options):
            return low, level
        low = level
    return low, None
