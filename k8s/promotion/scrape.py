"""Traffic without a Prometheus: each Pod's /metrics, through the API server, before and after some time."""

import re
import time

from diagnosis.cluster import Object, container_ports, kubectl, name_of

from .traffic import COUNTED, REFERENCE, EvidenceError, Traffic

SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Metric and value of its label: a number.
Samples = dict[tuple[str, str], float]
WANTED = {metric: label for metric, label, _ in COUNTED} | {REFERENCE: "label"}


def _samples(text: str) -> Samples:
    """Of Prometheus' text format, what is counted here, summed over all other labels."""
    found: Samples = {}
    for line in text.splitlines():
        sample = SAMPLE.match(line)
        if sample and (label := WANTED.get(sample[1])):
            labels = dict(LABEL.findall(sample[2]))
            value = re.sub(r"\\(.)", lambda escaped: {"n": "\n"}.get(escaped[1], escaped[1]), labels.get(label, ""))
            key = (sample[1], value)
            found[key] = found.get(key, 0.0) + float(sample[3])
    return found


def _scrape(options: list[str], namespace: str, pod: Object) -> Samples:
    ports = {each.get("name"): each["containerPort"] for each in container_ports([pod])}
    # With components/admin-port they are there alone.
    port = ports.get("admin") or ports.get("http", 8000)
    path = f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}:{port}/proxy/metrics"
    text, said = kubectl([*options, "get", "--raw", path])
    if said:
        raise EvidenceError(
            f"{name_of(pod)}: no metrics through the API server ({said}): a NetworkPolicy may keep it out; give "
            "--prometheus URL"
        )
    return _samples(text)


def _scrape_all(options: list[str], namespace: str, pods: list[Object]) -> dict[str, Samples]:
    """By Pod. One that has left meanwhile takes its counts along; none that answers is an error."""
    found: dict[str, Samples] = {}
    for pod in pods:
        try:
            found[pod["metadata"]["name"]] = _scrape(options, namespace, pod)
        except EvidenceError:
            if pod is pods[-1] and not found:
                raise
    return found


def traffic(options: list[str], namespace: str, tracks: list[list[Object]], seconds: int) -> list[Traffic]:
    """Of each track's Pods, what came within `seconds` from now; 0: all since they started. Raises EvidenceError."""
    pods = [pod for track in tracks for pod in track]
    before: dict[str, Samples] = {}
    if seconds:
        before = _scrape_all(options, namespace, pods)
        time.sleep(seconds)
    after = _scrape_all(options, namespace, pods)
    # Of one that was not read before, nobody knows what is new.
    names = [[pod["metadata"]["name"] for pod in track] for track in tracks]
    return [_counted([name for name in track if name in before or not seconds], before, after) for track in names]


def _counted(pods: list[str], before: dict[str, Samples], after: dict[str, Samples]) -> Traffic:
    found = Traffic()
    for pod in pods:
        for (metric, value), count in after.get(pod, {}).items():
            if metric == REFERENCE:
                found.reference[value] = count
                continue
            earlier = before.get(pod, {}).get((metric, value), 0.0)
            part = next(part for counted, _, part in COUNTED if counted == metric)
            # Less than before: it started anew in between.
            getattr(found, part)[value] += count - earlier if count >= earlier else count
    return found
