"""k8s/rehearse.py against a cluster that remembers: it builds what is applied with the real kustomize."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.release import write
from tests.deploy.test_diagnose import Object, condition
from tests.deploy.test_evidence import metrics
from tests.manifests import K8S, RELEASE, RELEASED, kubectl, kustomize
from tests.process import ROOT

# Asks the thread of a test, and waits for its answer.
KUBECTL = """#!/bin/sh
PATH=/usr/bin:/bin
cd "${0%/*}"
printf '%s\\0' "$@" >asked
read -r code <answered
cat stdout
cat stderr >&2
exit "$code"
"""
STABLE, CANDIDATE = "sentiment-inference", "sentiment-inference-canary"


class Refused(Exception):
    """What kubectl says before it ends with 1."""


class Cluster:
    """Objects by kind and name. A Deployment's Pods are at once what its template says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Of a repository with another model for the candidate.
        self.manifests = shutil.copytree(
            K8S, folder / "repository" / "k8s", ignore=shutil.ignore_patterns("__pycache__")
        )
        (self.manifests.parent / "loadtest").symlink_to(ROOT / "loadtest")
        write(self.manifests / RELEASE, {"CANARY_MODEL_VERSION": "2.0.0", "CANARY_MODEL_DIGEST": "2" * 64})
        self.objects: dict[tuple[str, str], Object] = {}
        self.revisions: dict[str, list[Object]] = {}
        self.said: list[str] = []
        # Of a track, what its Pods answer; and what fails.
        self.metrics = {"stable": metrics(5000), "canary": metrics(5000)}
        self.load_test_fails_for = ""
        self.stuck = ""
        fake = folder / "kubectl"
        fake.write_text(KUBECTL)
        fake.chmod(0o755)
        for name in ("asked", "answered"):
            os.mkfifo(folder / name)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while arguments := (self.folder / "asked").read_text().split("\0")[:-1]:
            out, err, code = "", "", 0
            try:
                out = self.answer(arguments)
            except Refused as refused:
                err, code = str(refused), 1
            except Exception:
                err, code = traceback.format_exc(), 99
            (self.folder / "stdout").write_text(out)
            (self.folder / "stderr").write_text(err)
            (self.folder / "answered").write_text(f"{code}\n")

    def close(self) -> None:
        (self.folder / "asked").write_text("")
        self._thread.join()

    def rehearse(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.manifests / "rehearse.py"), "--poll", "0", *arguments]
        return subprocess.run(command, env={**os.environ, "PATH": str(self.folder)}, capture_output=True, text=True)

    def answer(self, arguments: list[str]) -> str:
        words = [each for each in arguments if not each.startswith("--context")]
        if words[0] == "-n":
            words = words[2:]
        self.said.append(" ".join(word for word in words if not word.startswith("/")))
        match words:
            case ["kustomize", folder]:
                return kustomize(Path(folder))
            case ["apply", "-k", folder]:
                for each in yaml.load_all(kustomize(Path(folder)), yaml.CSafeLoader):
                    self.apply(each)
            case ["delete", "-k", folder, "--ignore-not-found"]:
                for each in yaml.load_all(kustomize(Path(folder)), yaml.CSafeLoader):
                    self.objects.pop((each["kind"].lower(), each["metadata"]["name"]), None)
            case ["delete", *names]:
                for name in names:
                    kind, _, name = name.partition("/")
                    del self.objects[kind, name]
            case ["rollout", "status", name, _]:
                if self.stuck and self.stuck == name:
                    raise Refused(f"error: {name} exceeded its progress deadline")
            case ["rollout", "undo", name]:
                name = name.removeprefix("deployment/")
                self.roll(self.objects["deployment", name], self.revisions[name][-2])
            case ["patch", "httproute", name, "--type", "json", "-p", text]:
                refs = self.objects["httproute", name]["spec"]["rules"][0]["backendRefs"]
                for each in json.loads(text):
                    index = int(re.fullmatch(r"/spec/rules/0/backendRefs/(\d)/weight", each["path"])[1])  # type: ignore[index]
                    refs[index]["weight"] = each["value"]
            case ["get", "namespace", _, "-o", "json"]:
                return json.dumps({"kind": "Namespace", "metadata": {"name": "any"}})
            case ["get", "--raw", path]:
                return self.metrics["canary" if "-canary-" in path else "stable"]
            case ["get", "job", name, "-o", "json"]:
                return json.dumps(self.objects["job", name])
            case ["get", "-o", "json", kinds]:
                return json.dumps({"items": self.every(kinds)})
            case _:
                raise AssertionError(words)
        return ""

    def apply(self, new: Object) -> None:
        kind, name = new["kind"].lower(), new["metadata"]["name"]
        new["metadata"]["uid"] = f"{kind}-{name}"
        match kind:
            case "deployment":
                old = self.objects.get((kind, name))
                self.objects[kind, name] = new
                if old is None or old["spec"]["template"] != new["spec"]["template"]:
                    self.roll(new, new["spec"]["template"])
                else:
                    new["status"] = old["status"]
                return
            case "job":
                if (kind, name) in self.objects:
                    raise Refused(f"The Job {name} is invalid: spec.template: field is immutable")
                host = self.objects[self.options(new)]["data"]["LOCUST_HOST"] if self.options(new) else ""
                failed = bool(self.load_test_fails_for) and host.endswith(f"//{self.load_test_fails_for}:8000")
                new["status"] = {"conditions": [condition("Failed" if failed else "Complete", "True")]}
        self.objects[kind, name] = new

    @staticmethod
    def options(job: Object) -> tuple[str, str]:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        return "configmap", container["envFrom"][0]["configMapRef"]["name"]

    def roll(self, deployment: Object, template: Object) -> None:
        deployment["spec"]["template"] = template
        self.revisions.setdefault(deployment["metadata"]["name"], []).append(json.loads(json.dumps(template)))
        count = deployment["spec"].get("replicas", 1)
        states = [condition("Available", "True"), condition("Progressing", "True", "NewReplicaSetAvailable")]
        kinds = ("replicas", "updatedReplicas", "availableReplicas", "readyReplicas")
        deployment["status"] = dict.fromkeys(kinds, count) | {"conditions": states}

    def every(self, kinds: str) -> list[Object]:
        wanted = {each.partition(".")[0] for each in kinds.split(",")}
        found = [*self.objects.values(), *self.pods(), *self.slices()]
        return [each for each in found if {f"{each['kind'].lower()}s", f"{each['kind'].lower()[:-1]}ies"} & wanted]

    def pods(self) -> Iterator[Object]:
        for kind, name in self.objects:
            if kind == "deployment":
                owner = {"kind": "Deployment", "name": name, "uid": f"deployment-{name}"}
                template = self.revisions[name][-1]
                metadata = {"name": f"{name}-{len(self.revisions[name])}-a", "ownerReferences": [owner]}
                status = {"phase": "Running", "conditions": [condition("Ready", "True")]}
                yield {
                    "kind": "Pod",
                    "metadata": template["metadata"] | metadata,
                    "spec": template["spec"],
                    "status": status,
                }

    def slices(self) -> Iterator[Object]:
        for (kind, name), service in self.objects.items():
            if kind == "service":
                behind = [
                    {"conditions": {"ready": True}}
                    for pod in self.pods()
                    if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
                ]
                labels = {"kubernetes.io/service-name": name}
                yield {"kind": "EndpointSlice", "metadata": {"name": name, "labels": labels}, "endpoints": behind}

    def model(self, name: str = STABLE) -> str:
        return str(self.objects["deployment", name]["spec"]["template"]["metadata"]["labels"]["model-version"])

    def weights(self) -> dict[str, int]:
        refs = self.objects["httproute", STABLE]["spec"]["rules"][0]["backendRefs"]
        return {each["name"]: each["weight"] for each in refs}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    kubectl()
    made = Cluster(tmp_path)
    yield made
    made.close()


def steps(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if re.fullmatch("[a-z]+", line)]


def test_release_candidate_promotion_and_rollback_are_done_and_verified(cluster: Cluster) -> None:
    done = cluster.rehearse("--image", "registry.example.com/candidate:2", "--weight", "20")

    assert (done.returncode, done.stderr) == (0, "")
    assert steps(done) == ["release", "candidate", "evidence", "promotion", "rollback", "rehearsed"]
    assert "canary: promote: every check holds" in done.stdout
    # The stable Pods had three revisions: released, the candidate's model, and the first again.
    released, promoted, back = cluster.revisions[STABLE]
    assert promoted["metadata"]["labels"]["model-version"] == "2.0.0"
    assert promoted["spec"]["containers"][0]["image"] == "registry.example.com/candidate:2"
    assert back == released
    assert [each["spec"]["containers"][0]["image"] for each in cluster.revisions[CANDIDATE]] == [
        "registry.example.com/candidate:2"
    ]
    # The candidate is gone, and the entrance is there.
    assert ("deployment", CANDIDATE) not in cluster.objects
    assert ("service", CANDIDATE) not in cluster.objects
    assert cluster.weights() == {STABLE: 100}
    assert sum("patch httproute" in each for each in cluster.said) == 1
    # What undo needs is still there.
    assert sum(kind == "configmap" and name.startswith(f"{STABLE}-") for kind, name in cluster.objects) >= 2


def test_a_candidate_s_model_from_an_image_volume_is_the_stable_pods_after_promotion(cluster: Cluster) -> None:
    digest = f"sha256:{'1' * 64}"
    done = cluster.rehearse("--source", "image-volume", "--model-image", f"registry.example.com/model@{digest}")

    assert (done.returncode, done.stderr) == (0, "")
    for template in (cluster.revisions[CANDIDATE][0], cluster.revisions[STABLE][1]):
        (volume,) = template["spec"]["volumes"]
        assert volume["image"]["reference"] == f"registry.example.com/model@{digest}"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def failing(cluster: Cluster) -> None:
    cluster.metrics["canary"] = metrics(4000, errors=1000)


def over_the_objective(cluster: Cluster) -> None:
    cluster.load_test_fails_for = CANDIDATE


def never_ready(cluster: Cluster) -> None:
    cluster.stuck = f"deployment/{CANDIDATE}"


def release_over_the_objective(cluster: Cluster) -> None:
    cluster.load_test_fails_for = STABLE


@pytest.mark.parametrize(
    ("fault", "last", "said"),
    [
        (failing, "evidence", "does not say promote (exit code 20); the weight is 0 again"),
        (over_the_objective, "candidate", f"the load test of {CANDIDATE} failed"),
        (never_ready, "candidate", "exceeded its progress deadline"),
        (release_over_the_objective, "release", f"the load test of {STABLE} failed"),
    ],
)
def test_what_goes_wrong_ends_it_in_one_line_and_nothing_is_promoted(
    cluster: Cluster, fault: Callable[[Cluster], Any], last: str, said: str
) -> None:
    before = files(cluster.manifests)
    fault(cluster)

    done = cluster.rehearse()

    assert files(cluster.manifests) == before

    assert done.returncode == 1
    assert steps(done)[-1] == last
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert cluster.model() == RELEASED["MODEL_VERSION"]
    assert last == "release" or cluster.weights()[STABLE] == (
        95 if last == "candidate" and fault is not never_ready else 100
    )


def test_a_candidate_that_is_what_is_released_rehearses_nothing(cluster: Cluster) -> None:
    write(cluster.manifests / RELEASE, {f"CANARY_{name}": RELEASED[name] for name in ("MODEL_VERSION", "MODEL_DIGEST")})

    assert "the candidate is what is released" in cluster.rehearse().stderr


def test_an_overlay_without_a_gate_is_bad_usage(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "k8s" / "rehearse.py"), "--overlay", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 2
    assert "no k8s/overlays/cpu/gate" in done.stderr
