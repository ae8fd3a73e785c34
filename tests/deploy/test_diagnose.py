"""k8s/diagnose.py against recorded API answers from a `kubectl` on PATH: each cause, and what only looks like it."""

import copy
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.process import ROOT

Object = dict[str, Any]
APP = {"app.kubernetes.io/name": "sentiment-inference", "track": "stable"}
# In a folder of answers: a file for each kind's objects, for what it says instead, and for a Pod's metrics, the first
# time and after that. A shell, because a Python for each call would take most of the tests' time.
KUBECTL = r"""#!/bin/sh
PATH=/usr/bin:/bin
cd "${0%/*}/answers"
for last; do :; done
refuse() { cat "$1" >&2; exit 1; }
case "$*" in
    *" namespace "*) echo '{"kind": "Namespace", "metadata": {"name": "ns", "labels": {}}}'; exit;;
    *" --raw "*)
        name=raw$(echo "$last" | tr / -)
        cat "$name.1" 2>/dev/null || refuse notfound
        [ ! -e "$name.2" ] || mv "$name.2" "$name.1"
        exit;;
esac
[ ! -e broken ] || refuse broken
printf '{"items": ['
comma=
for kind in $(echo "$last" | tr , ' '); do
    [ ! -e "$kind.refused" ] || refuse "$kind.refused"
    [ ! -e "${kind%%.*}.json" ] || { printf %s "$comma"; cat "${kind%%.*}.json"; comma=,; }
done
echo ]}
"""


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def thing(kind: str, name: str, owner: Object | None = None, **fields: Any) -> Object:
    metadata = {
        "name": name,
        "uid": f"{kind}-{name}",
        "creationTimestamp": ago(7200),
        "labels": fields.pop("labels", {}),
    }
    if owner:
        metadata["ownerReferences"] = [
            {"kind": owner["kind"], "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        ]
    return {"kind": kind, "metadata": metadata, **fields}


def condition(kind: str, status: str, reason: str = "", message: str = "", seconds: float = 3600) -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": ago(seconds)}


def healthy() -> dict[str, Object]:
    """Deployment, one ready Pod, Service with an endpoint, HPA, PDB and NetworkPolicy, as the base has them."""
    container = {"name": "server", "ports": [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]}
    deployment = thing(
        "Deployment", "web", spec={"replicas": 1, "template": {"metadata": {"labels": APP}}},
        status={"replicas": 1, "conditions": [condition("Available", "True"), condition("Progressing", "True")]},
    )  # fmt: skip
    replicas = thing("ReplicaSet", "web-1", deployment, spec={"replicas": 1}, status={})
    pod = thing(
        "Pod", "web-1-a", replicas, labels=APP, spec={"containers": [container]},
        status={
            "phase": "Running", "startTime": ago(3600),
            "conditions": [condition("PodScheduled", "True"), condition("Ready", "True", seconds=3590)],
            "containerStatuses": [{
                "name": "server", "image": "i:1", "ready": True, "started": True, "restartCount": 0, "lastState": {},
                "state": {"running": {"startedAt": ago(3599)}},
            }],
        },
    )  # fmt: skip
    service = thing("Service", "web", spec={"selector": APP, "ports": [{"port": 8000, "targetPort": "http"}]})
    pieces = thing(
        "EndpointSlice",
        "web-x",
        labels={"kubernetes.io/service-name": "web"},
        endpoints=[{"conditions": {"ready": True}}],
    )
    hpa = thing(
        "HorizontalPodAutoscaler", "web",
        spec={"scaleTargetRef": {"kind": "Deployment", "name": "web"}, "maxReplicas": 3},
        status={"currentReplicas": 1, "conditions": [
            condition("AbleToScale", "True"), condition("ScalingActive", "True"),
            condition("ScalingLimited", "True", "TooFewReplicas"),
        ]},
    )  # fmt: skip
    pdb = thing(
        "PodDisruptionBudget", "web", spec={"selector": {"matchLabels": APP}},
        status={"disruptionsAllowed": 1, "currentHealthy": 1, "desiredHealthy": 0, "expectedPods": 1},
    )  # fmt: skip
    policy = thing(
        "NetworkPolicy", "web",
        spec={"podSelector": {"matchLabels": APP}, "policyTypes": ["Ingress", "Egress"], "ingress": [{
            "ports": [{"protocol": "TCP", "port": 8000}],
            "from": [{"podSelector": {"matchLabels": {"sentiment-inference-client": "true"}}}],
        }]},
    )  # fmt: skip
    client = thing("Pod", "client", labels={"sentiment-inference-client": "true"},
                   spec={"containers": [{"name": "c"}]},
                   status={"phase": "Running", "conditions": [condition("Ready", "True")]})  # fmt: skip
    every = (deployment, replicas, pod, service, pieces, hpa, pdb, policy, client)
    names = ("deployment", "replicas", "pod", "service", "pieces", "hpa", "pdb", "policy", "client")
    return dict(zip(names, copy.deepcopy(every), strict=True))


def event(item: Object, reason: str, message: str, seconds: float = 60) -> Object:
    about = {"kind": item["kind"], "name": item["metadata"]["name"], "uid": item["metadata"]["uid"]}
    return thing("Event", f"e{seconds}{reason}", type="Warning", reason=reason, message=message, count=5,
                 lastTimestamp=ago(seconds), involvedObject=about)  # fmt: skip


class Kubectl:
    def __init__(self, folder: Path, program: str = "diagnose.py") -> None:
        self.folder, self.program = folder, program
        fake = folder / "kubectl"
        fake.write_text(KUBECTL)
        fake.chmod(0o755)

    def run(self, items: list[Object], *arguments: str, absent: tuple[str, ...] = (), forbidden: tuple[str, ...] = (),
            broken: bool = False,
            raw: dict[str, list[str]] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
        answers = {"notfound": "Error from server (NotFound): the server could not find the requested resource"}
        if broken:
            answers["broken"] = "Unable to connect to the server: dial tcp 127.0.0.1:6443: connect: connection refused"
        for kind in absent:
            answers[f"{kind}.refused"] = f'error: the server doesn\'t have a resource type "{kind}"'
        for kind in forbidden:
            answers[f"{kind}.refused"] = (
                f'Error from server (Forbidden): {kind} is forbidden: User "u" cannot list resource'
            )
        kinds: dict[str, list[Object]] = {}
        for each in items:
            kinds.setdefault(f"{each['kind'].lower()}s".replace("policys", "policies"), []).append(each)
        answers |= {f"{kind}.json": json.dumps(each)[1:-1] for kind, each in kinds.items()}
        for path, texts in (raw or {}).items():
            answers |= {f"raw{path.replace('/', '-')}.{number}": text for number, text in enumerate(texts, 1)}
        folder = self.folder / "answers"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in answers.items():
            (folder / name).write_text(text)
        command = [sys.executable, str(ROOT / "k8s" / self.program), "-n", "ns", *arguments]
        return subprocess.run(command, env={**os.environ, "PATH": str(self.folder)}, capture_output=True, text=True)

    def findings(self, items: list[Object]) -> list[Object]:
        done = self.run(items, "--json")
        assert not done.stderr
        found: list[Object] = json.loads(done.stdout)["findings"]
        assert done.returncode == (1 if found else 0)
        return found


@pytest.fixture
def kubectl(tmp_path: Path) -> Kubectl:
    return Kubectl(tmp_path)


def unready(pod: Object, **status: Any) -> None:
    """Never ready, and its container as `status` says."""
    pod["status"]["conditions"][1] = condition("Ready", "False", "ContainersNotReady", seconds=3600)
    pod["status"]["containerStatuses"][0].update({"ready": False, "started": False, **status})


def crashed(code: int, reason: str = "Error", message: str = "") -> Object:
    end = {"exitCode": code, "reason": reason, "message": message, "startedAt": ago(70), "finishedAt": ago(60)}
    return {"restartCount": 4, "lastState": {"terminated": end},
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}}  # fmt: skip


def test_a_healthy_namespace_with_old_warnings_is_well(kubectl: Kubectl) -> None:
    parts = healthy()
    old_pod = {**parts["pod"], "metadata": {"name": "web-0-z", "uid": "gone"}}
    events = [
        event(old_pod, "FailedScheduling", "Insufficient cpu"),
        event(parts["pod"], "Unhealthy", "Startup probe failed"),
    ]
    assert kubectl.findings([*parts.values(), *events]) == []


PENDING = {
    "no-cpu": "0/3 nodes are available: 1 node(s) had untolerated taint {a: }, 2 Insufficient cpu. preemption: none",
    "no-memory": "0/3 nodes are available: 3 Insufficient memory.",
    "no-gpu": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    "node-selector": "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.",
    "taint": "0/3 nodes are available: 3 node(s) had untolerated taint {a: b}.",
    "claim-unbound": '0/3 nodes are available: persistentvolumeclaim "m" not found. Insufficient cpu',
    "pending": "something new",
}


@pytest.mark.parametrize("cause", PENDING)
def test_a_pending_pod_is_explained_and_the_empty_service_follows(kubectl: Kubectl, cause: str) -> None:
    parts = healthy()
    parts["pod"]["status"] = {
        "phase": "Pending",
        "conditions": [condition("PodScheduled", "False", "Unschedulable", PENDING[cause])],
    }
    parts["pieces"]["endpoints"] = None
    (found,) = kubectl.findings(list(parts.values()))
    assert (found["cause"], found["pain"]) == (cause, "clients get no answer")
    assert [each["cause"] for each in found["consequences"]] == ["no-endpoints"]


STATES = {
    "image-pull": {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}},
    "image-arch": crashed(255, message="exec /usr/bin/python: exec format error"),
    "container-config": {
        "state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'configmap "x" not found'}}
    },
    "oom-load": crashed(137, "OOMKilled"),
    "crash": crashed(139),
    "startup-probe": {"state": {"running": {"startedAt": ago(100)}}},
    "readiness-probe": {"started": True},
    **{f"exit-{code}": crashed(code, message=f"the line of {code}") for code in range(1, 6)},
}


@pytest.mark.parametrize("cause", STATES)
def test_a_container_that_does_not_get_ready_is_explained(kubectl: Kubectl, cause: str) -> None:
    parts = healthy()
    unready(parts["pod"], **STATES[cause])
    (found,) = kubectl.findings(list(parts.values()))
    assert found["cause"] == cause
    if cause.startswith("exit"):
        assert any(each["value"] == f"the line of {cause[-1]}" for each in found["evidence"])


def test_out_of_memory_under_requests_fails_some_and_is_forgotten_in_time(kubectl: Kubectl) -> None:
    parts = healthy()
    state = parts["pod"]["status"]["containerStatuses"][0]
    state["lastState"] = crashed(137, "OOMKilled")["lastState"]
    (found,) = kubectl.findings(list(parts.values()))
    assert (found["cause"], found["pain"]) == ("oom-payload", "some requests fail")
    state["lastState"]["terminated"]["finishedAt"] = ago(7000)
    assert kubectl.findings(list(parts.values())) == []


def test_label_drift_names_the_label_and_an_independent_fault_is_still_told(kubectl: Kubectl) -> None:
    parts = healthy()
    parts["service"]["spec"]["selector"] = {**APP, "track": "blue"}
    parts["pieces"]["endpoints"] = None
    parts["hpa"]["status"]["conditions"][1] = condition(
        "ScalingActive", "False", "FailedGetResourceMetric", "unable to fetch"
    )
    found = kubectl.findings(list(parts.values()))
    assert [each["cause"] for each in found] == ["label-drift", "hpa-unknown"]
    assert "'track': 'stable'" in found[0]["evidence"][-1]["value"]


def test_policies_that_admit_nobody_or_not_a_declared_client_shut_out(kubectl: Kubectl) -> None:
    parts = healthy()
    rule = parts["policy"]["spec"]["ingress"]
    rule[0]["from"][0]["podSelector"]["matchLabels"] = {"other": "label"}
    (found,) = kubectl.findings(list(parts.values()))
    assert (found["cause"], found["pain"]) == ("network-policy", "some requests fail")
    rule.clear()
    (found,) = kubectl.findings(list(parts.values()))
    assert (found["cause"], found["pain"]) == ("network-policy", "clients get no answer")


def test_workload_conditions_autoscaler_budget_and_job(kubectl: Kubectl) -> None:
    parts = healthy()
    parts["replicas"]["status"]["conditions"] = [
        condition("ReplicaFailure", "True", "FailedCreate", "exceeded quota: q")
    ]
    parts["deployment"]["status"]["conditions"][1] = condition("Progressing", "False", "ProgressDeadlineExceeded")
    parts["hpa"]["status"]["conditions"][2]["reason"] = "TooManyReplicas"
    parts["pdb"]["status"].update({"disruptionsAllowed": 0, "desiredHealthy": 1})
    job = thing("Job", "score", spec={}, status={"conditions": [condition("Failed", "True", "BackoffLimitExceeded")]})
    found = {each["cause"]: each for each in kubectl.findings([*parts.values(), job])}
    assert set(found) == {"quota", "hpa-maximum", "pdb-blocks", "job-failed"}
    assert [each["cause"] for each in found["quota"]["consequences"]] == ["rollout-stuck"]


@pytest.mark.parametrize(("active", "wrong"), [("True", True), ("False", False)])
def test_a_worker_at_zero_is_wrong_only_with_work(kubectl: Kubectl, active: str, wrong: bool) -> None:
    worker = thing(
        "Deployment", "worker", spec={"replicas": 0, "template": {"metadata": {"labels": {"a": "w"}}}}, status={}
    )
    scaled = thing("ScaledObject", "worker", spec={"scaleTargetRef": {"name": "worker"}},
                   status={"conditions": [condition("Ready", "True"), condition("Active", active)]})  # fmt: skip
    assert [each["cause"] for each in kubectl.findings([*healthy().values(), worker, scaled])] == [
        "worker-zero"
    ] * wrong


@pytest.mark.parametrize(("weight", "pain"), [(5, "some requests fail"), (0, "at risk")])
def test_a_canary_without_endpoints_hurts_by_its_weight(kubectl: Kubectl, weight: int, pain: str) -> None:
    canary = thing("Service", "canary", spec={"selector": {**APP, "track": "canary"}, "ports": [{"port": 8000}]})
    refs = [{"name": "web", "weight": 100 - weight}, {"name": "canary", "weight": weight}]
    route = thing("HTTPRoute", "web", spec={"rules": [{"backendRefs": refs}]},
                  status={"parents": [{"conditions": [condition("Accepted", "True")]}]})  # fmt: skip
    (found,) = kubectl.findings([*healthy().values(), canary, route])
    assert found["pain"] == pain


def test_a_claim_that_cannot_be_mounted(kubectl: Kubectl) -> None:
    parts = healthy()
    unready(parts["pod"], state={"waiting": {"reason": "ContainerCreating"}})
    parts["pod"]["status"]["phase"] = "Pending"
    said = event(parts["pod"], "FailedAttachVolume", "Multi-Attach error for volume")
    (found,) = kubectl.findings([*parts.values(), said])
    assert found["cause"] == "mount"


def test_kinds_that_cannot_be_read_are_named_and_do_no_harm(kubectl: Kubectl) -> None:
    done = kubectl.run(list(healthy().values()), absent=("scaledobjects.keda.sh",), forbidden=("events",))
    assert done.returncode == 0
    assert "events: forbidden" in done.stdout
    assert "scaledobjects.keda.sh: the cluster has no such API" in done.stdout


def test_what_kubectl_cannot_tell_is_exit_code_2(kubectl: Kubectl, tmp_path: Path) -> None:
    for options in ({"broken": True}, {"forbidden": ("pods",)}):
        assert kubectl.run(list(healthy().values()), **options).returncode == 2  # type: ignore[arg-type]
    assert kubectl.run([]).returncode == 2
    (tmp_path / "kubectl").unlink()
    missing = kubectl.run([])
    assert missing.returncode == 2
    assert "kubectl is not on PATH" in missing.stderr


def test_the_runbook_in_the_readme_is_the_programs_table(kubectl: Kubectl) -> None:
    assert kubectl.run([], "--runbook").stdout in (ROOT / "k8s/README.md").read_text()


def test_a_liveness_kill_is_told_from_other_ends_by_the_kubelets_word(kubectl: Kubectl) -> None:
    parts = healthy()
    state = parts["pod"]["status"]["containerStatuses"][0]
    state.update({"restartCount": 1, "lastState": crashed(0, "Completed")["lastState"]})
    (found,) = kubectl.findings(list(parts.values()))
    assert found["cause"] == "crash"
    killed = event(parts["pod"], "Killing", "Container server failed liveness probe, will be restarted")
    (found,) = kubectl.findings([*parts.values(), killed])
    assert (found["cause"], found["pain"]) == ("liveness-probe", "some requests fail")


def test_the_text_says_cause_evidence_and_next_command(kubectl: Kubectl) -> None:
    parts = healthy()
    unready(parts["pod"], **crashed(3, message="checksum\x1b[31m differs"))
    done = kubectl.run(list(parts.values()), "--context", "prod")
    assert done.stdout.startswith("1. Deployment/web: exit code 3: the artifact is invalid  [")
    assert "checksum\\x1b[31m differs" in done.stdout
    assert "next: kubectl --context=prod -n ns rollout undo deployment/web" in done.stdout
