"""The way in, the candidate beside it, staging and progressive delivery: what is applied, and what is left without."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import (
    ARTIFACTS,
    K8S,
    OVERLAYS,
    RELEASED,
    SOURCES,
    Object,
    Variation,
    containers,
    environment,
    kubectl,
    kustomize,
    name_of,
    of_kind,
    server_of,
    tool,
)

CANDIDATE = "sentiment-inference-canary"


def one(objects: list[Object], kind: str, name: str = "sentiment-inference") -> Object:
    (found,) = [each for each in of_kind(objects, kind) if name_of(each) == name]
    return found


def weights(objects: list[Object]) -> dict[str, int]:
    (rule,) = one(objects, "HTTPRoute")["spec"]["rules"]
    return {backend["name"]: backend["weight"] for backend in rule["backendRefs"]}


def test_the_route_is_the_stable_pods_with_the_candidate_and_without_it() -> None:
    without = Variation("overlays/cpu", ("gateway",)).objects()
    beside = Variation("overlays/cpu", ("gateway", "canary")).objects()

    assert weights(without) == {"sentiment-inference": 100}
    assert weights(beside) == {"sentiment-inference": 100, CANDIDATE: 0}
    # Taking the candidate out changes the route and adds nothing: all else is as it was.
    assert [each for each in without if each not in beside] == [one(without, "HTTPRoute")]
    added = [each for each in beside if each not in without]
    assert sorted(each["kind"] for each in added) == ["ConfigMap", "Deployment", "HTTPRoute", "Service"]


@pytest.mark.parametrize("name", ["canary", "argo-rollouts"])
def test_without_the_route_before_it_the_build_ends_and_names_what_is_missing(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(K8S, tmp_path / "k8s") / "overlays" / "cpu"
    for listed in ([name], [name, "gateway"]):
        components = [f"../../components/{each}" for each in listed]
        (folder / "kustomization.yaml").write_text(json.dumps({"resources": ["../../base"], "components": components}))
        done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "HTTPRoute" in done.stderr


def test_only_one_of_canary_and_argo_rollouts_can_divide_the_traffic(tmp_path: Path) -> None:
    folder = shutil.copytree(K8S, tmp_path / "k8s") / "overlays" / "cpu"
    components = [f"../../components/{each}" for each in ("gateway", "canary", "argo-rollouts")]
    (folder / "kustomization.yaml").write_text(json.dumps({"resources": ["../../base"], "components": components}))

    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "already registered id: Service" in done.stderr


def test_the_gateway_takes_routes_of_every_overlay_that_could_have_one_and_its_proxies_get_in() -> None:
    gateway = one(list(yaml.safe_load_all(kustomize(K8S / "gateway"))), "Gateway", "inference")
    (listener,) = gateway["spec"]["listeners"]
    (allowed,) = listener["allowedRoutes"]["namespaces"]["selector"]["matchExpressions"]
    objects = Variation("overlays/cpu", ("gateway",)).objects()
    route = one(objects, "HTTPRoute")["spec"]
    namespaces = {
        yaml.safe_load((K8S / "overlays" / name / "kustomization.yaml").read_text())["namespace"] for name in OVERLAYS
    }

    # A laptop's needs no way in.
    assert set(allowed["values"]) == namespaces - {"sentiment-inference-local"}
    assert listener["protocol"] == "HTTPS"
    assert route["parentRefs"] == [
        {"name": "inference", "namespace": gateway["metadata"]["namespace"], "sectionName": listener["name"]}
    ]
    assert all(host.endswith(listener["hostname"].removeprefix("*")) for host in route["hostnames"])
    policy = one(objects, "NetworkPolicy", "sentiment-inference-gateway-proxies")["spec"]
    (peer,) = policy["ingress"][0]["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": gateway["metadata"]["namespace"]}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_a_candidate_says_when_to_use_it_what_it_needs_and_what_it_costs(name: str) -> None:
    header = (K8S / "components" / "canary" / name / "kustomization.yaml").read_text()

    assert header.startswith(f"# canary/{name}: ")
    for heading in ("When: ", "Needs: ", "Costs: "):
        assert f"# {heading}" in header


def source_of(deployment: Object) -> tuple[Any, ...]:
    """Init containers without their environment, volumes, and what the server has of them."""
    pod = deployment["spec"]["template"]["spec"]
    fetching = [{key: each[key] for key in each if key != "envFrom"} for each in pod.get("initContainers") or []]
    return fetching, pod.get("volumes") or [], server_of(deployment).get("volumeMounts") or []


@pytest.mark.parametrize("stable", ARTIFACTS)
@pytest.mark.parametrize("name", SOURCES)
def test_the_candidate_s_model_comes_from_where_it_is_told_and_the_stable_pods_from_where_they_were(
    name: str, stable: str
) -> None:
    own = (stable,) if stable else ()
    objects = Variation("base", ("gateway", "canary", *own, f"canary/{name}")).objects()
    candidate = one(objects, "Deployment", CANDIDATE)

    assert one(objects, "Deployment") == one(Variation("base", own).objects(), "Deployment")
    fetching, volumes, mounts = source_of(candidate)
    match name:
        case "from-image":
            assert (fetching, volumes, mounts) == ([], [], [])
        case "from-image-volume":
            assert volumes[0]["image"]["reference"] == RELEASED["CANARY_MODEL_IMAGE"]
        case "from-claim":
            assert volumes[0]["persistentVolumeClaim"]["claimName"] == "sentiment-model"
            assert mounts[0]["subPath"] == f"{RELEASED['CANARY_MODEL_NAME']}/{RELEASED['CANARY_MODEL_VERSION']}"
        case "from-bucket":
            fetched = one(Variation("base", ("model-fetch",)).objects(), "Deployment")
            assert (fetching, volumes, mounts) == source_of(fetched)
            known = environment(containers(candidate)[0], objects)
            assert (known["MODEL_NAME"], known["MODEL_URL"]) == (RELEASED["CANARY_MODEL_NAME"], "s3://models")
    assert all(mount["readOnly"] for mount in mounts)


def test_a_candidate_s_model_image_can_be_named_by_digest(tmp_path: Path) -> None:
    folder = shutil.copytree(K8S, tmp_path / "k8s") / "overlays" / "around"
    folder.mkdir()
    listed = {
        "resources": ["../cpu"],
        "components": [f"../../components/{each}" for each in ("gateway", "canary", "canary/from-image-volume")],
        "images": [
            {"name": "sentiment-inference-candidate-model", "newName": "example.com/m", "digest": f"sha256:{'1' * 64}"}
        ],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(listed))

    candidate = one(list(yaml.safe_load_all(kustomize(folder))), "Deployment", CANDIDATE)

    (volume,) = candidate["spec"]["template"]["spec"]["volumes"]
    assert volume["image"]["reference"] == f"example.com/m@sha256:{'1' * 64}"


def test_staging_is_what_the_cpu_overlay_is_in_a_namespace_of_its_own_with_one_replica() -> None:
    staging, production = Variation("overlays/staging").objects(), Variation("overlays/cpu").objects()
    for objects in (staging, production):
        scaler = one(objects, "HorizontalPodAutoscaler")["spec"]
        scaler["minReplicas"] = min(scaler["minReplicas"], scaler.pop("maxReplicas"))

    assert one(staging, "HorizontalPodAutoscaler")["spec"].pop("minReplicas") == 1
    one(production, "HorizontalPodAutoscaler")["spec"].pop("minReplicas")
    assert (
        json.loads(json.dumps(staging).replace('"sentiment-inference-staging"', '"sentiment-inference"')) == production
    )


def test_two_overlays_behind_one_gateway_differ_by_host_name() -> None:
    hosts = [
        one(Variation(f"overlays/{name}", ("gateway",)).objects(), "HTTPRoute")["spec"]["hostnames"]
        for name in ("cpu", "staging")
    ]
    assert hosts[0] != hosts[1]


def test_the_gate_of_staging_is_the_load_test_in_its_namespace() -> None:
    objects = list(yaml.safe_load_all(kustomize(K8S / "overlays" / "staging" / "gate")))

    assert {each["metadata"]["namespace"] for each in objects} == {"sentiment-inference-staging"}
    assert len(of_kind(objects, "Job")) == 2


def test_the_namespace_of_the_rollout_s_route_is_the_overlay_s() -> None:
    for overlay, namespace in (("cpu", "sentiment-inference"), ("gpu", "sentiment-inference-gpu")):
        rollout = one(Variation(f"overlays/{overlay}", ("gateway", "argo-rollouts")).objects(), "Rollout")
        (plugin,) = rollout["spec"]["strategy"]["canary"]["trafficRouting"]["plugins"].values()
        assert plugin == {"httpRoute": "sentiment-inference", "namespace": namespace}


@pytest.mark.parametrize("scaler", ["", "autoscale-inflight", "autoscale-keda", "vpa-recommend"])
def test_what_scales_the_deployment_scales_the_rollout_and_every_reference_follows_the_names(scaler: str) -> None:
    names = tuple(name for name in ("gateway", scaler, "argo-rollouts") if name)
    objects = Variation("base", names, renamed=True).objects()
    names_of = {
        kind: {name_of(each) for each in of_kind(objects, kind)} for kind in ("Service", "Deployment", "Rollout")
    }
    (rollout,) = of_kind(objects, "Rollout")
    canary = rollout["spec"]["strategy"]["canary"]
    (template,) = of_kind(objects, "AnalysisTemplate")

    assert {canary["stableService"], canary["canaryService"]} == names_of["Service"]
    assert rollout["spec"]["workloadRef"]["name"] in names_of["Deployment"]
    (plugin,) = canary["trafficRouting"]["plugins"].values()
    assert plugin["httpRoute"] == name_of(of_kind(objects, "HTTPRoute")[0])
    steps = [step["analysis"] for step in canary["steps"] if "analysis" in step]
    assert {each["templateName"] for step in steps for each in step["templates"]} == {name_of(template)}
    for step in steps:
        assert {each["name"] for each in step["args"]} == {each["name"] for each in template["spec"]["args"]}
    for each in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject", "VerticalPodAutoscaler"):
        target = each["spec"].get("scaleTargetRef") or each["spec"]["targetRef"]
        assert (target["kind"], target["name"]) == ("Rollout", name_of(rollout))


def analysis() -> dict[str, str]:
    """The queries as Argo Rollouts would ask them of Pods with the hash abc."""
    metrics = one(Variation("base", ("gateway", "argo-rollouts")).objects(), "AnalysisTemplate")["spec"]["metrics"]
    values = {"namespace": "ns", "candidate": "abc"}
    return {
        each["name"]: re.sub(r"{{args.(\w+)}}", lambda arg: values[arg[1]], each["provider"]["prometheus"]["query"])
        for each in metrics
    }


POD = 'namespace="ns",pod="sentiment-inference-abc-1"'
STABLE = 'namespace="ns",pod="sentiment-inference-old-1"'


def counted(of: str, code: str, per_minute: int) -> Object:
    return {"series": f'inference_requests_total{{{of},code="{code}"}}', "values": f"0+{per_minute}x10"}


def timed(le: str, per_minute: int) -> Object:
    return {"series": f'inference_request_duration_seconds_bucket{{{POD},le="{le}"}}', "values": f"0+{per_minute}x10"}


def predicted(label: str, per_minute: int, ratio: float) -> list[Object]:
    return [
        {"series": f'inference_predictions_total{{{POD},label="{label}"}}', "values": f"0+{per_minute}x10"},
        {"series": f'model_reference_prediction_ratio{{{POD},label="{label}"}}', "values": f"{ratio}x10"},
    ]


ANALYSED = {
    "the stable Pods' requests do not count": (
        "requests",
        [counted(POD, "200", 100), counted(STABLE, "200", 900)],
        500,
    ),
    "one error in ten is no finding": ("errors", [counted(POD, "200", 2), counted(POD, "500", 0.2)], (1 - 2.33) / 11),
    "half of all is one": (
        "errors",
        [counted(POD, "200", 100), counted(POD, "504", 100)],
        (500 - 2.33 * 500**0.5) / 1000,
    ),
    "refused is not an error": ("errors", [counted(POD, "503", 100), counted(POD, "500", 0)], 0),
    "refused for want of capacity": (
        "refused",
        [
            counted(POD, "503", 100),
            {"series": f'inference_rejected_total{{{POD},reason="late"}}', "values": "0+100x10"},
            {"series": f'inference_rejected_total{{{POD},reason="invalid"}}', "values": "0+900x10"},
        ],
        (500 - 2.33 * 500**0.5) / 500,
    ),
    "a quarter is slow": (
        "slow",
        [
            timed("0.25", 75),
            timed("+Inf", 100),
            {"series": f"inference_request_duration_seconds_count{{{POD}}}", "values": "0+100x10"},
        ],
        (125 - 2.33 * 125**0.5) / 500,
    ),
    "as the reference": ("predictions", [*predicted("a", 80, 0.8), *predicted("b", 20, 0.2)], 0),
    "the other way round": (
        "predictions",
        [*predicted("a", 20, 0.8), *predicted("b", 80, 0.2)],
        2 * 0.6 * 1.3862943611198906,
    ),
    "too few predictions": ("predictions", [*predicted("a", 1, 0.8), *predicted("b", 4, 0.2)], None),
    "no reference": ("predictions", predicted("a", 100, 0.8)[:1], None),
}


@pytest.mark.parametrize("case", ANALYSED)
def test_the_analysis_asks_what_it_says(case: str, tmp_path: Path) -> None:
    metric, series, expected = ANALYSED[case]
    expression, samples = analysis()[metric], []
    if expected is not None:
        expression, samples = f"abs(({expression}) - {expected}) < bool 0.001", [{"labels": "{}", "value": 1}]
    asked = {"expr": expression, "eval_time": "10m", "exp_samples": samples}
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}
    (tmp_path / "test.yaml").write_text(json.dumps({"tests": [test]}))
    promtool = tool("promtool", "apt-get install prometheus")
    done = subprocess.run([promtool, "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
