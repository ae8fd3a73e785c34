"""k8s/ as others use it, who edit none of its files: kustomizations around an overlay, bases at an address, and one
autoscaler in the place of another.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.manifests import K8S, OVERLAYS, Object, Variation, kustomize, of_kind

AROUND = ("autoscale-inflight", "model-fetch", "monitoring", "vpa-recommend", "priority", "cost-labels")
ROOM = ("placeholder", "image-prepull")
QUERY = 'sum(avg_over_time(inference_requests_in_flight{namespace="%s",track="stable"}[1m]))'


def namespace_of(overlay: str) -> str:
    return str(yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text())["namespace"])


@pytest.fixture
def around(tmp_path: Path) -> Path:
    """An empty folder beside a copy of k8s/."""
    shutil.copytree(K8S, tmp_path / "k8s")
    folder = tmp_path / "mine"
    folder.mkdir()
    return folder


def build(folder: Path, **kustomization: object) -> list[Object]:
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    return list(yaml.safe_load_all(kustomize(folder)))


def named(objects: list[Object]) -> list[tuple[str, str]]:
    """Kinds and names, without the hashes of generated ones."""
    return sorted((each["kind"], each["metadata"]["name"].rpartition("-")[0]) for each in objects)


@pytest.mark.parametrize("overlay", ["local", "cpu", "gpu"])
def test_components_around_an_overlay_are_what_they_are_in_it_and_in_the_same_namespace(
    overlay: str, around: Path
) -> None:
    namespace = namespace_of(overlay)
    built = build(
        around,
        namespace=namespace,
        resources=[f"../k8s/overlays/{overlay}"],
        components=[f"../k8s/components/{name}" for name in AROUND],
    )

    assert {each["metadata"].get("namespace") for each in built if each["kind"] != "Namespace"} == {namespace}
    assert named(built) == named(Variation(f"overlays/{overlay}", AROUND).objects())


@pytest.mark.parametrize("name", ["autoscale-inflight", "autoscale-keda", "guardrails"])
def test_the_local_overlay_stays_one_replica_in_its_own_namespace(name: str) -> None:
    built = Variation("overlays/local", (name,)).objects()

    (deployment,) = of_kind(built, "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert not of_kind(built, "HorizontalPodAutoscaler", "ScaledObject", "PodDisruptionBudget")
    assert [each["metadata"]["name"] for each in of_kind(built, "Namespace")] == ["sentiment-inference-local"]


def test_a_base_at_an_address_is_built_from_there(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(K8S, repository / "k8s")
    git = ["git", "-C", str(repository), "-c", "user.name=any", "-c", "user.email=any@example.com"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "any"], ["tag", "v1"]):
        subprocess.run([*git, *arguments], check=True)
    folder = tmp_path / "mine"
    folder.mkdir()
    at = f"file://{repository}//k8s/%s?ref=v1"

    built = build(
        folder,
        namespace="reviews",
        resources=[at % "overlays/cpu"],
        components=[at % "components/autoscale-inflight", at % "components/model-fetch"],
        images=[{"name": "sentiment-inference", "newName": "registry.example.com/reviews"}],
    )

    (hpa,) = of_kind(built, "HorizontalPodAutoscaler")
    assert (hpa["metadata"]["namespace"], hpa["spec"]["metrics"][0]["type"]) == ("reviews", "Pods")


# --- KEDA in the HPA's place ------------------------------------------------------------------------------------------


def scaled(variation: Variation) -> Object:
    (found,) = of_kind(variation.objects(), "ScaledObject")
    return found


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("overlay", sorted(set(OVERLAYS) - {"local", "local-queue"}))
def test_keda_asks_for_the_load_of_its_own_namespace_within_the_bounds_of_the_hpa(overlay: str, renamed: bool) -> None:
    variation = Variation(f"overlays/{overlay}", ("autoscale-keda",), renamed=renamed)
    found = scaled(variation)
    (trigger, _) = found["spec"]["triggers"]
    (hpa,) = of_kind(Variation(f"overlays/{overlay}", ("autoscale-inflight",)).objects(), "HorizontalPodAutoscaler")
    bounds = hpa["spec"]["minReplicas"], hpa["spec"]["maxReplicas"]

    assert not of_kind(variation.objects(), "HorizontalPodAutoscaler")
    assert trigger["metadata"]["query"] == QUERY % namespace_of(overlay)
    assert (found["spec"]["minReplicaCount"], found["spec"]["maxReplicaCount"]) == bounds
    assert bounds[0] <= found["spec"]["fallback"]["replicas"] <= bounds[1]
    assert trigger["metadata"]["threshold"] == hpa["spec"]["metrics"][0]["pods"]["target"]["averageValue"]


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_keda_around_an_overlay_has_the_bounds_and_the_namespace_of_that(overlay: str, around: Path) -> None:
    namespaces = around.parent / "k8s" / "overlays" / overlay / "keda-namespace.yaml"
    built = build(
        around,
        namespace="reviews",
        resources=[f"../k8s/overlays/{overlay}"],
        components=["../k8s/components/autoscale-keda"],
        replacements=[{"path": shutil.copy(namespaces, around) and namespaces.name}],
    )
    inside = scaled(Variation(f"overlays/{overlay}", ("autoscale-keda",)))
    (found,) = of_kind(built, "ScaledObject")

    assert not of_kind(built, "HorizontalPodAutoscaler")
    assert found["metadata"]["namespace"] == "reviews"
    assert found["spec"]["triggers"][0]["metadata"]["query"] == QUERY % "reviews"
    for bound in ("minReplicaCount", "maxReplicaCount", "fallback"):
        assert found["spec"][bound] == inside["spec"][bound]


def test_room_around_the_gpu_overlay_is_a_gpu_s_with_gpu_once_more_behind_it(around: Path) -> None:
    components = [f"../k8s/components/{name}" for name in (*ROOM, "gpu")]
    built = build(around, namespace="reviews", resources=["../k8s/overlays/gpu"], components=components)
    inside = Variation("overlays/gpu", ROOM).objects()

    for kind in ("Deployment", "DaemonSet"):
        pods = [
            {each["metadata"]["name"]: each["spec"]["template"] for each in of_kind(objects, kind)}
            for objects in (built, inside)
        ]
        assert pods[0] == pods[1]


def test_keda_without_a_namespace_scales_by_nobody_s_load() -> None:
    (trigger, _) = scaled(Variation("base", ("autoscale-keda",)))["spec"]["triggers"]

    # No namespace has capitals. No series is an error, and so the fallback.
    assert trigger["metadata"]["query"] == QUERY % "NAMESPACE"
    assert trigger["metadata"]["ignoreNullValues"] == "false"


@pytest.mark.parametrize("renamed", [False, True])
def test_keda_takes_the_hpa_over_that_is_there(renamed: bool) -> None:
    (hpa,) = of_kind(Variation("base", renamed=renamed).objects(), "HorizontalPodAutoscaler")
    found = scaled(Variation("base", ("autoscale-keda",), renamed=renamed))

    assert found["metadata"]["annotations"]["scaledobject.keda.sh/transfer-hpa-ownership"] == "true"
    assert found["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["name"] == hpa["metadata"]["name"]
    assert found["spec"]["scaleTargetRef"] == hpa["spec"]["scaleTargetRef"]
