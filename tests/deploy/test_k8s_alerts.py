"""Every alert under promtool, as long as its fault lasts: it fires, nothing else does, and it ends with the fault."""

import functools
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app import NAME
from tests.deploy.alerts.cluster import (
    FAULT,
    KUBE_STATE_METRICS,
    MINUTES,
    Autoscaler,
    ByMinute,
    Pod,
    Series,
    Workload,
    during,
    notation,
    selector,
)
from tests.deploy.test_k8s_rules import QUALITY_RULES, alerts, component, evaluated, known_samples, rules
from tests.manifests import Object, Variation, name_of, of_kind, tool

# Alerts, each with its track where it has one.
Firing = set[tuple[str, str]]
# More seldom than in a cluster, for the time it takes; often enough for rates over five minutes, and for instant
# queries, which look back as long.
SCRAPED_EVERY_MINUTES, EVALUATED = 2, "4m"
# When clients fail, somebody is woken within this time, and left alone this long after it is over: the half hour that
# the slower burn rate looks back, and a little.
WAKES, ENDS = 20, 35
# What has no clients to fail may take its time.
SETTLED = [FAULT.start + 60, FAULT.start + 120, FAULT.start + 240, FAULT.stop - 1]
LONG_AFTER = FAULT.stop + 70


@dataclass
class Scenario:
    """fires: alerts with their track ("" for those that have none), from a while after the fault's beginning to its
    end. after: what is still true long after it. parts: what there is in its namespace."""

    what: str
    parts: list[Workload]
    fires: Firing = field(default_factory=set)
    after: Firing = field(default_factory=set)
    # Of things that a Workload cannot have by itself.
    more: list[Series] = field(default_factory=list)
    # While the fault lasts, kube-state-metrics tells nothing of this namespace.
    kube_state_metrics: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {', '.join(sorted(alert for alert, _ in self.fires)) or 'silence'}"

    @property
    def namespace(self) -> str:
        return re.sub(r"\W+", "-", self.what.lower())

    @functools.cached_property
    def series(self) -> list[Series]:
        found = [*self.more, *(each for part in self.parts for each in part.series())]
        if not self.kube_state_metrics:
            found = [
                (name, labels, [None if minute in FAULT else each for minute, each in enumerate(samples)])
                if name in KUBE_STATE_METRICS
                else (name, labels, samples)
                for name, labels, samples in found
            ]
        ours = {"namespace": self.namespace}
        return [
            (name, labels | ours, samples)
            for name, labels, samples in found
            if any(value is not None for value in samples)
        ]

    def checks(self) -> Iterator[Object]:
        """What fires when, as a whole."""
        severities = {name: alert["labels"]["severity"] for name, alert in alerts().items()}
        critical = {(alert, track) for alert, track in self.fires if severities[alert] == "critical"}
        for minute in [FAULT.start - 1, *([] if self.fires else range(FAULT.start, LONG_AFTER, 20))]:
            yield self._check(minute, set())
        yield self._check(FAULT.start + WAKES, critical, severity="critical")
        for minute in SETTLED:
            yield self._check(minute, self.fires)
        yield self._check(FAULT.stop + ENDS, set(), severity="critical")
        yield self._check(LONG_AFTER, self.after)

    def _check(self, minute: int, firing: Firing, **only: str) -> Object:
        matched = {"alertstate": "firing", "namespace": self.namespace} | only
        labels = ({"alertname": alert, "namespace": self.namespace, "track": track} for alert, track in firing)
        return {
            "expr": f"group by (alertname, namespace, track) ({selector('ALERTS', matched)})",
            "eval_time": f"{minute}m",
            "exp_samples": [
                {"labels": selector("", {name: value for name, value in each.items() if value}), "value": 1}
                for each in labels
            ],
        }


def judged(scenarios: Sequence[Scenario], groups: list[Object], folder: Path) -> str:
    """What promtool says of all of them, each in a namespace of its own in one cluster, so that they are each other's
    neighbours: nothing, or which query gave what else."""
    test = {
        "interval": f"{SCRAPED_EVERY_MINUTES}m",
        "input_series": [
            {"series": selector(name, labels), "values": notation(values[::SCRAPED_EVERY_MINUTES])}
            for each in scenarios
            for name, labels, values in each.series
        ],
        "promql_expr_test": [check for each in scenarios for check in each.checks()],
    }
    (folder / "rules.yaml").write_text(json.dumps({"groups": groups}))
    settings = {"rule_files": ["rules.yaml"], "evaluation_interval": EVALUATED, "group_eval_order": evaluated(groups)}
    (folder / "test.yaml").write_text(json.dumps(settings | {"tests": [test]}))
    command = [tool("promtool", "apt-get install prometheus"), "test", "rules", str(folder / "test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def broken(state: str, **more: Any) -> Pod:
    """A Pod that is in that state while the fault lasts."""
    return Pod(lambda minute: state if minute in FAULT else "Ready", **more)


def since(begin: int, end: int, template: str, **more: Any) -> Pod:
    """A Pod of a release: a minute until it is ready, and from `end` on it is gone."""

    def state(minute: int) -> str:
        if not begin <= minute < end:
            return ""
        return "Running" if minute == begin else "Ready"

    return Pod(state, template, **more)


def answers(ok: float, **codes: float) -> dict[str, Any]:
    """What a Pod answers each minute; other codes (`_500`) while the fault lasts, and as many more 200 without it."""
    bad = sum(codes.values())
    return {
        "requests": {"200": during(FAULT, ok, ok + bad)} | {code[1:]: during(FAULT, n) for code, n in codes.items()}
    }


def every(minutes: int, value: float = 1) -> ByMinute:
    return lambda minute: value if minute in FAULT and minute % minutes == 0 else 0


def of_all(**more: Any) -> list[Pod]:
    """Two Pods alike."""
    return [Pod(**more) for _ in range(2)]


END, STABLE, CANARY = MINUTES.stop, "stable", "canary"
BUSY = {"busy_seconds": during(FAULT, 118, 30)}
CRASHES = {"restarts": every(5), "ended": ("Error", 1)}
GPU = {"gpu_memory_total_bytes": 80e9, "gpu_utilization_ratio": 0.4}
QUEUE = {"jobs_backlog": 5.0, "job_oldest_age_seconds": 10.0}


def gateway(**more: Any) -> Workload:
    pods = [Pod(model=False, **{"metrics": QUEUE} | more) for _ in range(2)]
    return Workload(pods, name=f"{NAME}-gateway", track="")


def worker(*pods: Pod, asleep: bool = False) -> Workload:
    """As KEDA has it: at zero its HPA says that it does not scale."""
    keda = Autoscaler(f"{NAME}-worker-keda", desired=len(pods), current=len(pods), active=lambda minute: not asleep)
    return Workload(list(pods), name=f"{NAME}-worker", track="", component="worker", autoscaler=keda)


def canary(*pods: Pod) -> Workload:
    return Workload(list(pods), name=f"{NAME}-canary", track="canary")


def restarted(release: str, minutes_each: int = 2) -> list[Pod]:
    """Two Pods, and those that take their place one after the other."""
    old = [since(-1, FAULT.start + minutes_each * (number + 1), "5d4f8c7b9d") for number in range(2)]
    return [*old, *(since(FAULT.start + minutes_each * number, END, release) for number in range(2))]


NO_REPLICA = ("InferenceNoReadyReplica", STABLE)
MISSING = ("InferenceReplicasMissing", STABLE)
STUCK = ("InferenceRolloutStuck", STABLE)
RESTARTS = ("InferenceRestarts", STABLE)
ERRORS = ("InferenceErrors", STABLE)
# Of a fault that is over, the budget is spent all the same.
BUDGET = ("InferenceErrorBudget", STABLE)
BLOCKED = ("InferenceScaleOutBlocked", STABLE)
REJECTED = ("InferenceRequestsRejected", STABLE)
SLOWER = ("InferenceLatencyAfterRollout", STABLE)
NOT_LOADED = ("InferenceModelLoadFailing", STABLE)
BLIND = ("InferenceAutoscalerBlind", STABLE)
GPU_IDLE = ("InferenceGpuNotUsed", "")

OUTAGES = [
    Scenario("no Pod has a node", [Workload([broken("Pending"), broken("Pending")])], {NO_REPLICA, MISSING}),
    Scenario(
        "every Pod ends again and again",
        [Workload([broken("CrashLoopBackOff", **CRASHES) for _ in range(2)])],
        {NO_REPLICA, MISSING, RESTARTS},
    ),
    Scenario(
        "all stable Pods are down behind a canary that is ready, at weight 0",
        [Workload([broken("Pending"), broken("Pending")]), canary(Pod(requests={}))],
        {NO_REPLICA, MISSING},
    ),
    Scenario(
        "every Pod ends again and again, and is ready for a moment each time",
        [Workload([Pod(lambda minute: "CrashLoopBackOff" if minute in FAULT and minute % 10 else "Ready", **CRASHES)])],
        {NO_REPLICA, RESTARTS},
    ),
    Scenario("no gate ends", [Workload([broken("Running")])], {NO_REPLICA, MISSING, NOT_LOADED}),
    Scenario("somebody scaled to zero", [Workload([broken("")], wanted=during(FAULT, 0, 1))], {NO_REPLICA}),
    Scenario(
        "somebody deleted the Deployment, and the HPA is still there",
        [Workload([broken("")], there=lambda minute: minute not in FAULT)],
        {("InferenceNoReadyReplica", STABLE)},
        more=list(Autoscaler().series("prod", NAME, [True] * END)),
    ),
    Scenario(
        "the queue does not answer its gateways",
        [Workload(), gateway(state=lambda minute: "Running" if minute in FAULT else "Ready")],
        {("InferenceNoReadyReplica", "gateway"), ("InferenceReplicasMissing", "gateway")},
    ),
    Scenario("Pods are restarted one after the other", [Workload(restarted("6e5a9d8c7f"), wanted=2)]),
    Scenario("nobody asks", [Workload(of_all(requests={}, busy_seconds=0)), canary(Pod(requests={}, busy_seconds=0))]),
    Scenario("no job, and no worker", [Workload(), gateway(), worker(asleep=True)]),
    Scenario(
        "the namespace is deleted in the middle of it",
        [
            Workload(
                [Pod(lambda minute: "Ready" if minute in range(FAULT.stop) else "", **answers(500, _500=100))],
                there=lambda minute: minute < FAULT.stop,
                autoscaler=Autoscaler(),
            )
        ],
        {ERRORS, BUDGET},
    ),
]

ERROR_RATES = [
    Scenario("5 % are 500", [Workload(of_all(**answers(570, _500=30)))], {ERRORS, BUDGET}, {BUDGET}),
    Scenario("5 % are 504", [Workload(of_all(**answers(570, _504=30)))], {ERRORS, BUDGET}, {BUDGET}),
    Scenario(
        "half of what the server had to answer fails, among a client's many mistakes",
        [Workload(of_all(requests={"400": 990, "200": during(FAULT, 5, 10), "500": during(FAULT, 5)}))],
        {ERRORS, BUDGET},
        {BUDGET},
    ),
    Scenario("0.5 % are 500", [Workload(of_all(**answers(597, _500=3)))], {BUDGET}, {BUDGET}),
    Scenario("0.05 % are 500", [Workload(of_all(**answers(1999, _500=1)))]),
    Scenario("one error on a quiet service", [Workload([Pod(requests={"200": every(10), "500": every(180)})])]),
    Scenario("what clients do wrong", [Workload(of_all(**answers(300, _400=300)))]),
    Scenario(
        "a canary with 1 % of the requests fails wholly",
        [Workload(of_all(requests={"200": 594})), canary(Pod(**answers(0, _500=18)))],
        {("InferenceErrors", CANARY), ("InferenceErrorBudget", CANARY)},
        {("InferenceErrorBudget", CANARY)},
    ),
    Scenario(
        "another service, made from the same starter",
        [Workload(), Workload([Pod(**answers(0, _500=600))], name="fraud-scoring", part_of="fraud-scoring")],
    ),
    Scenario(
        "everything is refused",
        [Workload(of_all(refused={"queue_full": during(FAULT, 600)}, **answers(0, _503=600)))],
        {("InferenceRefused", STABLE), REJECTED},
    ),
    Scenario(
        "everything is refused on a quiet service",
        [Workload([Pod(refused={"late": during(FAULT, 1)}, **answers(0, _503=1))])],
        {("InferenceRefused", STABLE), REJECTED},
    ),
    Scenario(
        "5 % are refused",
        [Workload(of_all(refused={"queue_full": during(FAULT, 30)}, **answers(570, _503=30)))],
        {REJECTED},
    ),
    Scenario(
        "one request is refused, and no other comes",
        [Workload([Pod(requests={"503": every(180)}, refused={"late": every(180)})])],
    ),
]

LATENCIES = [
    Scenario(
        "answers take 0.4 s", [Workload(of_all(seconds=during(FAULT, 0.4, 0.02)))], {("InferenceLatency", STABLE)}
    ),
    Scenario("answers take 0.2 s", [Workload(of_all(seconds=during(FAULT, 0.2, 0.02)))]),
    Scenario("the few there are take 0.4 s", [Workload([Pod(requests={"200": 1}, seconds=during(FAULT, 0.4, 0.02))])]),
    Scenario(
        "requests wait 0.2 s",
        [Workload(of_all(wait_seconds=during(FAULT, 0.2, 0.004)))],
        {("InferenceQueueWait", STABLE)},
    ),
    Scenario(
        "slower since a rollout, until the next one",
        [
            Workload(
                [
                    since(-1, FAULT.start, "5d4f8c7b9d"),
                    since(FAULT.start, FAULT.stop, "6e5a9d8c7f", seconds=0.09),
                    since(FAULT.stop, END, "7f6b0e9d8a"),
                ],
                wanted=1,
            )
        ],
        {SLOWER},
    ),
    Scenario(
        "slower since a rollout, and the next one does not help",
        [
            Workload(
                [
                    since(-1, FAULT.start, "5d4f8c7b9d"),
                    since(FAULT.start, FAULT.start + 90, "6e5a9d8c7f", seconds=0.09),
                    since(FAULT.start + 90, FAULT.stop, "7f6b0e9d8a", seconds=0.09),
                    since(FAULT.stop, END, "5d4f8c7b9d"),
                ],
                wanted=1,
            )
        ],
        {SLOWER},
    ),
    Scenario("as fast after a rollout as before it", [Workload(restarted("6e5a9d8c7f"), wanted=2)]),
    Scenario(
        "slower since a rollout, where nobody notices",
        [
            Workload(
                [
                    since(-1, FAULT.start, "5d4f8c7b9d", seconds=0.002),
                    since(FAULT.start, END, "6e5a9d8c7f", seconds=0.009),
                ],
                wanted=1,
            )
        ],
    ),
]

SCALING = [
    Scenario(
        "saturated, and the new Pods are Pending, which the HPA counts",
        [
            Workload(
                [*of_all(**BUSY), *(Pod(lambda minute: "Pending" if minute in FAULT else "") for _ in range(3))],
                autoscaler=Autoscaler(desired=during(FAULT, 5, 2), current=during(FAULT, 5, 2)),
            )
        ],
        {BLOCKED, MISSING},
    ),
    Scenario(
        "saturated, and a quota refuses new Pods",
        [Workload(of_all(**BUSY), wanted=during(FAULT, 5, 2), autoscaler=Autoscaler(desired=during(FAULT, 5, 2)))],
        {BLOCKED, MISSING},
    ),
    Scenario("saturated at maxReplicas", [Workload(of_all(**BUSY), autoscaler=Autoscaler(most=2))], {BLOCKED}),
    Scenario(
        "saturated at the maximum of KEDA's HPA",
        [Workload(of_all(**BUSY), autoscaler=Autoscaler(f"{NAME}-keda", most=2))],
        {BLOCKED},
    ),
    Scenario(
        "saturated at the maximum of KEDA's HPA, and nobody tells what it scales",
        [Workload(of_all(**BUSY), autoscaler=Autoscaler(f"{NAME}-keda", most=2, told=False))],
        {BLOCKED},
    ),
    Scenario("saturated, with room to scale", [Workload(of_all(**BUSY), autoscaler=Autoscaler())]),
    Scenario("at maxReplicas, and not saturated", [Workload(autoscaler=Autoscaler(most=2))]),
    Scenario(
        "the HPA's metric is unknown",
        [Workload(autoscaler=Autoscaler(active=lambda minute: minute not in FAULT))],
        {BLIND},
    ),
    Scenario(
        "the metric of KEDA's HPA is unknown",
        [Workload(autoscaler=Autoscaler(f"{NAME}-keda", active=lambda minute: minute not in FAULT))],
        {BLIND},
    ),
    Scenario(
        "the rollout is stuck: its Pod is Pending",
        [
            Workload(
                [*of_all(), Pod(lambda minute: "Pending" if minute in FAULT else "", "6e5a9d8c7f")],
                wanted=2,
                updated=during(FAULT, 1, 2),
                progressing=lambda minute: minute not in FAULT,
            )
        ],
        {STUCK},
    ),
    Scenario(
        "the rollout is stuck: its deadline has not passed, or nobody told",
        [
            Workload(
                [*of_all(), Pod(lambda minute: "Pending" if minute in FAULT else "", "6e5a9d8c7f")],
                wanted=2,
                updated=during(FAULT, 1, 2),
            )
        ],
        {STUCK},
    ),
    Scenario(
        "a rollout that takes its time, and always a Pod less",
        [Workload(of_all(), wanted=3, updated=lambda minute: minute // 10)],
    ),
]

PODS = [
    Scenario(
        "a rollout whose model does not pass the gate",
        [
            Workload(
                [
                    *of_all(),
                    Pod(
                        lambda minute: "CrashLoopBackOff" if minute in FAULT else "",
                        "6e5a9d8c7f",
                        restarts=every(5),
                        ended=("Error", 3),
                    ),
                ],
                wanted=2,
                updated=during(FAULT, 1, 2),
                progressing=lambda minute: minute not in FAULT[5:],
            )
        ],
        {NOT_LOADED, STUCK},
    ),
    Scenario("a gate that does not end", [Workload([Pod(), broken("Running")])], {NOT_LOADED, MISSING}),
    Scenario("it failed once", [Workload([Pod(), Pod(restarts=lambda minute: minute == 100, ended=("Error", 3))])]),
    Scenario(
        "out of memory again and again",
        [Workload([Pod(), broken("CrashLoopBackOff", restarts=every(5), ended=("OOMKilled", 137))])],
        {RESTARTS, MISSING},
    ),
    Scenario(
        "out of memory under requests, now and then",
        [Workload([Pod(), Pod(restarts=every(25), ended=("OOMKilled", 137))])],
        {RESTARTS},
    ),
    Scenario(
        "out of memory once", [Workload([Pod(), Pod(restarts=lambda minute: minute == 100, ended=("OOMKilled", 137))])]
    ),
    Scenario(
        "the init container does not fetch the model",
        [
            Workload(
                [*of_all(), Pod(lambda minute: "Init" if minute in FAULT else "", "6e5a9d8c7f")],
                wanted=2,
                updated=during(FAULT, 1, 2),
                progressing=lambda minute: minute not in FAULT,
            )
        ],
        {("InferenceInitContainerFailing", ""), STUCK},
    ),
    Scenario(
        "the init container takes eight minutes",
        [Workload([Pod(), Pod(lambda minute: "" if minute < 60 else "Init" if minute < 68 else "Ready")])],
    ),
    Scenario(
        "another team's container called server, with all that may go wrong",
        [
            Workload(),
            Workload(
                [broken("CrashLoopBackOff", restarts=every(5), ended=("Error", 3)), broken("Init"), broken("Pending")],
                name="payments",
                part_of="",
                progressing=lambda minute: minute not in FAULT,
                autoscaler=Autoscaler("payments", most=2, active=lambda minute: minute not in FAULT),
            ),
        ],
    ),
    Scenario("on the CPU, with a GPU", [Workload([Pod(), since(60, 420, "6e5a9d8c7f", metrics=GPU)])], {GPU_IDLE}),
    Scenario(
        "the GPU idles while its Pod answers",
        [Workload([Pod(metrics=GPU | {"gpu_utilization_ratio": during(FAULT, 0, 0.4)}, provider="cuda")])],
        {GPU_IDLE},
    ),
    Scenario("the GPU works", [Workload([Pod(metrics=GPU, provider="cuda")])]),
]

JOBS = [
    Scenario(
        "jobs wait, and there is no worker",
        [Workload(), gateway(metrics=QUEUE | {"job_oldest_age_seconds": during(FAULT, 2000, 10)}), worker(asleep=True)],
        {("InferenceJobsTooOld", "")},
    ),
    Scenario(
        "jobs are given up",
        [Workload(), gateway(), worker(Pod(model=False, metrics={"job_dead_letters_total": every(20)}))],
        {("InferenceJobsDeadLettered", "")},
    ),
]

MONITORING = [
    Scenario(
        "a Pod does not answer Prometheus",
        [Workload([Pod(), Pod(scraped=lambda minute: minute not in FAULT)])],
        {("InferenceScrapeFailing", "")},
    ),
    Scenario(
        "Pods are not asked by Prometheus",
        [Workload(of_all(scraped=lambda minute: None if minute in FAULT else True))],
        {("InferenceScrapeFailing", "")},
    ),
    Scenario(
        "kube-state-metrics is down",
        [Workload(autoscaler=Autoscaler())],
        {("InferenceClusterMetricsMissing", "")},
        kube_state_metrics=False,
    ),
]

SCENARIOS = [*OUTAGES, *ERROR_RATES, *LATENCIES, *SCALING, *PODS, *JOBS, *MONITORING]


@pytest.fixture(scope="module")
def judgement(tmp_path_factory: pytest.TempPathFactory) -> str:
    return judged(SCENARIOS, rules(), tmp_path_factory.mktemp("promtool"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_alerts(scenario: Scenario, judgement: str) -> None:
    of_this = [each for each in judgement.split("expr:") if f'namespace="{scenario.namespace}"' in each]

    assert of_this == []


def test_promtool_has_no_other_complaint(judgement: str) -> None:
    assert judgement == ""


def test_every_alert_is_shown_to_fire() -> None:
    shown = {alert for scenario in SCENARIOS for alert, _ in scenario.fires}

    # What the model predicts has scenarios of its own, in test_k8s_quality.py.
    assert shown == alerts().keys() - alerts(QUALITY_RULES).keys()


@pytest.mark.parametrize("names_change", [False, True])
def test_the_rules_name_every_deployment_that_has_pods_of_this_image(names_change: bool) -> None:
    objects = Variation("base", ("gateway", "canary", "queue", "monitoring"), names_change, workers=True).objects()
    rules = [
        rule
        for each in of_kind(objects, "PrometheusRule")
        for group in each["spec"]["groups"]
        for rule in group["rules"]
    ]
    named = {rule["labels"]["deployment"] for rule in rules if rule.get("record") == "deployment:inference_track:info"}

    assert named == {name_of(each) for each in of_kind(objects, "Deployment")}


def test_under_other_names_the_alerts_are_the_same_and_those_names_are_no_longer_theirs(tmp_path: Path) -> None:
    objects = Variation("base", ("monitoring",), renamed=True).objects()
    groups = [group for each in of_kind(objects, "PrometheusRule") for group in each["spec"]["groups"]]
    down = [broken("Pending"), broken("Pending")]
    parts = [
        Workload(down, name=f"team-{NAME}-two", autoscaler=Autoscaler(f"{NAME}-keda", active=lambda m: m not in FAULT)),
        Workload(down, name=NAME, part_of="", autoscaler=Autoscaler(active=lambda minute: minute not in FAULT)),
    ]

    assert judged([Scenario("renamed", parts, {NO_REPLICA, MISSING, BLIND})], groups, tmp_path) == ""


def test_the_series_are_those_that_a_cluster_and_the_server_give() -> None:
    scenario = [series for each in SCENARIOS for series in each.series]
    target = {"namespace", "job", "container", "endpoint", "track", "pod", "pod_template_hash"}
    monitor = component("monitoring/podmonitor.yaml")["spec"]["podTargetLabels"]
    target |= {re.sub(r"\W", "_", label) for label in monitor}

    for name, labels, _ in scenario:
        if name in KUBE_STATE_METRICS:
            assert labels.keys() == KUBE_STATE_METRICS[name]
        elif name != "up":
            assert labels.keys() - target <= known_samples()[name]
