"""What kube-state-metrics and the Pods of this service show Prometheus while something happens, minute by minute.

Knows no rule: only what a cluster gives.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from app import NAME
from app.http.routes import LABELS
from app.telemetry.metrics import Metrics

# A healthy hour, six hours of a fault, and more than an hour after it.
FAULT = range(60, 420)
MINUTES = range(500)
RUNNERS = 2

OBJECT = {"namespace", "uid", "pod"}
CONTAINER = OBJECT | {"container"}
DEPLOYMENT = {"namespace", "deployment"}
HPA = {"namespace", "horizontalpodautoscaler"}
# Its metrics that are used here, and their labels, as its documentation has them. Without labels of Pods and of
# Deployments, which it gives only where somebody allows them.
KUBE_STATE_METRICS = {
    "kube_deployment_spec_replicas": DEPLOYMENT,
    "kube_deployment_status_replicas": DEPLOYMENT,
    "kube_deployment_status_replicas_available": DEPLOYMENT,
    "kube_deployment_status_replicas_updated": DEPLOYMENT,
    "kube_deployment_status_condition": DEPLOYMENT | {"condition", "status"},
    "kube_replicaset_owner": {"namespace", "replicaset", "owner_kind", "owner_name", "owner_is_controller"},
    "kube_pod_owner": OBJECT | {"owner_kind", "owner_name", "owner_is_controller"},
    "kube_pod_status_phase": OBJECT | {"phase"},
    "kube_pod_status_ready": OBJECT | {"condition"},
    "kube_pod_container_status_restarts_total": CONTAINER,
    "kube_pod_container_status_waiting_reason": CONTAINER | {"reason"},
    "kube_pod_container_status_last_terminated_reason": CONTAINER | {"reason"},
    "kube_pod_container_status_last_terminated_exitcode": CONTAINER,
    "kube_pod_init_container_status_ready": CONTAINER,
    "kube_pod_init_container_status_restarts_total": CONTAINER,
    "kube_pod_init_container_status_waiting_reason": CONTAINER | {"reason"},
    "kube_horizontalpodautoscaler_info": HPA | {f"scaletargetref_{part}" for part in ("api_version", "kind", "name")},
    "kube_horizontalpodautoscaler_spec_max_replicas": HPA,
    "kube_horizontalpodautoscaler_status_current_replicas": HPA,
    "kube_horizontalpodautoscaler_status_desired_replicas": HPA,
    "kube_horizontalpodautoscaler_status_condition": HPA | {"condition", "status"},
}
# What a Pod can be, as kubectl would say it (Init: its init container fails; Running: and not ready), and its phase.
PHASES = dict.fromkeys(("Ready", "Running", "CrashLoopBackOff"), "Running") | dict.fromkeys(
    ("Init", "Pending"), "Pending"
)
STATUSES = ("true", "false", "unknown")
# The server's metrics that are made here for one route, and of their many samples those that matter.
OF_THE_SERVER = (
    *("model_ready", "inference_runners", "inference_runner_busy_seconds_total"),
    *("inference_requests_total", "inference_rejected_total"),
    *("inference_request_duration_seconds_bucket", "inference_request_duration_seconds_count"),
    "inference_queue_wait_seconds_bucket",
)
ROUTE = LABELS[0]
MATTER = {
    "code": {"200", "400", "500", "503", "504"},
    "reason": {"queue_full", "late", "invalid"},
    "le": {"0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "+Inf"},
}

Labels = dict[str, str]
# One for each minute; None: there is none.
Samples = list[float | None]
Series = tuple[str, Labels, Samples]
ByMinute = Callable[[int], float]
Value = float | ByMinute


def during(fault: range, value: float, otherwise: float = 0) -> ByMinute:
    return lambda minute: value if minute in fault else otherwise


def at(minute: int, value: Value) -> float:
    return value(minute) if callable(value) else value


def shown(value: Value, there: Sequence[bool]) -> Samples:
    """A gauge's."""
    if callable(value):
        return [value(minute) if there[minute] else None for minute in MINUTES]
    return [value if each else None for each in there]


def counted(more: Value, there: Sequence[bool]) -> Samples:
    """A counter's: `more` each minute, and from zero again when what counts has begun again."""
    samples: Samples = []
    total = 0.0
    for minute in MINUTES:
        began = not (minute and there[minute - 1])
        total = 0.0 if began else total + at(minute, more)
        samples.append(total if there[minute] else None)
    return samples


def waits(states: Sequence[str], state: str) -> list[bool]:
    """Whether a container that ends at once waits for its next try, which comes every five minutes."""
    return [each == state and minute % 5 > 0 for minute, each in enumerate(states)]


def one_of(name: str, labels: Labels, label: str, values: Sequence[str], now: Sequence[str]) -> Iterator[Series]:
    """A series for each of `values`: 1 while it is what there is `now`. None while there is nothing."""
    for value in values:
        yield name, labels | {label: value}, [float(each == value) if each else None for each in now]


@functools.cache
def samples_of_the_server() -> list[tuple[str, Labels]]:
    return [
        (sample.name, sample.labels)
        for family in Metrics([ROUTE]).registry.collect()
        for sample in family.samples
        if sample.name in OF_THE_SERVER
        and all(value in MATTER.get(label, {value}) for label, value in sample.labels.items())
    ]


@dataclass
class Pod:
    """state: one of PHASES by the minute, or nothing while there is no such Pod.

    Each minute: requests, by code; refused, by reason; busy_seconds, of its runners; restarts of its container, which
    ended with `ended` (reason, exit code). seconds, wait_seconds: how long each request, each wait for a runner takes.
    metrics: what it exports besides; `_total`: what is added each minute. scraped: whether Prometheus gets an answer;
    None: it does not ask."""

    state: Callable[[int], str] = lambda minute: "Ready"
    pod_template_hash: str = "5d4f8c7b9d"
    requests: dict[str, Value] = field(default_factory=lambda: {"200": 600})
    refused: dict[str, Value] = field(default_factory=dict)
    seconds: Value = 0.02
    wait_seconds: Value = 0.004
    busy_seconds: Value = 30
    restarts: Value = 0
    ended: tuple[str, int] = ("Error", 1)
    metrics: dict[str, Value] = field(default_factory=dict)
    scraped: Callable[[int], bool | None] = lambda minute: True
    provider: str = "cpu"
    # A gateway and a worker as it is scraped have none.
    model: bool = True
    container: str = "server"

    def series(self, namespace: str, deployment: str, name: str, target: Labels) -> Iterator[Series]:
        """target: what its series are labelled with, if it is scraped at all."""
        states = [self.state(minute) for minute in MINUTES]
        started = [state not in ("", "Pending") for state in states]
        pod = {"namespace": namespace, "pod": name, "uid": f"of-{name}"}
        owner = {"owner_kind": "ReplicaSet", "owner_name": f"{deployment}-{self.pod_template_hash}"}
        there = [bool(state) for state in states]
        yield "kube_pod_owner", pod | owner | {"owner_is_controller": "true"}, shown(1, there)
        yield from self._of_kubernetes(pod, states, started)
        if target:
            labels = target | {"pod": name, "pod_template_hash": self.pod_template_hash}
            answers = [state in ("Ready", "Running") and bool(self.scraped(m)) for m, state in enumerate(states)]
            # What has an address is a target, whether or not something listens there.
            target_there = [started[minute] and self.scraped(minute) is not None for minute in MINUTES]
            yield "up", labels, shown(lambda minute: answers[minute], target_there)
            yield from self._of_the_server(labels, states, answers)

    def _of_kubernetes(self, pod: Labels, states: list[str], started: list[bool]) -> Iterator[Series]:
        phases = [PHASES.get(state, "") for state in states]
        known = ("Pending", "Running", "Succeeded", "Failed", "Unknown")
        yield from one_of("kube_pod_status_phase", pod, "phase", known, phases)
        ready = [str(state == "Ready").lower() if state else "" for state in states]
        yield from one_of("kube_pod_status_ready", pod, "condition", STATUSES, ready)

        container, status = pod | {"container": self.container}, "kube_pod_container_status"
        yield f"{status}_restarts_total", container, counted(self.restarts, started)
        for reason, state in (("CrashLoopBackOff", "CrashLoopBackOff"), ("PodInitializing", "Init")):
            yield f"{status}_waiting_reason", container | {"reason": reason}, shown(1, waits(states, state))
        first = next((minute for minute in MINUTES if at(minute, self.restarts)), len(MINUTES))
        has_ended = [started[minute] and minute >= first for minute in MINUTES]
        reason, code = self.ended
        yield f"{status}_last_terminated_reason", container | {"reason": reason}, shown(1, has_ended)
        yield f"{status}_last_terminated_exitcode", container, shown(code, has_ended)

        if "Init" in states:
            fetch, status = pod | {"container": "fetch"}, "kube_pod_init_container_status"
            waiting = waits(states, "Init")
            yield f"{status}_ready", fetch, shown(lambda minute: states[minute] != "Init", started)
            yield f"{status}_waiting_reason", fetch | {"reason": "CrashLoopBackOff"}, shown(1, waiting)
            tries = [state == "Init" and not waiting[minute] for minute, state in enumerate(states)]
            yield f"{status}_restarts_total", fetch, counted(lambda minute: tries[minute], started)

    def _of_the_server(self, labels: Labels, states: list[str], answers: list[bool]) -> Iterator[Series]:
        def grows(more: Value) -> Samples:
            """While it takes requests."""
            return counted(lambda minute: at(minute, more) if states[minute] == "Ready" else 0, answers)

        def all_requests(minute: int) -> float:
            return sum(at(minute, each) for each in self.requests.values())

        def below(bound: str, seconds: Value) -> ByMinute:
            return lambda minute: all_requests(minute) if at(minute, seconds) <= float(bound) else 0

        for name, value in self.metrics.items():
            yield name, labels, counted(value, answers) if name.endswith("_total") else shown(value, answers)
        ready = [self.model and state == "Ready" for state in states]
        yield "model_ready", labels, shown(lambda minute: ready[minute], answers)
        model = {"name": "m", "version": "1", "digest": "d", "provider": self.provider, "precision": "int8"}
        yield "model_info", labels | model, shown(1, ready)
        for name, own in samples_of_the_server() if self.model else ():
            match name:
                case "inference_runners":
                    samples = shown(RUNNERS, answers)
                case "inference_runner_busy_seconds_total":
                    samples = grows(self.busy_seconds)
                case "inference_requests_total":
                    samples = grows(self.requests.get(own["code"], 0))
                case "inference_rejected_total":
                    samples = grows(self.refused.get(own["reason"], 0))
                case "inference_request_duration_seconds_count":
                    samples = grows(all_requests)
                case "inference_request_duration_seconds_bucket":
                    samples = grows(below(own["le"], self.seconds))
                case "inference_queue_wait_seconds_bucket":
                    samples = grows(below(own["le"], self.wait_seconds))
                case _:
                    continue
            yield name, labels | own, samples


@dataclass
class Autoscaler:
    """An HPA, and what it says of itself by the minute. current: it counts Pods that are Pending. told: whether
    kube-state-metrics tells what it scales."""

    name: str = NAME
    desired: Value = 2
    current: Value = 2
    most: float = 10
    active: Callable[[int], bool] = lambda minute: True
    told: bool = True

    def series(self, namespace: str, deployment: str, there: list[bool]) -> Iterator[Series]:
        hpa, prefix = {"namespace": namespace, "horizontalpodautoscaler": self.name}, "kube_horizontalpodautoscaler"
        scaled = {"api_version": "apps/v1", "kind": "Deployment", "name": deployment}
        target = {f"scaletargetref_{key}": value for key, value in scaled.items()}
        if self.told:
            yield f"{prefix}_info", hpa | target, shown(1, there)
        yield f"{prefix}_spec_max_replicas", hpa, shown(self.most, there)
        yield f"{prefix}_status_desired_replicas", hpa, shown(self.desired, there)
        yield f"{prefix}_status_current_replicas", hpa, shown(self.current, there)
        able = ["true" if each else "" for each in there]
        active = [str(self.active(minute)).lower() if there[minute] else "" for minute in MINUTES]
        for condition, now in (("AbleToScale", able), ("ScalingActive", active)):
            yield from one_of(f"{prefix}_status_condition", hpa | {"condition": condition}, "status", STATUSES, now)


@dataclass
class Workload:
    """A Deployment, what it makes, and what scales it.

    name: as Kustomize leaves it. track, component, part_of: labels of its Pods; without the last nobody scrapes them.
    wanted: its replicas; None: as many as it has Pods. updated: Pods of its newest template; None: all. progressing:
    not, when its deadline has passed. there: whether it exists."""

    pods: list[Pod] = field(default_factory=lambda: [Pod(), Pod()])
    namespace: str = "prod"
    name: str = NAME
    track: str = "stable"
    component: str = ""
    part_of: str = NAME
    wanted: Value | None = None
    updated: Value | None = None
    progressing: Callable[[int], bool] = lambda minute: True
    autoscaler: Autoscaler | None = None
    there: Callable[[int], bool] = lambda minute: True

    def series(self) -> Iterator[Series]:
        there = [self.there(minute) for minute in MINUTES]
        of = {"namespace": self.namespace, "deployment": self.name}

        def existing(minute: int) -> int:
            return sum(bool(pod.state(minute)) for pod in self.pods)

        def available(minute: int) -> int:
            return sum(pod.state(minute) == "Ready" for pod in self.pods)

        wanted = existing if self.wanted is None else self.wanted
        updated = existing if self.updated is None else self.updated
        yield "kube_deployment_spec_replicas", of, shown(wanted, there)
        yield "kube_deployment_status_replicas", of, shown(existing, there)
        yield "kube_deployment_status_replicas_available", of, shown(available, there)
        yield "kube_deployment_status_replicas_updated", of, shown(updated, there)
        progressing = [str(self.progressing(minute)).lower() if there[minute] else "" for minute in MINUTES]
        condition = of | {"condition": "Progressing"}
        yield from one_of("kube_deployment_status_condition", condition, "status", STATUSES, progressing)
        for template in sorted({pod.pod_template_hash for pod in self.pods}):
            replicaset = {"namespace": self.namespace, "replicaset": f"{self.name}-{template}"}
            owner = {"owner_kind": "Deployment", "owner_name": self.name, "owner_is_controller": "true"}
            yield "kube_replicaset_owner", replicaset | owner, shown(1, there)
        if self.autoscaler:
            yield from self.autoscaler.series(self.namespace, self.name, there)
        for number, pod in enumerate(self.pods):
            name = f"{self.name}-{pod.pod_template_hash}-{number:05}"
            yield from pod.series(self.namespace, self.name, name, self._target())

    def _target(self) -> Labels:
        """What podmonitor.yaml gives to all of its Pods' series."""
        if not self.part_of:
            return {}
        labels = {
            "namespace": self.namespace,
            "job": f"{self.namespace}/{NAME}",
            "container": "server",
            "endpoint": "http",
            "track": self.track,
            "app_kubernetes_io_component": self.component,
            "app_kubernetes_io_part_of": self.part_of,
        }
        return {name: value for name, value in labels.items() if value}


def selector(name: str, labels: Labels) -> str:
    return f"{name}{{{','.join(f'{label}={json.dumps(value)}' for label, value in labels.items())}}}"


def notation(samples: Samples) -> str:
    """As promtool takes them: what grows evenly in one word; where a series ends, the marker that Prometheus writes."""
    words: list[str] = []
    minute = 0
    while minute < len(samples):
        first = samples[minute]
        if first is None:
            words.append("stale" if minute and samples[minute - 1] is not None else "_")
            minute += 1
            continue
        following = samples[minute + 1] if minute + 1 < len(samples) else None
        step = 0 if following is None else following - first
        times = 0
        while minute + times + 1 < len(samples) and samples[minute + times + 1] == first + step * (times + 1):
            times += 1
        words.append(f"{first:.12g}{step:+.12g}x{times}")
        minute += times + 1
    return " ".join(words)
