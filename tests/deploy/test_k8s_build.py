"""Everything in k8s/ builds with kubectl's kustomize and is valid, strictly, for Kubernetes 1.35, 1.36 and 1.37.

Custom resources: packaged models of their CRDs, else the schemas below, which know the fields used here.
"""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject, TriggerAuthentication
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob

from tests.manifests import (
    ARTIFACTS,
    AUTOSCALERS,
    COMBINED,
    COMPONENTS,
    FOR_JOBS,
    HARDWARE,
    JOBS,
    K8S,
    OVERLAYS,
    Object,
    Variation,
    each_build,
    kustomize,
    pods,
)

VERSIONS = ("1.35", "1.36", "1.37")
LONGEST_OVERLAY_LINES = 20

# Unknown fields show in what comes back: the models leave them out. Fields that are newer than the packaged models:
NEWER = {"ScaledObject": ("spec", "fallback", "behavior")}  # KEDA 2.17
MODELS: dict[str, Any] = {
    "ScaledObject": ScaledObject,
    "TriggerAuthentication": TriggerAuthentication,
    "PodMonitor": PodMonitor,
    "PrometheusRule": PrometheusRule,
    "TrainJob": TrainerV1alpha1TrainJob,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
}


def strict(properties: Object, required: list[str] | None = None) -> Object:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def several(items: Object, least: int = 1) -> Object:
    return {"type": "array", "items": items, "minItems": least}


TEXT: Object = {"type": "string", "minLength": 1}
LABELS = {"type": "object", "additionalProperties": TEXT}
METADATA = strict({"name": TEXT, "namespace": TEXT, "labels": LABELS}, ["name"])
SECONDS: Object = {"type": "integer", "minimum": 1}
# A Pod template is checked as Kubernetes' own: see `check`.
RAY_GROUP: Object = {"rayStartParams": {"type": "object", "additionalProperties": TEXT}, "template": {"type": "object"}}


def route(match: Object, backend: Object) -> Object:
    """The schema of a route of the Gateway API."""
    rule = strict({"matches": several(match), "backendRefs": several(backend)})
    return strict(
        {
            "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict({"parentRefs": several(strict({"name": TEXT, "namespace": TEXT})), "rules": several(rule)}),
        }
    )


PATH = strict(
    {"type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]}, "value": {"type": "string", "pattern": "^/"}}
)
BACKEND: Object = {"name": TEXT, "port": {"type": "integer", "minimum": 1, "maximum": 65535}}
WEIGHT: Object = {"type": "integer", "minimum": 0, "maximum": 1_000_000}
# From the references of gateway.networking.k8s.io/v1, autoscaling.k8s.io/v1 and ray.io/v1: no CRD packaged for Python.
SCHEMAS: dict[str, Object] = {
    "RayJob": strict(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "entrypoint": TEXT,
                    "submissionMode": {"enum": ["K8sJobMode", "HTTPMode"]},
                    "backoffLimit": {"type": "integer", "minimum": 0},
                    "activeDeadlineSeconds": SECONDS,
                    # Else ttlSecondsAfterFinished does nothing, and the Pods stay.
                    "shutdownAfterJobFinishes": {"const": True},
                    "ttlSecondsAfterFinished": SECONDS,
                    "rayClusterSpec": strict(
                        {
                            "headGroupSpec": strict(RAY_GROUP),
                            "workerGroupSpecs": several(
                                strict(
                                    RAY_GROUP
                                    | {"groupName": TEXT}
                                    | {name: {"type": "integer"} for name in ("replicas", "minReplicas", "maxReplicas")}
                                )
                            ),
                        }
                    ),
                }
            ),
        }
    ),
    "HTTPRoute": route(strict({"path": PATH}), strict({**BACKEND, "weight": WEIGHT})),
    "GRPCRoute": route(strict({"method": strict({"service": TEXT})}), strict(BACKEND)),
    "VerticalPodAutoscaler": strict(
        {
            "apiVersion": {"const": "autoscaling.k8s.io/v1"},
            "kind": {},
            "metadata": METADATA,
            "spec": strict(
                {
                    "targetRef": strict({"apiVersion": TEXT, "kind": TEXT, "name": TEXT}),
                    # Only recommends: any other mode restarts Pods.
                    "updatePolicy": strict({"updateMode": {"const": "Off"}}),
                    "resourcePolicy": strict(
                        {
                            "containerPolicies": several(
                                strict(
                                    {
                                        "containerName": TEXT,
                                        "controlledResources": several({"enum": ["cpu", "memory"]}),
                                    }
                                )
                            )
                        }
                    ),
                }
            ),
        }
    ),
}


def without(thing: Object, path: tuple[str, ...]) -> Object:
    copy = json.loads(json.dumps(thing))
    parent = functools.reduce(lambda value, key: value.get(key, {}), path[:-1], copy)
    parent.pop(path[-1], None)
    return dict(copy)


def check_custom(thing: Object) -> None:
    """Raises for a field that the kind does not have, or a value that it does not take."""
    kind = thing["kind"]
    if kind in SCHEMAS:
        jsonschema.Draft202012Validator(SCHEMAS[kind]).validate(thing)
        return
    known = without(thing, NEWER.get(kind, ("",)))
    if hasattr(MODELS[kind], "from_dict"):  # generated by another tool, and reads quantities only so
        assert MODELS[kind].from_dict(known).to_dict() == known
        return
    read = MODELS[kind].model_validate(known)
    assert json.loads(read.model_dump_json(by_alias=True, exclude_unset=True)) == known


@functools.cache
def check(text: str, version: str) -> None:
    """Most variations have most objects in common; each is checked once."""
    thing = json.loads(text)
    if thing["kind"] in MODELS or thing["kind"] in SCHEMAS:
        check_custom(thing)
        for template in pods([thing]):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template}
            assert kubernetes_validate.validate(pod, version, strict=True) == version
    else:
        assert kubernetes_validate.validate(thing, version, strict=True) == version


def canonical(thing: Object) -> str:
    return json.dumps(thing, sort_keys=True)


@each_build
def test_it_builds_and_every_object_is_valid_for_every_supported_version(variation: Variation) -> None:
    objects = variation.objects()

    assert objects
    for thing in objects:
        # Other names are as valid in one version as in another.
        for version in VERSIONS[-1:] if variation.renamed else VERSIONS:
            check(canonical(thing), version)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_field_does_not_pass(version: str) -> None:
    (deployment,) = [each for each in Variation("base").objects() if each["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        check(canonical(deployment), version)


def test_the_priority_classes_build_and_are_valid_for_every_supported_version() -> None:
    for thing in yaml.safe_load_all(kustomize(K8S / "priority")):
        for version in VERSIONS:
            check(canonical(thing), version)


def custom(kind: str) -> Object:
    """One of this kind."""
    builds = (
        Variation("base", ("queue", "canary", "grpc", "autoscale-keda", "vpa-recommend", "monitoring"), workers=True),
        Variation("jobs/batch-ray"),
        Variation("jobs/train-distributed"),
    )
    return next(each for build in builds for each in build.objects() if each["kind"] == kind)


@pytest.mark.parametrize("kind", [*MODELS, *SCHEMAS])
def test_an_unknown_field_does_not_pass_in_a_custom_resource(kind: str) -> None:
    thing = custom(kind)
    check_custom(thing)
    thing["spec"]["targetref"] = {}

    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        check_custom(thing)


@pytest.mark.parametrize("kind", ["RayJob", "TrainingRuntime"])
def test_an_unknown_field_does_not_pass_in_the_pods_of_a_custom_resource(kind: str) -> None:
    thing = custom(kind)
    pods([thing])[-1]["spec"]["containers"][0]["livenessprobe"] = {}

    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check(canonical(thing), VERSIONS[0])


def test_no_two_objects_of_a_variation_have_one_name() -> None:
    names = (
        "canary",
        "gpu-dra",
        "autoscale-inflight",
        "model-fetch",
        "queue",
        "queue-local",
        "monitoring",
        "guardrails",
    )
    everything = Variation("base", names, workers=True)

    names = [(each["kind"], each["metadata"]["name"]) for each in everything.objects()]

    assert len(names) == len(set(names))


def header_of(folder: Path) -> str:
    text = (folder / "kustomization.yaml").read_text()
    return text[: text.index("apiVersion:")]


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_says_when_to_use_it_what_it_needs_and_what_it_costs(name: str) -> None:
    header = header_of(K8S / "components" / name)

    assert header.startswith(f"# {name}: ")
    for heading in ("When: ", "Needs: ", "Costs: "):
        assert f"# {heading}" in header
    assert name.startswith("model-") == ("# Fails: " in header)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_says_how_to_run_it_when_to_take_it_what_it_needs_and_what_it_costs(name: str) -> None:
    header = header_of(K8S / "jobs" / name)

    assert header.startswith(f"# {name}: ")
    # A variant of another says only what differs.
    assert f"kubectl apply -k k8s/jobs/{name} -n " in header or "Run it as ../" in header
    for heading in ("When:", "Needs:", "Costs:"):
        assert f"# {heading}" in header


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_a_short_list(name: str) -> None:
    lines = (K8S / "overlays" / name / "kustomization.yaml").read_text().splitlines()

    assert lines[0].startswith("# ")
    assert len(lines) <= LONGEST_OVERLAY_LINES


def test_any_two_components_that_go_together_are_built_together_in_one_variation() -> None:
    instead = [set(names) for names in (HARDWARE, AUTOSCALERS, ARTIFACTS)]
    beside = [name for name in COMPONENTS if name not in FOR_JOBS]
    pairs = {pair for pair in itertools.combinations(beside, 2) if not any(set(pair) <= names for names in instead)}
    built = {pair for each in COMBINED for pair in itertools.combinations(sorted(each.components), 2)}

    assert pairs - built == set()


def test_there_is_one_object_in_each_file_and_each_file_is_used() -> None:
    for path in K8S.rglob("*.yaml"):
        documents = list(yaml.load_all(path.read_text(), yaml.CSafeLoader))
        assert len(documents) == 1, path
        if path.name != "kustomization.yaml":
            kustomization = (path.parent / "kustomization.yaml").read_text()
            assert re.search(rf"\b{re.escape(path.name)}\b", kustomization), path
