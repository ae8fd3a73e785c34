"""The in-cluster load test: manifests as kustomize builds them, and the commands and files in them, run here."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from loadtest.benchmark.server import free_port
from tests.process import ROOT

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


@pytest.fixture(scope="module")
def objects():
    """The built objects by kind and name; generated names lose their hash."""
    built = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s" / "jobs" / "loadtest")], capture_output=True, text=True, check=True
    )
    found = {}
    for each in yaml.safe_load_all(built.stdout):
        name = each["metadata"]["name"]
        found[each["kind"], name.rsplit("-", 1)[0] if each["kind"] == "ConfigMap" else name] = each
    return found


def pods(objects):
    return {name: each["spec"]["template"] for (kind, name), each in objects.items() if kind == "Job"}


def test_every_pod_meets_the_restricted_pod_security_standard(objects):
    assert len(pods(objects)) == 2
    for template in pods(objects).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= {"configMap", "emptyDir"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert set(container["resources"]) == {"requests", "limits"}
            assert ":" in container["image"]


def test_pods_carry_the_labels_that_policies_and_services_select_them_by(objects):
    policy = objects["NetworkPolicy", "sentiment-inference-loadtest"]["spec"]["podSelector"]["matchLabels"]
    for template in pods(objects).values():
        labels = template["metadata"]["labels"]
        assert policy.items() <= labels.items()
        assert labels["sentiment-inference-client"] == "true"
    selector = objects["Service", "sentiment-inference-loadtest-master"]["spec"]["selector"]
    assert selector.items() <= pods(objects)["sentiment-inference-loadtest-master"]["metadata"]["labels"].items()


def test_locust_is_the_version_that_is_tested_here(objects):
    import importlib.metadata

    for template in pods(objects).values():
        for container in template["spec"]["containers"]:
            assert container["image"].split(":")[1] == importlib.metadata.version("locust")


def test_as_many_workers_are_expected_as_there_are(objects):
    options = objects["ConfigMap", "sentiment-inference-loadtest-options"]["data"]
    workers = objects["Job", "sentiment-inference-loadtest-worker"]["spec"]
    assert int(options["LOCUST_EXPECT_WORKERS"]) == workers["parallelism"] == workers["completions"]


def test_the_jobs_commands_run_with_the_jobs_files(objects, server, tmp_path):
    """As in the cluster but for names: its files, arguments and variables, a shorter shape, this server."""
    folder = tmp_path / "loadtest"
    folder.mkdir()
    for name, text in objects["ConfigMap", "sentiment-inference-loadtest-files"]["data"].items():
        (folder / name).write_text(text)
    options = objects["ConfigMap", "sentiment-inference-loadtest-options"]["data"]
    shorter = {"LOCUST_HOST": server.url, "LOADTEST_SHAPE_SECONDS": "5", "LOADTEST_PEAK": "30", "LOADTEST_BASE": "10"}
    port = free_port()

    def start(role):
        container = pods(objects)[f"sentiment-inference-loadtest-{role}"]["spec"]["containers"][0]
        here = {"/opt": str(tmp_path), "--master-host=sentiment-inference-loadtest-master": "--master-host=127.0.0.1"}
        arguments = container["args"]
        for old, new in here.items():
            arguments = [argument.replace(old, new) for argument in arguments]
        arguments.append(f"--master-bind-port={port}" if role == "master" else f"--master-port={port}")
        variables = {each["name"]: each["value"].replace("/opt", str(tmp_path)) for each in container["env"]}
        environment = {**os.environ, **options, **shorter, "LOADTEST_SLO_P95_MS": "20000", **variables}
        return subprocess.Popen(
            [sys.executable, "-m", "locust", *arguments],
            env={**environment, "HOME": str(tmp_path)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    processes = [start("master"), start("worker"), start("worker")]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(outputs)
    assert "objective held" in outputs[0]
