"""What the manifests promise, checked on what would be applied: in every combination, and with all names changed."""

import math
import re
from collections.abc import Iterable
from typing import Any

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings

from app.artifact.signature import read_public_keys
from app.errors import ConfigError
from app.settings import PREFIX, Settings
from tests.manifests import (
    ARCH,
    JOBS,
    K8S,
    NEEDS,
    RELEASED,
    RELEASED_BY,
    Object,
    Variation,
    containers,
    containers_of,
    each_build,
    each_variation,
    environment,
    images,
    name_of,
    of_kind,
    own,
    pods,
    quantity,
    server_of,
    servers,
)

CLUSTER_SCOPED = {"Namespace"}
# uvicorn waits 1 s for connections to close, and its loop looks every 0.1 s.
SHUTDOWN_SECONDS = 2
# Until kube-proxy and ingress controllers on a busy cluster have taken a Pod off their lists.
ENDPOINT_SECONDS = 10
# A worker waits for its last read, gives back, and closes.
GIVE_BACK_SECONDS = 5
APP = "app.kubernetes.io/name"
NAMES = {f"sentiment-inference{part}" for part in ("", "-gateway", "-valkey", "-collector")}
# What answers nobody.
IDLE = {"sentiment-inference-placeholder", "sentiment-inference-prepull"}


def pod_metadata(deployment: Object) -> Object:
    return dict(deployment["spec"]["template"]["metadata"])


def pod_labels(deployment: Object) -> dict[str, str]:
    return dict(pod_metadata(deployment)["labels"])


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def selected(selector: dict[str, str], objects: list[Object]) -> list[str]:
    """Names of the Deployments whose Pods the selector finds."""
    return [
        name_of(each) for each in of_kind(objects, "Deployment", "DaemonSet") if matches(selector, pod_labels(each))
    ]


def ports(deployment: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in containers(deployment) for port in each.get("ports", [])}


def is_stable(deployment: Object) -> bool:
    return pod_labels(deployment).get("track") == "stable"


def is_worker(deployment: Object) -> bool:
    return pod_labels(deployment).get("app.kubernetes.io/component") == "worker"


def is_idle(deployment: Object) -> bool:
    return pod_labels(deployment)[APP] in IDLE


def with_model(objects: list[Object]) -> list[Object]:
    """Deployments whose Pods hold a model: servers and workers."""
    return [each for each in of_kind(objects, "Deployment") if pod_labels(each)[APP] == "sentiment-inference"]


def of_this_image(objects: list[Object]) -> list[Object]:
    """Deployments of the server's image, the gateway's among them."""
    deployments = of_kind(objects, "Deployment")
    return [each for each in deployments if each["spec"]["template"]["spec"]["containers"][0]["name"] == "server"]


@each_variation
def test_every_selector_finds_the_pods_it_means(variation: Variation) -> None:
    objects = variation.objects()
    deployments = of_kind(objects, "Deployment")
    assert len([each for each in deployments if is_stable(each)]) == 1

    for deployment in deployments:
        # Of its own Pods and no other Deployment's, or the two would fight over them.
        assert selected(deployment["spec"]["selector"]["matchLabels"], objects) == [name_of(deployment)]
        for constraint in deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert selected(constraint["labelSelector"]["matchLabels"], objects) == [name_of(deployment)]
    # Nobody sends anything to a worker.
    services = [selected(each["spec"]["selector"], objects) for each in of_kind(objects, "Service")]
    # Argo Rollouts divides the Pods of one Deployment between two of them.
    assert len(services) - len({tuple(each) for each in services}) == len(of_kind(objects, "Rollout"))
    assert {tuple(each) for each in services} == {
        (name_of(each),) for each in deployments if not (is_worker(each) or is_idle(each))
    }
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]["matchLabels"], objects) == [name_of(budget)]
    for policy in of_kind(objects, "NetworkPolicy"):
        assert selected(policy["spec"]["podSelector"]["matchLabels"], objects)
    for monitor in of_kind(objects, "PodMonitor"):
        scraped = selected(monitor["spec"]["selector"]["matchLabels"], objects)
        assert {name_of(each) for each in of_this_image(objects)} <= set(scraped)


@each_build
def test_every_pod_is_under_a_policy_that_denies_by_default(variation: Variation) -> None:
    objects = variation.objects()
    denying = [
        policy["spec"]["podSelector"]["matchLabels"]
        for policy in of_kind(objects, "NetworkPolicy")
        if policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    ]
    for template in pods(objects):
        assert any(matches(selector, template["metadata"]["labels"]) for selector in denying)


def names_of(objects: list[Object]) -> dict[str, set[str]]:
    """Names by kind, and what is not made here: ../README.md says who makes it."""
    names: dict[str, set[str]] = {
        "Secret": {"sentiment-inference-queue", "sentiment-inference-api-keys"},
        "PersistentVolumeClaim": {"sentiment-model"},
    }
    if any(each["kind"] == "Secret" for each in objects):
        names["Secret"] = set()
    for each in objects:
        names.setdefault(each["kind"], set()).add(name_of(each))
    return names


@each_build
def test_every_name_that_a_pod_refers_to_exists(variation: Variation) -> None:
    objects = variation.objects()
    names = names_of(objects)
    for template in pods(objects):
        pod = template["spec"]
        assert pod["serviceAccountName"] in names["ServiceAccount"]
        for volume in pod.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"] or volume["configMap"].get("optional")
        for container in containers_of(template):
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in names["ConfigMap"]
            for variable in container.get("env", []):
                for kind, source in variable.get("valueFrom", {}).items():
                    known = names[{"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap"}[kind]]
                    assert source["name"] in known or source.get("optional")
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
        used = {claim["name"] for each in pod["containers"] for claim in each["resources"].get("claims", [])}
        assert used == {claim["name"] for claim in pod.get("resourceClaims", [])}
        for claim in pod.get("resourceClaims", []):
            assert claim["resourceClaimTemplateName"] in names["ResourceClaimTemplate"]


@each_variation
def test_every_other_name_that_is_referred_to_exists(variation: Variation) -> None:
    objects = variation.objects()
    names = names_of(objects)
    (stable,) = [name_of(each) for each in of_kind(objects, "Deployment") if is_stable(each)]

    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == name_of(scaler)
        assert name_of(scaler) in names["Deployment"]
        for trigger in scaler["spec"].get("triggers", []):
            if "authenticationRef" in trigger:
                assert trigger["authenticationRef"]["name"] in names["TriggerAuthentication"]
    for authentication in of_kind(objects, "TriggerAuthentication"):
        assert {each["name"] for each in authentication["spec"]["secretTargetRef"]} <= names["Secret"]
    for adviser in of_kind(objects, "VerticalPodAutoscaler"):
        assert adviser["spec"]["targetRef"]["name"] == stable
        for policy in adviser["spec"]["resourcePolicy"]["containerPolicies"]:
            assert policy["containerName"] == "server"
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            expected = 1 + any(name in variation.components for name in RELEASED_BY if name)
            assert len({backend["name"] for backend in rule["backendRefs"]} & names["Service"]) == expected
            assert rule["backendRefs"][0]["name"] == stable


@each_variation
def test_every_port_is_the_one_the_server_listens_on(variation: Variation) -> None:
    objects = variation.objects()
    for deployment in of_this_image(objects):
        server = server_of(deployment)
        has_grpc = "grpc" in variation.components and deployment in servers(objects)
        has_admin = "admin-port" in variation.components and not is_worker(deployment)
        assert ports(deployment) == {
            "http": 8000,
            **({"grpc": 8001} if has_grpc else {}),
            **({"admin": 9000} if has_admin else {}),
        }
        assert environment(server, objects).get("APP_ADMIN_PORT") == ("9000" if has_admin else None)
        assert environment(server, objects).get("APP_GRPC_PORT") == ("8001" if has_grpc else None)
        assert environment(server, objects)["APP_PORT"] == "8000"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server[probe]["httpGet"]["port"] == "http"
    listening = {name_of(each): ports(each) for each in of_kind(objects, "Deployment", "DaemonSet")}
    # Of no Service: only monitoring reaches it, and it reaches nothing else of the servers then.
    public = {name: {key: port for key, port in found.items() if key != "admin"} for name, found in listening.items()}
    for service in of_kind(objects, "Service"):
        (behind,) = selected(service["spec"]["selector"], objects)
        offered = {port["targetPort"]: port["port"] for port in service["spec"]["ports"]}
        # The Services between which Argo Rollouts divides requests are HTTP's.
        assert offered == public[behind] if name_of(service).endswith(behind) else offered == {"http": 8000}
    for policy in of_kind(objects, "NetworkPolicy"):
        # Servers and workers are under one.
        behind = selected(policy["spec"]["podSelector"]["matchLabels"], objects)
        open_ports = sorted({port for each in behind for port in public[each].values()})
        for rule in policy["spec"].get("ingress", []) if behind else []:
            assert [port["port"] for port in rule["ports"]] in (open_ports, [9000])
    for monitor in of_kind(objects, "PodMonitor"):
        asked = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
        assert asked == (["http", "admin"] if "admin-port" in variation.components else ["http"])
    for route in of_kind(objects, "HTTPRoute"):
        assert {backend["port"] for rule in route["spec"]["rules"] for backend in rule["backendRefs"]} == {8000}
    for route in of_kind(objects, "GRPCRoute"):
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        (service,) = [each for each in of_kind(objects, "Service") if name_of(each) == backend["name"]]
        assert {port["port"]: port.get("appProtocol") for port in service["spec"]["ports"]} == {
            8000: "http",
            backend["port"]: "kubernetes.io/h2c",
        }


@each_build
def test_every_pod_meets_the_restricted_standard(variation: Variation) -> None:
    for template in pods(variation.objects()):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        # The group of a volume's files is its own matter.
        given = {key: value for key, value in pod["securityContext"].items() if not key.startswith("fsGroup")}
        assert given == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & pod.keys()
        for volume in pod.get("volumes", []):
            assert volume.keys() - {"name"} <= {"configMap", "emptyDir", "persistentVolumeClaim", "image", "secret"}
        for container in containers_of(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container.get("ports", []))


@each_build
def test_every_container_says_what_it_needs_and_why_it_ended(variation: Variation) -> None:
    for template in pods(variation.objects()):
        for container in containers_of(template):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            for resource in ("cpu", "memory"):
                assert 0 < quantity(requests[resource]) <= quantity(limits[resource])
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@each_variation
def test_the_server_has_three_probes(variation: Variation) -> None:
    objects = variation.objects()
    for deployment in of_this_image(objects):
        server = server_of(deployment)
        # One runner for each whole core of the limit: a fraction would be idle.
        assert quantity(server["resources"]["limits"]["cpu"]) == int(quantity(server["resources"]["limits"]["cpu"]))
        paths = {probe: server[probe]["httpGet"]["path"] for probe in server if probe.endswith("Probe")}
        # Where /ready waits for the queue, no restart would mend that.
        start = "/ready" if deployment in servers(objects) else "/live"
        assert paths == {"startupProbe": start, "readinessProbe": "/ready", "livenessProbe": "/live"}
        # A gate that fails ends the process; one that is slow must not be ended by the probe, nor by the rollout.
        startup = server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"]
        assert 120 <= startup <= deployment["spec"]["progressDeadlineSeconds"]


@each_build
def test_every_image_is_the_released_one(variation: Variation) -> None:
    objects = variation.objects()
    for template in pods(objects):
        for image in images(template):
            # Others' are of a version, and of none that moves.
            assert image in RELEASED.values() if template in own(objects) else re.search(r"[^/]:\d[^/]*$", image)


@each_build
def test_pods_go_only_to_nodes_that_their_image_is_built_for(variation: Variation) -> None:
    anywhere = "multi-arch" in variation.components or "local" in variation.resource
    for template in own(variation.objects()):
        assert (template["spec"].get("nodeSelector", {}).get(ARCH) is None) == anywhere


@each_build
def test_config_maps_cannot_be_changed_but_for_the_dashboard_which_keeps_its_name(variation: Variation) -> None:
    for each in of_kind(variation.objects(), "ConfigMap"):
        hashed = re.search("-[bcdfghkmt2456789]{10}$", name_of(each)) is not None
        assert each.get("immutable", False) == hashed == ("grafana_dashboard" not in each["metadata"].get("labels", {}))


def fields(names: Iterable[str]) -> set[str]:
    """The settings that these environment variables are for, whether they exist or not."""
    return {name.removeprefix(PREFIX).lower() for name in names if name.startswith(PREFIX)}


def credentials(settings: type[BaseSettings]) -> set[str]:
    """Settings that say of themselves that they do not belong in a ConfigMap."""
    extra = {name: field.json_schema_extra for name, field in settings.model_fields.items()}
    return {name for name, value in extra.items() if isinstance(value, dict) and value.get("configmap") is False}


def readable(objects: list[Object]) -> set[str]:
    """Settings with a value that anybody may read who may read manifests: in a ConfigMap or in a Pod itself."""
    found = {name for each in of_kind(objects, "ConfigMap") for name in each.get("data", {})}
    for template in pods(objects):
        for container in containers_of(template):
            found |= environment(container, objects).keys()
    return fields(found)


@each_build
def test_every_setting_exists_and_is_valid_and_none_is_a_credential(variation: Variation) -> None:
    objects = variation.objects()
    assert not readable(objects) & credentials(Settings)
    for template in pods(objects):
        for container in containers_of(template):
            assert fields(each["name"] for each in container.get("env", [])) <= Settings.model_fields.keys()
            given = {name: value for name, value in environment(container, objects).items() if name.startswith(PREFIX)}
            assert fields(given) <= Settings.model_fields.keys()
            # Arguments go before this process's own environment.
            settings = Settings(**{name.removeprefix(PREFIX).lower(): value for name, value in given.items()})
            assert str(settings.model_dir) == ("/models/current" if "APP_MODEL_DIR" in given else "model/sentiment")


@pytest.mark.parametrize("place", ["ConfigMap", "Pod", "Secret"])
def test_a_credential_is_found_wherever_it_is_written_out(place: str) -> None:
    class WithCredential(BaseSettings):
        port: int = Field(8000, json_schema_extra={"unit": "none"})
        queue_password: str = Field("", json_schema_extra={"configmap": False})

    objects = Variation("base").objects()
    if place == "ConfigMap":
        of_kind(objects, "ConfigMap")[0]["data"]["APP_QUEUE_PASSWORD"] = "x"
    else:
        secret = {"valueFrom": {"secretKeyRef": {"name": "queue", "key": "password"}}}
        (server,) = containers(of_kind(objects, "Deployment")[0])
        server["env"] = [{"name": "APP_QUEUE_PASSWORD"} | (secret if place == "Secret" else {"value": "x"})]

    assert credentials(WithCredential) == {"queue_password"}
    assert readable(objects) & credentials(WithCredential) == (set() if place == "Secret" else {"queue_password"})


@each_variation
def test_a_pod_has_the_time_to_leave_without_losing_a_request(variation: Variation) -> None:
    objects = variation.objects()
    for deployment in of_this_image(objects):
        server = server_of(deployment)
        settings = environment(server, objects)
        drain = float(settings["APP_DRAIN_DELAY_SECONDS"]) + float(settings["APP_DRAIN_TIMEOUT_SECONDS"])
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        if is_worker(deployment):
            # No endpoint leads to it, so it need not wait for any to be taken off.
            assert float(settings["APP_DRAIN_DELAY_SECONDS"]) == 0
            assert grace > drain + GIVE_BACK_SECONDS
            continue
        sleep = server["lifecycle"]["preStop"]["sleep"]["seconds"]
        timeout = float(settings["APP_REQUEST_TIMEOUT_MS"]) / 1000
        assert sleep >= ENDPOINT_SECONDS
        assert drain > timeout
        if "APP_GRPC_PORT" in settings:  # its clients have connected elsewhere by then; gRPC varies the age by a tenth
            age = 1.1 * float(settings["APP_GRPC_MAX_CONNECTION_AGE_SECONDS"])
            assert age < sleep + float(settings["APP_DRAIN_DELAY_SECONDS"])
        assert grace > sleep + drain + SHUTDOWN_SECONDS


@each_variation
def test_replicas_have_one_owner(variation: Variation) -> None:
    objects = variation.objects()
    scalers = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    owned = [scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers]
    assert len(owned) == len(set(owned))
    for deployment in of_kind(objects, "Deployment"):
        assert (name_of(deployment) in owned) != ("replicas" in deployment["spec"])


def bounds(scaler: Object) -> tuple[int, int]:
    spec = scaler["spec"]
    if scaler["kind"] == "ScaledObject":
        return spec["minReplicaCount"], spec["maxReplicaCount"]
    return spec["minReplicas"], spec["maxReplicas"]


def most_pods(deployment: Object, objects: list[Object]) -> int:
    """Replicas at their most, and the surge of a rollout."""
    replicas = deployment["spec"].get("replicas", 0)
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        if scaler["spec"]["scaleTargetRef"]["name"] == name_of(deployment):
            replicas = bounds(scaler)[1]
    return int(replicas + deployment["spec"]["strategy"].get("rollingUpdate", {"maxSurge": 0})["maxSurge"])


def asked(deployment: Object, part: str, resource: str) -> float:
    """What one Pod counts for in a quota: the largest init container, or the sum of the containers if that is more."""
    spec = deployment["spec"]["template"]["spec"]
    each = [quantity(c["resources"][part].get(resource, "0")) for c in spec["containers"]]
    before = [quantity(c["resources"][part].get(resource, "0")) for c in spec.get("initContainers", [])]
    return max(sum(each), *before, 0)


@each_variation
def test_the_quota_admits_all_replicas_and_the_surge(variation: Variation) -> None:
    objects = variation.objects()
    for quota in of_kind(objects, "ResourceQuota"):
        hard = quota["spec"]["hard"]
        pods = {name_of(each): most_pods(each, objects) for each in of_kind(objects, "Deployment")}
        assert sum(pods.values()) <= int(hard["pods"])
        devices = ("nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "nvidia.com/gpu.shared")
        for key in (
            "requests.cpu",
            "requests.memory",
            "limits.cpu",
            "limits.memory",
            *map("requests.{}".format, devices),
        ):
            part, resource = key.split(".", 1)
            # Extended resources are given as limits; the request is the same.
            part = "limits" if "nvidia" in key else part
            total = sum(asked(each, part, resource) * pods[name_of(each)] for each in of_kind(objects, "Deployment"))
            assert total <= quantity(hard[key]), key
    for limit in (limit for each in of_kind(objects, "LimitRange") for limit in each["spec"]["limits"]):
        for deployment in of_kind(objects, "Deployment"):
            for container in containers(deployment):
                for resource in ("cpu", "memory"):
                    assert quantity(container["resources"]["limits"][resource]) <= quantity(limit["max"][resource])


def without_arch(pod: Object) -> dict[str, str]:
    """The labels of the nodes that a Pod asks for, but for what its image is built for."""
    return {key: value for key, value in pod.get("nodeSelector", {}).items() if key != ARCH}


def gpu_labels(pod: Object) -> set[str]:
    """Labels of which a node must have one."""
    terms = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return {expression["key"] for term in terms.get("nodeSelectorTerms", []) for expression in term["matchExpressions"]}


@each_variation
def test_gpu_pods_ask_for_a_gpu_and_cpu_pods_do_not(variation: Variation) -> None:
    objects = variation.objects()
    wants_gpu = any(name.startswith("gpu") for name in variation.components) or variation.resource == "overlays/gpu"
    for deployment in of_kind(objects, "Deployment"):
        asked_for = {name for each in containers(deployment) for name in each["resources"]["limits"]}
        assert deployment in with_model(objects) or is_idle(deployment) or asked_for == {"cpu", "memory"}
    for deployment in with_model(objects):
        pod, server = deployment["spec"]["template"]["spec"], server_of(deployment)
        limits = {name for name in server["resources"]["limits"] if name.startswith("nvidia.com/")}
        claims = pod.get("resourceClaims", [])
        tolerated = [each["key"] for each in pod.get("tolerations", [])]
        rolling = deployment["spec"]["strategy"]["rollingUpdate"]
        if not wants_gpu:
            assert environment(server, objects)["APP_PROVIDER"] == "cpu"
            assert not any((limits, claims, without_arch(pod), gpu_labels(pod)))
            assert tolerated == (["interruptible"] if is_worker(deployment) else [])
            assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
            assert server["image"] != RELEASED["GPU_SERVER_IMAGE"]
            continue
        # "auto" would fall back to the CPU on an expensive node.
        assert environment(server, objects)["APP_PROVIDER"] == "cuda"
        # Which image the candidate has is for the release to say.
        is_canary = pod_labels(deployment).get("track") == "canary"
        assert server["image"] == RELEASED["CANARY_SERVER_IMAGE" if is_canary else "GPU_SERVER_IMAGE"]
        assert tolerated == ["nvidia.com/gpu"]
        # There is no spare GPU to surge onto.
        assert rolling == {"maxSurge": 0, "maxUnavailable": 1}
        # Through the device plugin, on a labelled node; or through a claim, which finds the node. Never both.
        assert len(limits) + len(claims) == 1
        assert without_arch(pod) == {}
        assert bool(gpu_labels(pod)) != bool(claims)


@each_variation
def test_everything_carries_the_name_label_and_no_cluster_wide_object_but_the_namespace(variation: Variation) -> None:
    objects = variation.objects()
    for each in objects:
        if each["kind"] != "Namespace":
            assert each["metadata"]["labels"][APP] in NAMES | IDLE
    (namespace,) = {each["metadata"].get("namespace") for each in objects if each["kind"] not in CLUSTER_SCOPED}
    for each in of_kind(objects, "Namespace"):
        assert each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        if variation.resource != "base":
            assert name_of(each) == namespace


@each_build
def test_network_policy_denies_all_but_what_is_named(variation: Variation) -> None:
    for policy in of_kind(variation.objects(), "NetworkPolicy"):
        for rule in (*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])):
            # An empty list would mean everybody, or every port.
            assert rule["ports"]
            assert rule.get("from") or rule.get("to"), name_of(policy)


@each_variation
def test_a_server_opens_no_connection_unless_it_fetches_its_model_or_sends_traces(variation: Variation) -> None:
    objects = variation.objects()
    for server in servers(objects):
        selecting = [
            policy["spec"]
            for policy in of_kind(objects, "NetworkPolicy")
            if matches(policy["spec"]["podSelector"]["matchLabels"], pod_labels(server))
        ]
        fetches = {"model-fetch", "tracing"} & {*variation.components} or (
            "canary/from-bucket" in variation.components and not is_stable(server)
        )
        assert any("egress" in spec for spec in selecting) == bool(fetches)


def one(variation: Variation, kind: str, name: str = "sentiment-inference") -> Object:
    (found,) = [each for each in of_kind(variation.objects(), kind) if name_of(each) == name]
    return found


@pytest.mark.parametrize("name", ["local", "local-queue"])
def test_deleting_its_namespace_undoes_the_local_overlay(name: str) -> None:
    objects = Variation(f"overlays/{name}").objects()
    (namespace,) = of_kind(objects, "Namespace")

    assert name_of(namespace) not in ("default", "sentiment-inference")
    for each in objects:
        if each is not namespace:
            assert each["kind"] not in CLUSTER_SCOPED
            assert each["metadata"]["namespace"] == name_of(namespace)


def test_the_local_overlay_is_one_replica_that_is_never_pulled() -> None:
    for deployment in (
        one(Variation("overlays/local"), "Deployment"),
        *of_this_image(Variation("overlays/local-queue").objects()),
    ):
        assert deployment["spec"]["replicas"] == 1
        assert {each["imagePullPolicy"] for each in containers(deployment)} == {"Never"}


def test_the_cpu_overlay_has_3_to_20_replicas() -> None:
    assert bounds(one(Variation("overlays/cpu"), "HorizontalPodAutoscaler")) == (3, 20)


def test_the_keda_bounds_are_the_cpu_overlay_s() -> None:
    keda = Variation("overlays/cpu", ("autoscale-keda",))

    assert bounds(one(keda, "ScaledObject")) == bounds(one(Variation("overlays/cpu"), "HorizontalPodAutoscaler"))
    assert one(keda, "ScaledObject")["metadata"]["namespace"] == "sentiment-inference"


def test_keda_scales_with_the_behavior_of_the_hpa_it_replaces() -> None:
    scaled = one(Variation("base", ("autoscale-keda",)), "ScaledObject")["spec"]

    replaced = one(Variation("base"), "HorizontalPodAutoscaler")["spec"]
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == replaced["behavior"]


def test_the_autoscalers_agree_on_the_target() -> None:
    keda = one(Variation("base", ("autoscale-keda",)), "ScaledObject")["spec"]["triggers"]
    hpa = one(Variation("base", ("autoscale-inflight",)), "HorizontalPodAutoscaler")["spec"]["metrics"]

    assert keda[0]["metadata"]["threshold"] == hpa[0]["pods"]["target"]["averageValue"]
    assert keda[1]["metadata"]["value"] == str(hpa[1]["resource"]["target"]["averageUtilization"])


def test_a_changed_setting_is_a_new_config_map_and_so_rolls_the_pods() -> None:
    def used(variation: Variation) -> str:
        return str(server_of(one(variation, "Deployment"))["envFrom"][0]["configMapRef"]["name"])

    assert used(Variation("base")) != used(Variation("base", ("gpu",)))


@pytest.mark.parametrize("hardware", [(), ("gpu",), ("gpu-shared",), ("gpu-dra",)], ids=str)
def test_the_candidate_is_the_stable_pod_but_for_image_and_own_settings(hardware: tuple[str, ...]) -> None:
    variation = Variation("base", ("gateway", "canary", *hardware, "model-fetch"))
    stable, candidate = one(variation, "Deployment"), one(variation, "Deployment", "sentiment-inference-canary")
    stable_pod, candidate_pod = (each["spec"]["template"]["spec"] for each in (stable, candidate))

    # One Pod is not spread.
    stable_pod.pop("topologySpreadConstraints")
    assert server_of(candidate)["image"] == RELEASED["CANARY_SERVER_IMAGE"]
    candidate_pod["containers"][0]["image"] = server_of(stable)["image"]
    # Its own release comes last, so that it holds, also where the model is fetched.
    for container in (*candidate_pod["initContainers"], *candidate_pod["containers"]):
        assert container["envFrom"].pop()["configMapRef"]["name"].startswith("sentiment-inference-canary-")
    assert candidate_pod == stable_pod
    assert candidate["spec"]["strategy"] == stable["spec"]["strategy"]


@pytest.mark.parametrize("name", ["model-pvc", "model-fetch", "model-image-volume"])
def test_a_delivered_artifact_hides_the_image_s_own_and_cannot_be_written(name: str) -> None:
    deployment = one(Variation("base", (name,)), "Deployment")

    (mount,) = server_of(deployment)["volumeMounts"]
    assert mount["readOnly"] is True
    assert "/models/current".startswith(mount["mountPath"])


def test_the_fetched_artifact_is_checked_against_the_digest_and_lands_where_the_server_looks() -> None:
    objects = Variation("base", ("model-fetch",)).objects()
    (deployment,) = of_kind(objects, "Deployment")
    (fetch,) = deployment["spec"]["template"]["spec"]["initContainers"]

    known = environment(fetch, objects)
    command = [re.sub(r"\$\((\w+)\)", lambda name: known[name[1]], word) for word in fetch["command"]]
    address = f"{known['MODEL_URL']}/{known['MODEL_NAME']}/{known['MODEL_VERSION']}"
    assert command == [
        *("python", "-m", "model.fetch", address, known["APP_MODEL_DIR"]),
        *("--digest", known["APP_MODEL_DIGEST"]),
    ]
    assert fetch["image"] == RELEASED["FETCH_IMAGE"]


TAKES_A_MODEL = {"server", "fetch", "scoring", "ray-head", "ray-worker", "train"}


@pytest.mark.parametrize(
    "variation",
    [
        Variation("base", ("gateway", "canary", "queue", "model-fetch", "model-signature"), workers=True),
        Variation("base", ("model-signature", "model-fetch"), renamed=True),
        *(Variation(f"jobs/{name}", ("model-signature",)) for name in ("batch", "batch-gpu", "batch-ray", "retrain")),
    ],
    ids=str,
)
def test_whatever_takes_a_model_is_given_the_keys_that_must_have_signed_it(variation: Variation) -> None:
    objects = variation.objects()
    (keys,) = [each for each in of_kind(objects, "ConfigMap") if "public-keys.pem" in each["data"]]
    for template in pods(objects):
        for container in containers_of(template):
            if environment(container, objects).get("APP_ROLE") == "gateway":
                continue
            assert container["name"] in TAKES_A_MODEL
            (variable,) = [each for each in container["env"] if each["name"] == "APP_MODEL_PUBLIC_KEY"]
            value = variable.get("value") or keys["data"][variable["valueFrom"]["configMapKeyRef"]["key"]]
            (mount,) = [each for each in container["volumeMounts"] if each["name"] == "model-keys"]
            assert (value, mount["readOnly"]) == (f"{mount['mountPath']}/public-keys.pem", True)
            (volume,) = [each for each in template["spec"]["volumes"] if each["name"] == "model-keys"]
            assert volume["configMap"]["name"] == name_of(keys)


def test_the_keys_that_are_shipped_are_none_so_that_nothing_is_served_by_mistake() -> None:
    with pytest.raises(ConfigError, match="found none"):
        read_public_keys(K8S / "components" / "model-signature" / "public-keys.pem")


@pytest.mark.parametrize("order", [("gpu", "model-fetch"), ("model-fetch", "gpu")], ids="-".join)
def test_the_gpu_image_is_the_server_s_only(order: tuple[str, ...]) -> None:
    deployment = one(Variation("base", order), "Deployment")

    assert [each["image"] for each in containers(deployment)] == [
        RELEASED["FETCH_IMAGE"],
        RELEASED["GPU_SERVER_IMAGE"],
    ]


def test_a_node_drain_takes_one_pod_at_a_time_and_never_waits_for_a_broken_one() -> None:
    budget = one(Variation("base"), "PodDisruptionBudget")["spec"]

    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def pods_after(replicas: int, seconds: int, direction: Object, sign: int) -> int:
    """Replicas after `seconds` if only the HPA's policies hold it back."""
    for _ in range(seconds // direction["policies"][0]["periodSeconds"]):
        steps = [
            policy["value"] if policy["type"] == "Pods" else math.ceil(replicas * policy["value"] / 100)
            for policy in direction["policies"]
        ]
        replicas += sign * max(steps)
    return replicas


def test_the_hpa_goes_up_in_a_minute_and_down_in_many() -> None:
    behavior: Any = one(Variation("overlays/cpu"), "HorizontalPodAutoscaler")["spec"]["behavior"]

    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert pods_after(3, 90, behavior["scaleUp"], +1) >= 20
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 300
    assert pods_after(20, 300, behavior["scaleDown"], -1) >= 10


def test_the_readme_names_every_component_overlay_and_job() -> None:
    text = (K8S / "README.md").read_text()

    for folder in ("components", "overlays", "jobs"):
        for path in (K8S / folder).iterdir():
            assert f"`{path.name}`" in text or f"{folder}/{path.name}" in text


def test_every_object_that_the_readme_s_commands_name_exists() -> None:
    objects = Variation("overlays/cpu", ("gateway", "canary", "queue", "queue-local"), workers=True).objects()
    objects += Variation("overlays/cpu", (*NEEDS["argo-rollouts"], "argo-rollouts")).objects()
    objects += Variation("overlays/cpu", ("autoscale-keda",)).objects()
    for name in JOBS:
        objects += Variation(f"jobs/{name}").objects()
    known = {f"{each['kind'].lower()}/{name_of(each)}" for each in objects}
    named = re.findall(r"[\w,.]+/sentiment-inference\b[\w-]*(?=[ `\n])", (K8S / "README.md").read_text())

    assert set(named) - {"registry.example.com/sentiment-inference", "REGISTRY/sentiment-inference"} <= known
    assert len(named) > 5
