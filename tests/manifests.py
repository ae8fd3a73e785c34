"""Builds the manifests with a real `kubectl kustomize`, in combinations worth applying, and reads the result."""

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.release import read
from tests.process import ROOT

K8S = ROOT / "k8s"
RELEASE = Path("release") / "release.env"
RELEASED = read(K8S / RELEASE)
ARCH = "kubernetes.io/arch"
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
JOBS = sorted(path.name for path in (K8S / "jobs").iterdir())
# Of the candidate's model.
SOURCES = sorted(path.name for path in (K8S / "components" / "canary").glob("from-*"))
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
# From 5.0 on, kustomize has all that the manifests use; kubectl has that since 1.27.
KUSTOMIZE_AT_LEAST = (5, 0)

# Each of these takes the place of the others in its list.
HARDWARE = ("", "gpu", "gpu-shared", "gpu-dra")
AUTOSCALERS = ("", "autoscale-inflight", "autoscale-keda")
ARTIFACTS = ("", "model-pvc", "model-fetch", "model-image-volume")
RELEASED_BY = ("", "canary", "argo-rollouts")
# Listed first: canary asks for it, and what comes after it patches the candidate as well.
FIRST = ("gateway", "canary")
# Listed last: it points what scales at the Rollout.
LAST = ("argo-rollouts",)
# Those that need another.
NEEDS = {"canary": ("gateway",), "argo-rollouts": ("gateway",)}
ADDITIONS = (
    "grpc",
    "queue",
    "queue-local",
    "vpa-recommend",
    "monitoring",
    "guardrails",
    "priority",
    "tracing",
    "tracing-local",
    "api-keys",
    "admin-port",
    "image-policy",
    "multi-arch",
    "cost-labels",
    "model-signature",
)
# What a GPU is for as well is listed before it.
BEFORE_HARDWARE = ("placeholder", "image-prepull")
# Of k8s/worker, which the others do not need, and of the Jobs.
FOR_WORKERS = ("worker-hpa",)
IDENTITIES = ("identity-aws", "identity-azure", "identity-gcp")
FOR_JOBS = ("kueue", *IDENTITIES)

Object = dict[str, Any]


def tool(name: str, package: str) -> str:
    """The tool's path. Without it the test is skipped, or fails where all tools must be."""
    if path := shutil.which(name):
        return path
    missing = f"{name} is not installed: {package}"
    if os.environ.get("REQUIRE_TOOLS"):
        pytest.fail(missing)
    pytest.skip(missing)


@functools.cache
def kubectl() -> str:
    """kubectl's path, if the kustomize in it is new enough."""
    path = tool("kubectl", "needs 1.27 or later, from kubernetes.io or a cloud's command-line tools")
    client = json.loads(subprocess.check_output([path, "version", "--client", "--output", "json"]))
    found = client.get("kustomizeVersion", "v0.0.0")
    major, minor, *_ = found.removeprefix("v").split(".")
    if (int(major), int(minor)) < KUSTOMIZE_AT_LEAST:
        pytest.fail(f"{path} has kustomize {found}; kubectl 1.27 or later is needed")
    return path


@dataclass(frozen=True)
class Variation:
    """What somebody may apply: `resource` (base, an overlay or a job) of these `manifests`, perhaps with workers beside
    it, with `components` listed in it, perhaps with all names changed."""

    resource: str
    components: tuple[str, ...] = ()
    renamed: bool = False
    manifests: Path = K8S
    workers: bool = False

    def __str__(self) -> str:
        beside = ("worker",) if self.workers else ()
        return "+".join((self.resource.removeprefix("overlays/"), *beside, *self.components)) + (
            " renamed" if self.renamed else ""
        )

    def objects(self) -> list[Object]:
        """The objects that would be applied; the caller may change them."""
        return list(json.loads(_build(self)))


@functools.cache
def _build(variation: Variation) -> str:
    """As JSON, which is read anew for every test, and much faster than YAML."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "k8s"
        shutil.copytree(variation.manifests, copy)
        # Of which jobs/loadtest takes its files.
        (Path(folder) / "loadtest").symlink_to(ROOT / "loadtest")
        # Edited in place, as its users would: components of an outer kustomization would miss the overlay's namespace.
        path = copy / variation.resource / "kustomization.yaml"
        if variation.resource == "base":
            path = copy / "overlays" / "new" / "kustomization.yaml"
            path.parent.mkdir()
            path.write_text('{"resources": ["../../base"]}')
        kustomization = yaml.safe_load(path.read_text())
        added = [f"../../components/{name}" for name in variation.components]
        kustomization["components"] = [*added, *kustomization.get("components", [])]
        if variation.workers:
            kustomization["resources"].append("../../worker")
        if variation.renamed:
            kustomization |= {"namePrefix": "team-", "nameSuffix": "-two"}
        path.write_text(json.dumps(kustomization))
        return json.dumps(list(yaml.load_all(kustomize(path.parent), yaml.CSafeLoader)))


def kustomize(folder: Path) -> str:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Deprecated fields are warned about here.
    assert done.stderr == ""
    return done.stdout


def _combinations() -> Iterator[Variation]:
    """Any two that go together, do so in one of these: what two components make of each other, a third leaves alone."""
    for number, hardware in enumerate(HARDWARE):
        for other, artifact in enumerate(ARTIFACTS):
            autoscaler = AUTOSCALERS[(number + other) % len(AUTOSCALERS)]
            released_by = RELEASED_BY[(number - other) % len(RELEASED_BY)]
            # Not by KEDA, in half of them, and in each of the others' pairs once.
            scaled = FOR_WORKERS if (number + other // 2) % 2 == 0 else ()
            names = ("gateway", *BEFORE_HARDWARE, hardware, autoscaler, artifact, *ADDITIONS, *scaled)
            yield Variation("base", in_order(name for name in (*names, released_by) if name), workers=True)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """As their headers ask to be listed; the order of the others does not matter."""
    return tuple(
        sorted(names, key=lambda name: (FIRST.index(name) - len(FIRST) if name in FIRST else 0) + (name in LAST))
    )


SINGLE = [
    Variation("base"),
    *(Variation(f"overlays/{name}") for name in OVERLAYS),
    *(Variation("base", (*NEEDS.get(name, ()), name)) for name in COMPONENTS if name not in (*FOR_WORKERS, *FOR_JOBS)),
    *(Variation("base", ("gateway", "canary", f"canary/{name}")) for name in SOURCES),
]
WITH_WORKERS = [
    Variation("base", ("queue",), workers=True),
    Variation("base", ("queue", "worker-hpa"), workers=True),
    Variation("overlays/local", ("queue", "queue-local", "worker-hpa"), workers=True),
    Variation("overlays/cpu", ("queue", "monitoring", "priority"), workers=True),
    Variation("overlays/gpu", ("queue", "model-pvc"), workers=True),
]
ON_OVERLAYS = [
    Variation("overlays/local", ("model-fetch",)),
    *(Variation("overlays/cpu", ("model-fetch", name)) for name in IDENTITIES),
    Variation("overlays/cpu", ("gateway", "canary", "autoscale-inflight", "monitoring")),
    Variation("overlays/cpu", ("gateway", "canary", "autoscale-keda", "monitoring", "vpa-recommend")),
    Variation("overlays/cpu", ("gateway", "argo-rollouts", "monitoring")),
    Variation("overlays/gpu", ("gateway", "argo-rollouts", "monitoring")),
    Variation("overlays/staging", ("gateway", "canary", "canary/from-image-volume", "monitoring")),
    *(Variation("overlays/cpu", (name, "monitoring")) for name in ARTIFACTS if name),
    *(Variation("overlays/gpu", ("gateway", "canary", name, "monitoring")) for name in ARTIFACTS if name),
]
COMBINED = list(_combinations())
RENAMED = [replace(each, renamed=True) for each in (*SINGLE, *WITH_WORKERS[:2], *COMBINED[-8:])]
VARIATIONS = [*SINGLE, *WITH_WORKERS, *ON_OVERLAYS, *COMBINED, *RENAMED]
# What ends: not beside the service, but in its namespace.
FINITE = [Variation(f"jobs/{name}", components) for name in JOBS for components in ((), (*FOR_JOBS, "model-signature"))]

each_variation = pytest.mark.parametrize("variation", VARIATIONS, ids=str)
each_job = pytest.mark.parametrize("variation", FINITE, ids=str)
each_build = pytest.mark.parametrize("variation", [*VARIATIONS, *FINITE], ids=str)


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def name_of(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def servers(objects: list[Object]) -> list[Object]:
    """Deployments that answer predictions: the stable one, and the canary's."""
    return [
        each for each in of_kind(objects, "Deployment") if "track" in each["spec"]["template"]["metadata"]["labels"]
    ]


def pods(objects: list[Object]) -> list[Object]:
    """Pod templates, whatever makes Pods of them."""
    found: list[Object] = []
    for each in objects:
        spec = each.get("spec", {})
        match each["kind"]:
            case "Deployment" | "DaemonSet" | "Job":
                found.append(spec["template"])
            case "CronJob":
                found.append(spec["jobTemplate"]["spec"]["template"])
            case "RayJob":
                cluster = spec["rayClusterSpec"]
                found += [part["template"] for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
            case "TrainingRuntime":
                jobs = spec["template"]["spec"]["replicatedJobs"]
                found += [job["template"]["spec"]["template"] for job in jobs]
    return found


def containers(deployment: Object) -> list[Object]:
    """Init containers too."""
    return containers_of(deployment["spec"]["template"])


def containers_of(template: Object) -> list[Object]:
    """As `containers`, of a Pod template."""
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def images(template: Object) -> list[str]:
    """Of a Pod template: of its containers, and of its volumes."""
    mounted = [each["image"]["reference"] for each in template["spec"].get("volumes", []) if "image" in each]
    return [*(container["image"] for container in containers_of(template)), *mounted]


def own(objects: list[Object]) -> list[Object]:
    """Pod templates of this project's images, which say its version."""
    return [each for each in pods(objects) if "app.kubernetes.io/version" in each["metadata"]["labels"]]


def server_of(deployment: Object) -> Object:
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert server["name"] == "server"
    return dict(server)


def environment(container: Object, objects: list[Object]) -> dict[str, str]:
    """What the container would see, in the kubelet's order: `envFrom`, then `env`. Without what comes from a Secret."""
    maps = {name_of(each): each["data"] for each in of_kind(objects, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]] if "configMapRef" in source else {}
    return found | {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: cores, bytes or a count."""
    digits = text.rstrip("mkMGKi")
    return float(digits) * SUFFIXES.get(text[len(digits) :], 1)
