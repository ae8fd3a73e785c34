"""What kubectl read from one namespace, and simple questions to it. It judges nothing."""

import json
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]

BUILT_IN = (
    "pods", "deployments.apps", "replicasets.apps", "statefulsets.apps", "daemonsets.apps", "jobs.batch", "services",
    "endpointslices.discovery.k8s.io", "horizontalpodautoscalers.autoscaling", "poddisruptionbudgets.policy",
    "networkpolicies.networking.k8s.io", "persistentvolumeclaims", "resourcequotas", "events",
)  # fmt: skip
ADD_ONS = ("httproutes.gateway.networking.k8s.io", "scaledobjects.keda.sh")


class KubectlError(Exception):
    """kubectl is missing or cannot reach the cluster. One line."""


def one_line(text: object) -> str:
    """What Pods and registries say may hold line breaks and sequences that control a terminal."""
    line = " ".join(str(text).split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def kubectl(arguments: list[str]) -> tuple[str, str]:
    """What it printed and, if it failed, what it said. Raises KubectlError if there is no kubectl or no answer."""
    try:
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603, S607
    except FileNotFoundError:
        raise KubectlError("kubectl is not on PATH: install it, or run this where it is") from None
    except subprocess.TimeoutExpired:
        raise KubectlError("kubectl did not answer within 60 s: is the cluster reachable?") from None
    if done.returncode:
        # Without the client library's own log, which says the same five times.
        said = [line for line in done.stderr.splitlines() if not re.match(r"[EWI]\d{4} ", line)]
        return "", one_line(" ".join(said)) or f"kubectl ended with exit code {done.returncode}"
    return done.stdout, ""


def _items(arguments: list[str]) -> tuple[list[Object], str]:
    """Items and, if it failed, what it said."""
    text, said = kubectl(arguments)
    if said:
        return [], said
    try:
        answer = json.loads(text)
    except ValueError:
        raise KubectlError("kubectl printed no JSON: is the kubectl on PATH the real one?") from None
    return answer.get("items", [answer]), ""


def read(namespace: str, options: list[str]) -> "Cluster":
    """One call for what every cluster has; kind by kind if that fails, so that one forbidden kind costs only itself.
    Raises KubectlError if the namespace does not exist or Pods cannot be read."""
    space, said = _items([*options, "get", "namespace", namespace, "-o", "json"])
    if said and "forbidden" not in said.lower():
        raise KubectlError(said)
    common = [*options, "-n", namespace, "get", "-o", "json"]
    items, said = _items([*common, ",".join(BUILT_IN)])
    unread = {}
    for kind in (*(BUILT_IN if said else ()), *ADD_ONS):
        more, said = _items([*common, kind])
        items += more
        if "forbidden" in said.lower():
            unread[kind] = "forbidden"
        elif "doesn't have a resource type" in said or "could not find the requested resource" in said:
            unread[kind] = "the cluster has no such API"
        elif said:
            unread[kind] = said
        if kind == "pods" and said:
            raise KubectlError(f"Pods cannot be read: {said}")
    return Cluster(namespace, space + items, unread)


class Cluster:
    def __init__(self, namespace: str, items: list[Object], unread: dict[str, str]) -> None:
        self.namespace, self.unread = namespace, unread
        self.now = datetime.now(UTC)
        self._kinds: dict[str, list[Object]] = {}
        for item in items:
            self._kinds.setdefault(item["kind"], []).append(item)
        self._by_uid = {uid: item for item in items if (uid := item["metadata"].get("uid"))}

    def all(self, *kinds: str) -> list[Object]:
        return [item for kind in kinds for item in self._kinds.get(kind, [])]

    def find(self, kind: str, name: str) -> Object | None:
        return next((item for item in self.all(kind) if item["metadata"]["name"] == name), None)

    def owner(self, item: Object) -> Object:
        """The workload that people know: the Deployment of a Pod, not its ReplicaSet."""
        for reference in item["metadata"].get("ownerReferences", []):
            found = self._by_uid.get(reference["uid"])
            if found and found["kind"] in ("ReplicaSet", "Deployment", "StatefulSet", "DaemonSet", "Job"):
                return self.owner(found)
        return item

    def age_seconds(self, time: str | None) -> float:
        """Since a recorded time; no time is long ago."""
        if not time:
            return float("inf")
        return (self.now - datetime.fromisoformat(time)).total_seconds()

    def events(self, item: Object, *reasons: str, within_seconds: float = 3600) -> list[Object]:
        """Of this very object, not of a namesake that is gone; newest first."""
        found = [
            event
            for event in self.all("Event")
            if event["involvedObject"].get("uid") == item["metadata"].get("uid")
            and event.get("reason") in reasons
            and self.age_seconds(event_time(event)) <= within_seconds
        ]
        return sorted(found, key=lambda event: event_time(event) or "", reverse=True)

    def live_pods(self) -> list[Object]:
        return [pod for pod in self.all("Pod") if "deletionTimestamp" not in pod["metadata"]]

    def endpoints(self, service: Object) -> list[Object]:
        """Those that get requests."""
        name = service["metadata"]["name"]
        return [
            endpoint
            for piece in self.all("EndpointSlice")
            if labels(piece).get("kubernetes.io/service-name") == name
            for endpoint in piece.get("endpoints") or []
            if endpoint.get("conditions", {}).get("ready", True)
        ]


def event_time(event: Object) -> str | None:
    series = event.get("series") or {}
    return series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or None


def name_of(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def labels(item: Object) -> dict[str, str]:
    return item["metadata"].get("labels") or {}


def template_labels(item: Object) -> dict[str, str]:
    return item.get("spec", {}).get("template", {}).get("metadata", {}).get("labels") or {}


def conditions(item: Object) -> dict[str, Object]:
    return {each["type"]: each for each in item.get("status", {}).get("conditions") or []}


def selects(selector: Object, its_labels: dict[str, str]) -> bool:
    """A LabelSelector; an empty one selects everything."""
    if any(its_labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(each, its_labels) for each in selector.get("matchExpressions") or [])


def _holds(expression: Object, its_labels: dict[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or []
    return {
        "In": its_labels.get(key) in values,
        "NotIn": its_labels.get(key) not in values,
        "Exists": key in its_labels,
        "DoesNotExist": key not in its_labels,
    }[operator]


def ready(pod: Object) -> bool:
    return bool(conditions(pod).get("Ready", {}).get("status") == "True")


def container_ports(pods: Iterable[Object]) -> list[Object]:
    return [
        port
        for pod in pods
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
        for port in container.get("ports") or []
    ]
