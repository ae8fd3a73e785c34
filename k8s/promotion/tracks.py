"""The stable Pods and the candidate's, as the cluster has them: workload, Pods, Service, weight. It judges nothing."""

from dataclasses import dataclass

from diagnosis.cluster import Cluster, Object, name_of, selects, template_labels
from diagnosis.network import backends
from diagnosis.rules import pods_of

from .traffic import EvidenceError

APP = "app.kubernetes.io/name"


@dataclass
class Track:
    name: str
    workload: Object
    pods: list[Object]
    services: list[Object]
    endpoints: int
    # Of the route; None where no route names its Service.
    weight: int | None

    @property
    def wanted(self) -> int:
        return int(self.workload["spec"].get("replicas", 1))

    @property
    def model(self) -> str:
        """Name, version and digest of the model that its Pods are to have."""
        its_labels = template_labels(self.workload)
        annotations = self.workload["spec"]["template"]["metadata"].get("annotations") or {}
        parts = its_labels.get("model-name"), its_labels.get("model-version"), annotations.get("model-digest", "")[:12]
        return " ".join(filter(None, parts))

    @property
    def release(self) -> str:
        """Which model and which image."""
        image = str(self.workload["spec"]["template"]["spec"]["containers"][0].get("image", "")).rsplit("/", 1)[-1]
        return f"{self.model} {image}".strip()


def _track(cluster: Cluster, name: str, workload: Object) -> Track:
    services = [
        service
        for service in cluster.all("Service")
        if service["spec"].get("selector")
        and selects({"matchLabels": service["spec"]["selector"]}, template_labels(workload))
    ]
    endpoints = max((len(cluster.endpoints(service)) for service in services), default=0)
    weights = backends(cluster)
    given = [weights[each["metadata"]["name"]][0] for each in services if each["metadata"]["name"] in weights]
    return Track(name, workload, pods_of(cluster, workload), services, endpoints, max(given, default=None))


def tracks(cluster: Cluster, app: str) -> list[Track]:
    """The stable one, and the candidate if there is one. Raises EvidenceError if they cannot be told."""
    found = []
    for name in ("stable", "canary"):
        workloads = [
            each
            for each in cluster.all("Deployment")
            if template_labels(each).get(APP) == app and template_labels(each).get("track") == name
        ]
        if len(workloads) > 1:
            raise EvidenceError(f"more than one Deployment has track {name}: {', '.join(map(name_of, workloads))}")
        if workloads:
            found.append(_track(cluster, name, workloads[0]))
    if not found or found[0].name != "stable":
        others = {
            template_labels(each).get(APP, "") for each in cluster.all("Deployment") if "track" in template_labels(each)
        }
        hint = f"; --app {' or '.join(sorted(others))}?" if others else ": is it the right namespace?"
        raise EvidenceError(f"no Deployment of {app} with track stable{hint}")
    return found
