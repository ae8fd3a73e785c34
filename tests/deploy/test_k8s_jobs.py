"""What the workloads promise that nobody waits for: workers at a queue, batch, training, and who gives way to whom."""

import re
import shlex
from typing import Any

import pytest
import yaml

from model.compare.command import DO_NOT_PROMOTE
from tests.manifests import (
    JOBS,
    K8S,
    Object,
    Variation,
    containers_of,
    each_job,
    environment,
    kustomize,
    name_of,
    of_kind,
    pods,
)
from tests.process import ROOT

WORKERS = Variation("base", ("queue",), workers=True)
TOO_MANY_BAD_ROWS, INTERRUPTED = 6, 75
FOR_EVERY_TRY_THE_SAME = {2, 3}
COMPONENT = "app.kubernetes.io/component"


def the(variation: Variation, kind: str, name: str) -> Any:
    """Its spec."""
    (found,) = [each for each in of_kind(variation.objects(), kind) if name_of(each) == name]
    return found["spec"]


def job(name: str) -> Any:
    """The spec of the Job in this folder; of a CronJob, of the Jobs that it makes."""
    (found,) = of_kind(Variation(f"jobs/{name}").objects(), "Job", "CronJob")
    return found["spec"].get("jobTemplate", found)["spec"]


def command(variation: Variation) -> list[str]:
    """What its Pods run, with variables as Kubernetes or, for Ray, the shell fills them in."""
    objects = variation.objects()
    (container, *_) = containers_of(pods(objects)[0])
    known = environment(container, objects)
    for each in of_kind(objects, "RayJob"):
        return shlex.split(re.sub(r"\$(\w+)", lambda name: known[name[1]], each["spec"]["entrypoint"]))
    return [re.sub(r"\$\((\w+)\)", lambda name: known[name[1]], word) for word in container["command"]]


def test_workers_scale_from_none_by_all_jobs_that_are_not_done() -> None:
    from app.jobs.queue import STREAM

    scaled = the(WORKERS, "ScaledObject", "sentiment-inference-worker")
    (trigger,) = scaled["triggers"]

    assert (scaled["minReplicaCount"], trigger["type"]) == (0, "redis-streams")
    assert trigger["metadata"]["stream"] == STREAM
    # With a group KEDA goes by its lag or its pending entries, and ends workers that are busy with the last jobs.
    assert not {"consumerGroup", "lagCount", "pendingEntriesCount"} & trigger["metadata"].keys()
    assert int(trigger["metadata"]["streamLength"]) >= 1
    # KEDA's fallback works for averages only; when the queue is away, no worker is.
    assert trigger["metricType"] == "AverageValue"
    assert scaled["fallback"]["behavior"] == "currentReplicasIfHigher"


def test_without_keda_the_bounds_are_the_same_but_for_one_worker() -> None:
    keda = the(WORKERS, "ScaledObject", "sentiment-inference-worker")
    plain = Variation("base", ("queue", "worker-hpa"), workers=True)
    hpa = the(plain, "HorizontalPodAutoscaler", "sentiment-inference-worker")

    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (1, keda["maxReplicaCount"])
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert not of_kind(plain.objects(), "ScaledObject", "TriggerAuthentication")


@pytest.mark.parametrize("hardware", [(), ("gpu",), ("gpu-dra", "model-fetch"), ("model-pvc",)], ids=str)
def test_a_worker_is_the_server_but_for_what_it_runs_and_where(hardware: tuple[str, ...]) -> None:
    variation = Variation("base", ("queue", *hardware), workers=True)
    objects = variation.objects()
    server, worker = (
        the(variation, "Deployment", name)["template"]["spec"]
        for name in ("sentiment-inference", "sentiment-inference-worker")
    )
    (server_container,), (worker_container,) = server["containers"], worker["containers"]

    for key in ("image", "resources", "securityContext", "volumeMounts"):
        assert worker_container.get(key) == server_container.get(key), key
    assert worker_container["command"] == ["python", "-m", "app.worker"]
    for key in ("volumes", "initContainers", "nodeSelector", "resourceClaims", "securityContext"):
        assert worker.get(key) == server.get(key), key
    settings = environment(server_container, objects)
    # The same model in the same batches.
    own = {"APP_DRAIN_DELAY_SECONDS"}
    found = environment(worker_container, objects)
    assert {name: found[name] for name in settings.keys() - own} == {
        name: settings[name] for name in settings.keys() - own
    }


def test_gateway_and_worker_get_the_queue_from_a_secret_and_the_server_not_at_all() -> None:
    for name in ("sentiment-inference-gateway", "sentiment-inference-worker"):
        (container,) = the(WORKERS, "Deployment", name)["template"]["spec"]["containers"]
        given = {each["name"]: each.get("valueFrom") for each in container["env"]}
        assert given["APP_QUEUE_URL"] == {"secretKeyRef": {"name": "sentiment-inference-queue", "key": "APP_QUEUE_URL"}}
    (server,) = the(WORKERS, "Deployment", "sentiment-inference")["template"]["spec"]["containers"]
    assert server == the(Variation("base"), "Deployment", "sentiment-inference")["template"]["spec"]["containers"][0]


def test_the_gateway_has_no_model_and_gets_none() -> None:
    variation = Variation("base", ("queue", "gpu", "model-fetch"))
    pod = the(variation, "Deployment", "sentiment-inference-gateway")["template"]["spec"]
    (container,) = pod["containers"]

    assert environment(container, variation.objects())["APP_ROLE"] == "gateway"
    assert not {"initContainers", "volumes"} & pod.keys()
    assert pod["nodeSelector"].keys() == {"kubernetes.io/arch"}


def test_the_local_queue_loses_and_evicts_nothing() -> None:
    variation = Variation("overlays/local-queue")
    deployment = the(variation, "Deployment", "sentiment-inference-valkey")
    (container,) = deployment["template"]["spec"]["containers"]
    (secret,) = of_kind(variation.objects(), "Secret")
    options = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))

    assert (options["--appendonly"], options["--appendfsync"]) == ("yes", "always")
    assert options["--maxmemory-policy"] == "noeviction"
    # Two Pods of a rollout would want the volume at once.
    assert deployment["strategy"] == {"type": "Recreate"}
    assert secret["data"].keys() == {"APP_QUEUE_URL", "address", "username", "password"}


def rules(spec: Any) -> list[tuple[str, Any]]:
    """Of a Job's podFailurePolicy: actions with exit codes, or with the condition."""
    return [
        (rule["action"], set(rule["onExitCodes"]["values"]) if "onExitCodes" in rule else rule["onPodConditions"])
        for rule in spec["podFailurePolicy"]["rules"]
    ]


DISRUPTED = ("Ignore", [{"type": "DisruptionTarget", "status": "True"}])


@pytest.mark.parametrize("name", ["batch", "batch-gpu"])
def test_an_index_is_tried_again_for_what_may_mend_and_not_for_what_does_not(name: str) -> None:
    spec = job(name)

    assert spec["completionMode"] == "Indexed"
    assert rules(spec) == [DISRUPTED, ("FailJob", FOR_EVERY_TRY_THE_SAME), ("FailIndex", {TOO_MANY_BAD_ROWS})]
    assert spec["backoffLimitPerIndex"] >= 1
    assert spec["maxFailedIndexes"] < spec["completions"]
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["parallelism"] <= spec["completions"]
    # Rules by exit code name a container: it must be there.
    named = {
        rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    }
    assert named == {each["name"] for each in containers_of(spec["template"])}


@pytest.mark.parametrize("name", ["batch", "batch-gpu", "batch-ray"])
def test_the_scoring_command_is_one_that_app_scoring_understands(name: str) -> None:
    from app.scoring.__main__ import parser

    python, flag, module, *arguments = command(Variation(f"jobs/{name}"))
    found = parser().parse_args(arguments)

    assert (python, flag, module) == ("python", "-m", "app.scoring")
    assert found.engine == ("ray" if name == "batch-ray" else "local")
    if name == "batch-ray":
        (ray_job,) = of_kind(Variation("jobs/batch-ray").objects(), "RayJob")
        (workers,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert found.actors == workers["replicas"] <= found.shards
    else:
        assert found.shards == job(name)["completions"]


@pytest.mark.parametrize(("name", "final"), [("train", {2}), ("retrain", {2, 3, DO_NOT_PROMOTE})])
def test_training_is_run_again_from_its_checkpoint_by_one_pod_at_a_time(name: str, final: set[int]) -> None:
    spec = job(name)

    assert rules(spec) == [DISRUPTED, ("Ignore", {INTERRUPTED}), ("FailJob", final)]
    assert spec["podReplacementPolicy"] == "Failed"
    assert (spec["completions"], spec["parallelism"]) == (1, 1)
    (claim,) = of_kind(Variation(f"jobs/{name}").objects(), "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    words = command(Variation(f"jobs/{name}"))
    (container,) = containers_of(spec["template"])
    assert words[words.index("--checkpoints") + 1] in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", ["train", "train-distributed", "retrain"])
def test_the_training_command_has_only_options_that_there_are(name: str) -> None:
    words = command(Variation(f"jobs/{name}"))
    module = words[2].rpartition(".")[2]
    # Read, not imported: PyTorch is not installed where this runs.
    source = "".join((ROOT / "model" / "training" / f"{each}.py").read_text() for each in {module, "job"})

    given = {word for word in words if word.startswith("--")}
    result = "--publish" if name == "retrain" else "--out"
    assert {"--data", result, "--checkpoints"} <= given <= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source))
    assert ("--champion" in given) == (name == "retrain")


def test_retraining_runs_once_at_a_time_and_is_remembered() -> None:
    spec = the(Variation("jobs/retrain"), "CronJob", "sentiment-inference-retrain")

    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] >= 100  # or the controller may count missed starts and give up
    assert min(spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) >= 1


def test_distributed_training_starts_all_nodes_anew_when_one_is_taken_away() -> None:
    objects = Variation("jobs/train-distributed").objects()
    (runtime,), (train_job,) = of_kind(objects, "TrainingRuntime"), of_kind(objects, "TrainJob")
    job_set = runtime["spec"]["template"]["spec"]
    (node,) = job_set["replicatedJobs"]

    assert train_job["spec"]["runtimeRef"]["name"] == name_of(runtime)
    assert train_job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] >= 2
    assert rules(node["template"]["spec"]) == [("FailJob", DISRUPTED[1])]
    assert node["template"]["spec"]["backoffLimit"] == 0
    assert job_set["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    # The Trainer's name for the container that gets torchrun's variables.
    assert [each["name"] for each in containers_of(node["template"]["spec"]["template"])] == ["node"]
    assert command(Variation("jobs/train-distributed"))[:3] == ["torchrun", "-m", "model.training.train"]


@each_job
def test_what_ends_ends_in_time_and_has_an_identity_without_rights(variation: Variation) -> None:
    objects = variation.objects()
    for each in of_kind(objects, "Job", "RayJob", "TrainJob", "CronJob"):
        spec = each["spec"].get("jobTemplate", each)["spec"]
        assert spec["activeDeadlineSeconds"] > 0
    assert not of_kind(objects, "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Deployment")
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for template in pods(objects):
        assert not any(
            probe in each for each in template["spec"]["containers"] for probe in ("startupProbe", "lifecycle")
        )


@each_job
def test_a_queue_of_the_cluster_is_asked_for_by_label_and_nothing_suspends_itself(variation: Variation) -> None:
    for each in of_kind(variation.objects(), "Job", "RayJob", "TrainJob", "CronJob"):
        made = each["spec"].get("jobTemplate", each)
        queued = "kueue.x-k8s.io/queue-name" in made["metadata"]["labels"]
        assert queued == ("kueue" in variation.components)
        assert "suspend" not in made["spec"]


def test_online_goes_before_workers_before_what_has_no_class_before_batch_and_training_before_placeholders() -> None:
    objects = list(yaml.safe_load_all(kustomize(K8S / "priority")))
    value = {name_of(each).removeprefix("sentiment-inference-"): each["value"] for each in objects}

    assert value["online"] > value["worker"] > 0 > value["batch"] == value["training"] > value["placeholder"]
    # The Cluster Autoscaler adds no node for less.
    assert min(value.values()) >= -10
    # What nobody waits for evicts nobody.
    assert {each["value"] < 0 for each in objects if each["preemptionPolicy"] == "Never"} == {True}
    known = {name_of(each) for each in objects}
    used = {template["spec"].get("priorityClassName") for name in JOBS for template in _pods_of(name)}
    assert used - {None} == {"sentiment-inference-batch", "sentiment-inference-training"} <= known


def _pods_of(name: str) -> list[Object]:
    return pods(Variation(f"jobs/{name}").objects())


def test_the_service_has_its_classes_only_where_they_are_asked_for() -> None:
    names = ("gateway", "queue", "queue-local", "canary", "priority")
    classes = {
        name_of(each): each["spec"]["template"]["spec"].get("priorityClassName")
        for each in of_kind(Variation("base", names, workers=True).objects(), "Deployment")
    }

    assert classes.pop("sentiment-inference-worker") == "sentiment-inference-worker"
    assert set(classes.values()) == {"sentiment-inference-online"}
    assert "PriorityClass" not in {each["kind"] for each in Variation("base", names).objects()}
    plain = Variation("base", names[:-1], workers=True).objects()
    assert not any("priorityClassName" in template["spec"] for template in pods(plain))
