"""The HPA's decisions, worked out by hand from the documented algorithm."""

import pytest
import yaml

from loadtest.simulate.hpa import (
    DEPLOYED,
    Autoscaler,
    Behavior,
    Metric,
    Pods,
    Policy,
    Rules,
    recommend,
    recommend_largest,
)
from tests.process import ROOT

FAST_DOWN = Rules(0.0, (Policy("Percent", 100, 15),))


@pytest.mark.parametrize(
    ("current", "values", "target", "wanted"),
    [
        (1, [200], 100, 2),  # the documentation's own: 200m against 100m doubles
        (2, [50, 50], 100, 1),  # and 50m against 100m halves
        (3, [90, 90, 90], 50, 6),  # 1.8 × 3 = 5.4
        (4, [10, 20, 30, 40], 20, 5),  # mean 25 / 20 = 1.25
        (10, [105] * 10, 100, 10),  # 1.05 is within the tolerance
        (10, [110] * 10, 100, 10),  # 1.10 is still within
        (10, [111] * 10, 100, 12),  # 1.11 is not: 11.1
        (10, [90] * 10, 100, 10),
        (10, [89] * 10, 100, 9),  # 8.9
        (50, [90] * 50, 75, 60),
        (3, [0, 0, 0], 10, 0),  # the bounds make it the least
        (3, [0.1 * 3] * 3, 0.3, 3),  # floats that are not exact add no replica
    ],
)
def test_ratio_of_mean_and_target(current, values, target, wanted):
    assert recommend(current, Pods(values), target) == wanted


@pytest.mark.parametrize(
    ("current", "pods", "target", "wanted"),
    [
        # Up: 2 Pods at 3× the target, one missing counts as 0: (60 + 0)/3 = 20 = 2 × 10; 2 × 3 = 6, not 9.
        (3, Pods([30, 30], missing=1), 10, 6),
        # Down: 3 Pods at 0.2, one missing counts as at the target: (2+2+2+10)/4 = 4; 0.4 × 4 = 1.6.
        (4, Pods([2, 2, 2], missing=1), 10, 2),
        # Up with pending Pods at 0: (20 + 20 + 0 + 0)/4 = 10 = the target: nothing changes.
        (4, Pods([20, 20], ignored=2), 10, 4),
        # Up with one pending: 40/3/10 = 1.33, × 3 = 4.
        (3, Pods([20, 20], ignored=1), 10, 4),
        # Turned around: 15/10 up, with two missing at 0: 30/4/10 = 0.75 would go down: stays.
        (4, Pods([15, 15], missing=2), 10, 4),
        # Down: ignored Pods do not count at all: 0.5 × 2 = 1.
        (4, Pods([5, 5], ignored=2), 10, 1),
        # Down past a Pod that is gone: 0.8 × 2 = 1.6.
        (3, Pods([8, 8]), 10, 2),
        # Nobody tells anything: nothing changes.
        (5, Pods([], missing=5), 10, 5),
        # Down ratio, but more Pods count than there are: (5 + 10×3)/4 = 8.75; 0.875 × 4 = 3.5 → 4 > 2: stays.
        (2, Pods([5], missing=3), 10, 2),
    ],
)
def test_missing_and_pending_pods_damp_the_answer(current, pods, target, wanted):
    assert recommend(current, pods, target) == wanted


def test_on_cpu_a_missing_pod_counts_as_its_whole_request_when_scaling_down():
    # At target 0.5: (0.2 + 0.2 + 1.0)/3 = 0.467; / 0.5 = 0.93: within the tolerance. As a plain metric it would be
    # (0.2 + 0.2 + 0.5)/3 / 0.5 = 0.6; × 3 = 1.8.
    pods = Pods([0.2, 0.2], missing=1)
    assert recommend(3, pods, 0.5, cpu=True) == 3
    assert recommend(3, pods, 0.5) == 2


def test_tolerance_may_differ_up_and_down():
    behavior = Behavior(up=Rules(0, (), tolerance=0.0), down=Rules(300, (), tolerance=0.3))
    assert recommend(10, Pods([101] * 10), 100, behavior) == 11
    assert recommend(10, Pods([75] * 10), 100, behavior) == 10


def test_default_policies_double_or_add_four_in_each_fifteen_seconds():
    hpa = Autoscaler(1, 100, target=1)
    assert hpa.sync(0, 1, Pods([50.0])) == 5  # four more is more than double
    assert hpa.sync(15, 5, Pods([10.0] * 5)) == 10  # double is more than four more
    assert hpa.sync(30, 10, Pods([5.0] * 10)) == 20


def test_changes_within_a_policys_period_add_up():
    slow = Behavior(up=Rules(0, (Policy("Pods", 4, 60),)))
    hpa = Autoscaler(1, 100, target=1, behavior=slow)
    assert hpa.sync(0, 2, Pods([50.0] * 2)) == 6
    assert hpa.sync(15, 6, Pods([50.0] * 6)) == 6  # 2 at the start of the minute, and 4 more
    assert hpa.sync(59, 6, Pods([50.0] * 6)) == 6
    assert hpa.sync(60, 6, Pods([50.0] * 6)) == 10


def test_the_policy_that_changes_least_is_chosen_with_min():
    policies = (Policy("Pods", 4, 60), Policy("Percent", 10, 60))
    behavior = Behavior(up=Rules(0, policies, "Min"), down=Rules(0, policies, "Min"))
    assert Autoscaler(1, 999, 1, behavior).sync(0, 80, Pods([50.0] * 80)) == 84  # 10 % would be 88
    assert Autoscaler(1, 999, 1, behavior).sync(0, 20, Pods([50.0] * 20)) == 22  # 4 Pods would be 24
    assert Autoscaler(1, 999, 1, behavior).sync(0, 80, Pods([0.0] * 80)) == 76
    assert Autoscaler(1, 999, 1, behavior).sync(0, 20, Pods([0.0] * 20)) == 18


def test_scaling_down_by_percent_and_pods_as_documented():
    # The documentation's example: 4 Pods or 10 % of the replicas each minute, whichever is more. 80 → 72 → 64.8 is cut
    # off to 64 → 57 … and under 40 replicas 4 Pods are more.
    policies = (Policy("Pods", 4, 60), Policy("Percent", 10, 60))
    hpa = Autoscaler(10, 100, 1, Behavior(down=Rules(0, policies)))
    current, seen = 80, []
    for minute in range(7):
        current = hpa.sync(60 * minute, current, Pods([0.0] * current))
        seen.append(current)
    assert seen == [72, 64, 57, 51, 45, 40, 36]


@pytest.mark.parametrize(("direction", "values"), [("up", [9.0] * 4), ("down", [0.0] * 4)])
def test_a_direction_may_be_disabled(direction, values):
    behavior = Behavior(**{direction: Rules(0, (Policy("Pods", 4, 60),), "Disabled")})
    assert Autoscaler(1, 100, 1, behavior).sync(0, 4, Pods(values)) == 4


def test_down_waits_for_the_most_that_was_recommended_in_five_minutes():
    hpa = Autoscaler(1, 100, target=10)
    assert hpa.sync(0, 4, Pods([10.0] * 4)) == 4  # recommends 4
    for now in range(15, 300, 15):
        assert hpa.sync(now, 4, Pods([2.0] * 4)) == 4  # recommends 1
    assert hpa.sync(300, 4, Pods([2.0] * 4)) == 1  # the 4 of five minutes ago no longer counts


def test_a_peak_within_the_window_starts_the_wait_anew():
    hpa = Autoscaler(1, 100, target=10)
    hpa.sync(0, 4, Pods([2.0] * 4))
    hpa.sync(150, 4, Pods([7.5] * 4))  # recommends 3
    assert hpa.sync(300, 4, Pods([2.0] * 4)) == 3
    assert hpa.sync(450, 3, Pods([2.0] * 3)) == 1


def test_up_waits_for_the_least_that_was_recommended_in_its_window():
    calm = Behavior(up=Rules(60, (Policy("Percent", 900, 15),)))
    hpa = Autoscaler(1, 100, target=10, behavior=calm)
    assert hpa.sync(0, 2, Pods([10.0] * 2)) == 2
    assert hpa.sync(15, 2, Pods([40.0] * 2)) == 2
    assert hpa.sync(60, 2, Pods([30.0] * 2)) == 6  # 8 and 6 in the window: the less


def test_bounds_come_last_and_at_once():
    hpa = Autoscaler(3, 5, target=10)
    assert hpa.sync(0, 1, Pods([10.0])) == 3
    assert hpa.sync(15, 9, Pods([10.0] * 9)) == 5
    assert hpa.sync(30, 5, Pods([99.0] * 5)) == 5
    floor = Autoscaler(3, 5, target=10, behavior=Behavior(down=FAST_DOWN))
    assert floor.sync(0, 4, Pods([0.0] * 4)) == 3


def test_utilisation_is_in_whole_percent_cut_off():
    # 0.779 of the request is 77 %; 77/70 = 1.10 is within the tolerance. As a plain metric 0.779/0.7 = 1.113 is not.
    assert recommend(10, Pods([0.779] * 10), 0.7, cpu=True) == 10
    assert recommend(10, Pods([0.779] * 10), 0.7) == 12


def test_the_largest_answer_of_several_metrics_counts():
    metrics = [Metric(10, Pods([20.0] * 3)), Metric(0.5, Pods([0.9] * 3), cpu=True), Metric(10, Pods([1.0] * 3))]
    assert recommend_largest(3, metrics) == 6  # 6, 5.4 and 0.3
    assert Autoscaler(1, 100, 10).sync(0, 3, metrics[0].pods, metrics[1:]) == 6


def test_a_metric_that_cannot_be_had_forbids_to_scale_down_but_not_up():
    gone = Metric(0.5, Pods([], missing=3), cpu=True)
    assert recommend_largest(3, [Metric(10, Pods([20.0] * 3)), gone]) == 6
    assert recommend_largest(3, [Metric(10, Pods([2.0] * 3)), gone]) is None
    assert recommend_largest(3, [gone]) is None
    fast = Behavior(down=FAST_DOWN)
    assert Autoscaler(1, 100, 10, fast).sync(0, 3, Pods([2.0] * 3), [gone]) == 3


def test_an_hpa_that_has_just_started_holds_what_it_finds_for_the_window():
    # What there is counts as recommended at the first sync: a restarted controller does not scale down at once.
    hpa = Autoscaler(1, 100, target=10)
    assert hpa.sync(0, 4, Pods([2.0] * 4)) == 4
    assert hpa.sync(285, 4, Pods([2.0] * 4)) == 4
    assert hpa.sync(300, 4, Pods([2.0] * 4)) == 1


def test_a_sync_without_metrics_recommends_nothing():
    # Recommended: 8 at 0, nothing at 15, 2 at 300. Had 15 counted as the 8 there were, 300 would stay at 8.
    hpa = Autoscaler(1, 100, target=10, behavior=Behavior(down=Rules(300, (Policy("Percent", 100, 15),))))
    assert hpa.sync(0, 8, Pods([10.0] * 8)) == 8
    assert hpa.sync(15, 8, Pods([], missing=8)) == 8
    assert hpa.sync(300, 8, Pods([2.0] * 8)) == 2


def test_what_is_simulated_is_the_behaviour_that_is_deployed():
    behavior = yaml.safe_load((ROOT / "k8s" / "base" / "hpa.yaml").read_text())["spec"]["behavior"]
    for said, rules in ((behavior["scaleUp"], DEPLOYED.up), (behavior["scaleDown"], DEPLOYED.down)):
        assert said["stabilizationWindowSeconds"] == rules.stabilization_seconds
        assert said["selectPolicy"] == rules.select
        policies = [(each["type"], each["value"], each["periodSeconds"]) for each in said["policies"]]
        assert policies == [(each.type, each.value, each.period_seconds) for each in rules.policies]
