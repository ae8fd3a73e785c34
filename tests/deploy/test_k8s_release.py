"""What is released is said in k8s/release/release.env and nowhere else, and reaches every workload from there.

Images are named by digest in every overlay and every job, with each component, in it and around it.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from app import __version__
from model.release import PREFIXES, images_of, of, read, write
from tests import manifests
from tests.manifests import (
    ARCH,
    ARTIFACTS,
    COMPONENTS,
    FOR_JOBS,
    JOBS,
    K8S,
    OVERLAYS,
    RELEASE,
    RELEASED,
    Object,
    Variation,
    containers_of,
    environment,
    images,
    kustomize,
    name_of,
    of_kind,
    own,
    pods,
)
from tests.process import ROOT

MOUNTED = tuple(filter(None, ARTIFACTS))


def repository(image: str) -> str:
    """An image's name without tag and digest."""
    return image.partition("@")[0].rpartition(":")[0]


def is_served(template: Object) -> bool:
    """Whether these Pods hold the model that is released."""
    return not template["metadata"]["labels"]["app.kubernetes.io/name"].endswith(
        ("gateway", "train", "distributed", "smoke")
    )


def is_on_gpus(template: Object) -> bool:
    return "nvidia.com/gpu" in json.dumps(template["spec"])


def prefix_of(template: Object) -> str:
    """How the lines of release.env begin that these Pods serve."""
    if template["metadata"]["labels"].get("track") == "canary":
        return PREFIXES["canary"]
    return PREFIXES["gpu"] if is_on_gpus(template) and is_served(template) else ""


def test_no_other_file_says_what_is_released() -> None:
    versions = {__version__, *(value for name, value in RELEASED.items() if name.endswith("_VERSION"))}
    said = {form for version in versions for form in (f'"{version}"', f":{version}", f"/{version}")}
    said |= {value for name, value in RELEASED.items() if name.endswith(("_IMAGE", "_DIGEST"))}
    for path in K8S.rglob("*"):
        if path.suffix in {".yaml", ".env"} and path != K8S / RELEASE:
            text = path.read_text()
            assert not [value for value in said if value in text], path


def numbered() -> dict[str, str]:
    """A release in which everybody has something else, and all that YAML might take for numbers."""
    found = {}
    for number, prefix in enumerate(("", *PREFIXES.values()), start=1):
        found |= {
            f"{prefix}SERVER_VERSION": f"{number}.1",
            f"{prefix}SERVER_ARCH": f"arch{number}",
            f"{prefix}MODEL_NAME": f"{number}",
            f"{prefix}MODEL_VERSION": f"{number}.10",
            f"{prefix}MODEL_DIGEST": str(number) * 64,
        }
    del found["CANARY_SERVER_ARCH"]
    for name in images_of(RELEASED):
        found[name] = f"localhost:5000/{repository(RELEASED[name])}:1.0@sha256:{len(name):064}"
    return found


NEW = numbered()


@pytest.fixture(scope="module")
def released_anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(K8S, tmp_path_factory.mktemp("anew") / "k8s")
    write(copy / RELEASE, NEW)
    assert read(copy / RELEASE) == RELEASED | NEW
    return copy


def said_of(template: Object, objects: list[Object]) -> dict[str, str]:
    """What of the release is found in a Pod template and in the environment of its first container."""
    labels, container = template["metadata"]["labels"], template["spec"]["containers"][0]
    settings = environment(container, objects)
    found = {
        "SERVER_VERSION": labels["app.kubernetes.io/version"],
        "SERVER_ARCH": template["spec"]["nodeSelector"][ARCH],
        "MODEL_NAME": labels.get("model-name"),
        "MODEL_VERSION": labels.get("model-version"),
        "MODEL_DIGEST": template["metadata"].get("annotations", {}).get("model-digest"),
    }
    if "model-name" in labels:
        assert settings["APP_MODEL_DIGEST"] == found["MODEL_DIGEST"]
        assert settings.get("MODEL_VERSION", found["MODEL_VERSION"]) == found["MODEL_VERSION"]
    for mount in container.get("volumeMounts", []):
        if "subPath" in mount:
            assert mount["subPath"] == f"{found['MODEL_NAME']}/{found['MODEL_VERSION']}"
    for volume in template["spec"].get("volumes", []):
        if "image" in volume:
            found["MODEL_IMAGE"] = volume["image"]["reference"]
    return {name: value for name, value in found.items() if value is not None}


ORDERS = [order for name in MOUNTED for order in ((name, "gpu"), ("gpu", name))]
ANEW = [
    *(Variation("base", ("gateway", "canary", "queue", *order), workers=True) for order in ORDERS),
    *(Variation("base", ("gateway", "canary", "queue", name), workers=True, renamed=True) for name in MOUNTED),
    *(Variation("overlays/gpu", (name,)) for name in MOUNTED),
    Variation("base", ("gateway", "canary", "gpu-dra", "model-pvc"), renamed=True),
    *(Variation(f"jobs/{name}") for name in JOBS if name != "loadtest"),
    Variation("jobs/batch-gpu", FOR_JOBS, renamed=True),
]


@pytest.mark.parametrize("variation", ANEW, ids=str)
def test_another_release_reaches_every_place_of_the_pods_that_have_it_and_no_other(
    variation: Variation, released_anew: Path
) -> None:
    objects = replace(variation, manifests=released_anew).objects()
    assert own(objects)
    for template in own(objects):
        prefix = prefix_of(template)
        found = said_of(template, objects)
        assert found.pop("SERVER_ARCH") == NEW[(PREFIXES["gpu"] if is_on_gpus(template) else "") + "SERVER_ARCH"]
        assert found == {name: NEW[prefix + name] for name in found}
        assert ("MODEL_DIGEST" in found) == is_served(template)
        assert set(images(template)) <= {*of(prefix, NEW).values(), NEW["FETCH_IMAGE"]}
    for workload in of_kind(objects, "Deployment", "Job", "CronJob", "RayJob"):
        (template, *_), metadata = pods([workload]), workload["metadata"]
        for key in ("app.kubernetes.io/version", "model-name", "model-version"):
            assert metadata["labels"].get(key) == template["metadata"]["labels"].get(key)
        of_pods_alone = "cluster-autoscaler.kubernetes.io/"
        noted = {
            key: value for key, value in template["metadata"].get("annotations", {}).items() if of_pods_alone not in key
        }
        assert metadata.get("annotations", {}) == noted
    # Other names, so that the change rolls the Pods.
    if any(is_served(template) for template in own(objects)):
        maps = {name_of(each) for each in of_kind(objects, "ConfigMap")}
        assert maps - {name_of(each) for each in of_kind(variation.objects(), "ConfigMap")}


@pytest.mark.parametrize("order", [("noted", "gpu"), ("gpu", "noted")], ids="-".join)
def test_gpus_leave_the_annotations_and_node_labels_of_other_components(order: tuple[str, str], tmp_path: Path) -> None:
    copy = shutil.copytree(K8S, tmp_path / "k8s")
    noted = copy / "components" / "noted"
    noted.mkdir()
    notes = {"annotations": {"note": "kept"}}
    template = {"metadata": notes, "spec": {"nodeSelector": {"pool": "kept"}}}
    patch = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": notes | {"name": "any"}}
    patch["spec"] = {"template": template}
    component = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    (noted / "kustomization.yaml").write_text(
        json.dumps({**component, "patches": [{"target": {"kind": "Deployment"}, "patch": json.dumps(patch)}]})
    )
    for hardware in ("gpu", "gpu-shared", "gpu-dra"):
        components = tuple(hardware if name == "gpu" else name for name in order)
        objects = Variation("base", ("gateway", "canary", *components), manifests=copy, workers=True).objects()
        for each in of_kind(objects, "Deployment"):
            template = each["spec"]["template"]
            for metadata in (each["metadata"], template["metadata"]):
                assert metadata["annotations"].keys() == {"note", "model-digest"}
            assert {"pool", ARCH} <= template["spec"]["nodeSelector"].keys()


def test_the_readme_deletes_config_maps_that_no_replica_set_names(tmp_path: Path) -> None:
    """With a kubectl that says what a cluster would."""
    (block,) = re.findall(r"```sh\n(used=.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        """#!/bin/sh
        case "$*" in
            *jsonpath*) printf "set-3 set-2 queue-1 set-3" ;;
            *"get configmaps"*) printf "configmap/%s\\n" set set-1 set-2 set-3 queue-0 queue-1 queue-11 ;;
            *) printf "%s " "$@" ;;
        esac
        """
    )
    kubectl.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", block], env=environ, capture_output=True, text=True, check=True)

    unused = [f"configmap/{name}" for name in ("set", "set-1", "queue-0", "queue-11")]
    assert done.stdout.split() == ["-n", "sentiment-inference", "delete", "--dry-run=server", *unused]


# Each overlay and each job, with each component in it, and with each around it, in a namespace of its own, with every
# image in another registry and by digest.
REGISTRY = "registry.example.com/team"
DIGESTS = {repository(RELEASED[name]): f"sha256:{number:064x}" for number, name in enumerate(images_of(RELEASED))}
PINNED = {f"{REGISTRY}/{name}@{digest}" for name, digest in DIGESTS.items()}
IMAGES = [{"name": name, "newName": f"{REGISTRY}/{name}", "digest": digest} for name, digest in DIGESTS.items()]
# What a component asks for before it; worker-hpa asks for k8s/worker as well.
NEEDS = {**manifests.NEEDS, "worker-hpa": ("queue",)}
# Makes the namespace, which these have already.
NOT_WITH = {"overlays/local": "guardrails", "overlays/local-queue": "guardrails"}
# Only together they have an image of their own.
TOGETHER = {"overlays/cpu": ("gateway", "canary", "model-image-volume")}


@dataclass(frozen=True)
class Try:
    """Components with an overlay or a job: in it, or in a kustomization around it."""

    resource: str
    components: tuple[str, ...]
    around: bool

    def __str__(self) -> str:
        return f"{'+'.join(self.components)} {'around' if self.around else 'in'} {self.resource}"

    @property
    def namespace(self) -> str:
        return re.sub("[ /+]", "-", str(self))

    @property
    def together(self) -> tuple[str, bool]:
        """What is built in one run: no two are in one namespace, and it takes little more than one alone."""
        return self.resource if self.resource.startswith("overlays/") else "jobs", self.around

    def write(self, manifests: Path) -> str:
        """Writes the kustomization; returns the folder's path in `manifests`."""
        folder = f"{self.resource}-{self.namespace}"
        kustomization = {"resources": [f"../{Path(self.resource).name}"]}
        if self.around:
            (manifests / folder).mkdir()
        else:
            # Edited in place, as its users would.
            shutil.copytree(manifests / self.resource, manifests / folder)
            kustomization = yaml.safe_load((manifests / folder / "kustomization.yaml").read_text())
        if {"worker-hpa", "queue"} <= set(self.components):
            kustomization["resources"].append("../../worker")
        # First, as gateway and canary ask.
        listed = [f"../../components/{name}" for name in self.components]
        kustomization["components"] = [*listed, *kustomization.get("components", [])]
        kustomization["images"] = [*IMAGES, *kustomization.get("images", [])]
        kustomization["namespace"] = self.namespace
        (manifests / folder / "kustomization.yaml").write_text(json.dumps(kustomization))
        return folder


def brought(folder: Path) -> set[str]:
    """Names of the components that an overlay has already, and of what it is over."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    listed = [*kustomization.get("components", []), *kustomization.get("resources", [])]
    folders = [(folder / path).resolve() for path in listed if not path.endswith(".yaml")]
    return {each.name for each in folders}.union(*(brought(each) for each in folders))


def tries(resource: str, around: bool) -> list[Try]:
    there = brought(K8S / resource) | {NOT_WITH.get(resource, "")}
    names = COMPONENTS
    if resource.startswith("jobs/"):
        names = [*FOR_JOBS, *(["multi-arch"] if around else [])]
    each = [(*(need for need in NEEDS.get(name, ()) if need not in there), name) for name in names]
    each += [TOGETHER[resource]] if resource in TOGETHER else []
    return [Try(resource, components, around) for components in each if not there & set(components)]


RESOURCES = [*(f"overlays/{name}" for name in OVERLAYS), *(f"jobs/{name}" for name in JOBS)]
TRIES = [each for resource in RESOURCES for around in (False, True) for each in tries(resource, around)]


def build(tried: list[Try]) -> list[Object]:
    """What all of them are, in one run of kustomize."""
    with tempfile.TemporaryDirectory() as folder:
        manifests = Path(shutil.copytree(K8S, Path(folder) / "k8s"))
        # Of which jobs/loadtest takes its files.
        (Path(folder) / "loadtest").symlink_to(ROOT / "loadtest")
        (manifests / "all").mkdir()
        resources = [f"../{each.write(manifests)}" for each in tried]
        (manifests / "all" / "kustomization.yaml").write_text(json.dumps({"resources": resources}))
        return list(yaml.load_all(kustomize(manifests / "all"), yaml.CSafeLoader))


@functools.cache
def built(together: tuple[str, bool]) -> dict[str, list[Object]]:
    """Objects by namespace; none, if one of them does not build."""
    found: dict[str, list[Object]] = {}
    with contextlib.suppress(AssertionError):
        for each in build([tried for tried in TRIES if tried.together == together]):
            namespace = name_of(each) if each["kind"] == "Namespace" else each["metadata"]["namespace"]
            found.setdefault(namespace, []).append(each)
    return found


@pytest.mark.parametrize("tried", TRIES, ids=str)
def test_it_builds_in_one_namespace_with_every_image_by_digest(tried: Try) -> None:
    # Alone, to see which one it is that does not build, and why.
    objects = built(tried.together).get(tried.namespace) or build([tried])
    assert {each["metadata"]["namespace"] for each in objects if each["kind"] != "Namespace"} == {tried.namespace}
    names = {name_of(each) for each in of_kind(objects, "ConfigMap")}
    for template in pods(objects):
        for image in images(template):
            assert image in PINNED or template not in own(objects)
        for container in containers_of(template):
            assert {source["configMapRef"]["name"] for source in container.get("envFrom", [])} <= names


def test_each_image_is_in_one_of_them() -> None:
    builds = [objects for together in {each.together for each in TRIES} for objects in built(together).values()]

    assert {image for objects in builds for template in pods(objects) for image in images(template)} >= PINNED
