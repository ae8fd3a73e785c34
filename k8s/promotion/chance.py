"""How likely a count is by chance alone. Exact, so that few requests prove little and need no rule of their own."""

from math import exp, lgamma, log


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def at_least(cases: int, of: int, probability: float) -> float:
    """The chance of so many cases or more, if each of `of` is one with this probability (binomial)."""
    if cases <= of * probability:
        return 1.0
    total = 0.0
    for k in range(cases, of + 1):
        term = exp(_log_choose(of, k) + k * log(probability) + (of - k) * log(1 - probability))
        total += term
        # Beyond the mean, each is less likely than the one before.
        if term < total * 1e-12:
            break
    return min(total, 1.0)


def more_often(cases: int, of: int, other_cases: int, other_of: int) -> float:
    """The chance of so many of all cases or more on this side, if both sides are alike (Fisher's exact test)."""
    everything, all_cases = of + other_of, cases + other_cases
    if cases * everything <= of * all_cases:
        return 1.0
    total = 0.0
    for k in range(cases, min(of, all_cases) + 1):
        ways = _log_choose(of, k) + _log_choose(other_of, all_cases - k) - _log_choose(everything, all_cases)
        total += exp(ways)
        if exp(ways) < total * 1e-12:
            break
    return min(total, 1.0)
