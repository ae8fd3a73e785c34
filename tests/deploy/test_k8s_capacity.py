"""Room, images and costs: what holds the place of a replica, what pulls its image, and who pays."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import HARDWARE, JOBS, K8S, Object, Variation, kustomize, name_of, of_kind, pods, server_of

HOLDS_ROOM = ("placeholder", "image-prepull")
NEVER_BELOW = -10  # the Cluster Autoscaler adds no node for less
each_hardware = pytest.mark.parametrize("hardware", HARDWARE)


def built(hardware: str) -> list[Object]:
    return Variation("base", (*HOLDS_ROOM, *([hardware] if hardware else []))).objects()


def the(objects: list[Object], kind: str, name: str = "sentiment-inference") -> Any:
    (found,) = [each for each in of_kind(objects, kind) if name_of(each) == name]
    return found


def placement(pod: Object) -> dict[str, object]:
    """What decides where it may run."""
    affinity = pod.get("affinity") or {}
    required = affinity.get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    return {"selector": pod.get("nodeSelector"), "tolerations": pod.get("tolerations"), "affinity": required}


@each_hardware
def test_a_placeholder_takes_the_room_of_one_server_where_servers_go(hardware: str) -> None:
    objects = built(hardware)
    server = the(objects, "Deployment")
    holder = the(objects, "Deployment", "sentiment-inference-placeholder")["spec"]["template"]["spec"]
    (container,) = holder["containers"]

    assert container["resources"] == server_of(server)["resources"]
    assert placement(holder) == placement(server["spec"]["template"]["spec"])
    assert holder.get("resourceClaims") == server["spec"]["template"]["spec"].get("resourceClaims")


def test_a_placeholder_gives_way_to_every_pod_at_once_and_brings_a_node() -> None:
    holder = the(built(""), "Deployment", "sentiment-inference-placeholder")
    pod = holder["spec"]["template"]["spec"]
    classes = {name_of(each): each for each in yaml.safe_load_all(kustomize(K8S / "priority"))}
    held = classes.pop(pod["priorityClassName"])

    assert NEVER_BELOW <= held["value"] < min(0, *(each["value"] for each in classes.values()))
    assert held["preemptionPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 0
    # Else every rollout of it would take two Pods' room.
    assert holder["spec"]["strategy"] == {"type": "Recreate"}


@each_hardware
def test_the_image_that_servers_run_is_pulled_on_the_nodes_that_may_run_them(hardware: str) -> None:
    objects = built(hardware)
    server = the(objects, "Deployment")
    puller = the(objects, "DaemonSet", "sentiment-inference-prepull")["spec"]["template"]["spec"]
    (pull,) = puller["initContainers"]

    assert pull["image"] == server_of(server)["image"]
    if hardware == "gpu-dra":  # a claim finds the node, but a DaemonSet has none
        server = the(built("gpu"), "Deployment")
    assert placement(puller) == placement(server["spec"]["template"]["spec"])


def test_images_of_an_overlay_reach_what_pulls_them(tmp_path: Path) -> None:
    overlay = {
        "resources": [f"{Path('..') / 'k8s' / 'base'}"],
        "components": ["../k8s/components/image-prepull"],
        "images": [
            {"name": "sentiment-inference", "newName": "registry.example.com/any", "digest": f"sha256:{'a' * 64}"}
        ],
    }
    (tmp_path / "k8s").symlink_to(K8S)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    objects = list(yaml.safe_load_all(kustomize(tmp_path / "mine")))

    (pull,) = the(objects, "DaemonSet", "sentiment-inference-prepull")["spec"]["template"]["spec"]["initContainers"]
    assert pull["image"] == f"registry.example.com/any@sha256:{'a' * 64}"
    assert server_of(the(objects, "Deployment"))["image"] == pull["image"]


@pytest.mark.parametrize("hardware", ["gpu", "gpu-shared"])
def test_a_gpu_pool_may_start_at_zero_wherever_it_is(hardware: str) -> None:
    deployment = the(built(hardware), "Deployment")
    terms = placement(deployment["spec"]["template"]["spec"])["affinity"]["nodeSelectorTerms"]  # type: ignore[index]
    one_label = [term["matchExpressions"] for term in terms]

    # Alternatives: each is one label, and a node needs only one of them.
    assert all(len(expressions) == 1 for expressions in one_label)
    found = {expressions[0]["key"] for expressions in one_label}
    by_discovery = {"nvidia.com/gpu.present", "feature.node.kubernetes.io/pci-10de.present"}
    # Known of a node that does not exist yet.
    by_pool = {"cloud.google.com/gke-accelerator", "kubernetes.azure.com/accelerator"}
    by_karpenter = {f"{owner}/instance-gpu-manufacturer" for owner in ("karpenter.k8s.aws", "eks.amazonaws.com")}
    assert found == by_discovery | by_pool | by_karpenter
    # A node from none, its driver and an image of gigabytes.
    assert deployment["spec"]["progressDeadlineSeconds"] >= 1800


@each_hardware
def test_the_quota_bounds_the_devices_that_pods_ask_for(hardware: str) -> None:
    objects = Variation("base", (*([hardware] if hardware else []), "guardrails")).objects()
    hard = the(objects, "ResourceQuota")["spec"]["hard"]

    limits = server_of(the(objects, "Deployment"))["resources"]["limits"]
    asked = {f"requests.{name}" for name in limits if "/" in name}
    for template in of_kind(objects, "ResourceClaimTemplate"):
        requests = template["spec"]["spec"]["devices"]["requests"]
        asked |= {f"{each['exactly']['deviceClassName']}.deviceclass.resource.k8s.io/devices" for each in requests}
    assert asked <= hard.keys()
    assert bool(asked) == bool(hardware)


def test_no_volume_on_a_node_s_disk_keeps_the_node_from_being_removed() -> None:
    pod = the(Variation("base", ("model-fetch",)).objects(), "Deployment")["spec"]["template"]
    on_disk = {volume["name"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}

    (named,) = [value for key, value in pod["metadata"]["annotations"].items() if key.endswith("-local-volumes")]
    assert set(named.split(",")) == on_disk


PAYS = {"owner", "cost-center", "purpose"}
EVERYTHING = ("placeholder", "image-prepull", "autoscale-keda", "queue", "queue-local", "monitoring", "guardrails")


@pytest.mark.parametrize(
    "variation",
    [
        Variation("base", ("gateway", "canary", *EVERYTHING, "cost-labels"), workers=True),
        *(Variation(f"jobs/{name}", ("cost-labels",)) for name in JOBS),
    ],
    ids=str,
)
def test_who_pays_is_on_every_object_and_every_pod_and_in_no_selector(variation: Variation) -> None:
    objects = variation.objects()

    for each in itertools.chain(objects, pods(objects)):
        assert each["metadata"]["labels"].keys() >= PAYS, each
    for each in of_kind(objects, "Deployment", "DaemonSet"):
        assert not each["spec"]["selector"]["matchLabels"].keys() & PAYS
    for each in of_kind(objects, "Service"):
        assert not each["spec"]["selector"].keys() & PAYS
    for each in of_kind(objects, "NetworkPolicy"):
        assert not each["spec"]["podSelector"]["matchLabels"].keys() & PAYS
