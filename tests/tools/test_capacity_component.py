"""The generated Kustomize components, built by the real kubectl with overlays that scale in each way."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
import yaml

from loadtest.capacity import component
from loadtest.capacity.schema import Derivation, Findings, Options, Report, Run
from tests.deploy.test_k8s_build import VERSIONS, canonical, check
from tests.process import ROOT

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: sentiment-inference}
spec:
  selector: {matchLabels: {a: b}}
  template:
    metadata: {labels: {a: b}}
    spec:
      containers:
        - name: server
          image: sentiment-inference:0.1.0
          resources:
            requests: {cpu: "1", memory: 64Mi, nvidia.com/gpu: "1"}
            limits: {cpu: "1", memory: 64Mi, nvidia.com/gpu: "1"}
"""
HPA = """
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: sentiment-inference}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: sentiment-inference}
  minReplicas: 1
  maxReplicas: 3
  metrics:
    - type: Resource
      resource: {name: cpu, target: {type: Utilization, averageUtilization: 50}}
  behavior: {scaleDown: {stabilizationWindowSeconds: 77}}
"""
SCALED = """
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {name: sentiment-inference}
spec:
  scaleTargetRef: {name: sentiment-inference}
  minReplicaCount: 1
  maxReplicaCount: 3
  triggers:
    - type: prometheus
      metadata: {serverAddress: "http://prometheus:9090", query: "sum(inference_requests_in_flight)", threshold: "99"}
"""
TARGETS = Derivation(
    delays=[],
    growth_factor=1.5,
    trigger_rps=800.0,
    target_rps=727.0,
    target_in_flight=2.9,
    target_cpu_percent=64,
    cpu_request_cores=1.9,
    cpu_limit_cores=2.0,
    memory_request_bytes=224 * 2**20,
    memory_limit_bytes=288 * 2**20,
    min_replicas=4,
    max_replicas=40,
    lines=[],
    notes=[],
)
REPORT = Report(
    run=Run("20260101T000000Z-abcdef", "http://server/predict", "2026-01-01 00:00 UTC", 100.0, "2 CPUs", "texts", {}),
    options=Options(),
    steps=[],
    open_loop=[],
    findings=Findings(1000.0, 16.0, 8.0, 950.0, 12.0, 980.0, 900.0, "cpu", "why", []),
    derivation=TARGETS,
)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)


@pytest.fixture
def overlay(tmp_path):
    """Makes an overlay of these objects and one generated component: `overlay("cpu", DEPLOYMENT, HPA)`."""

    def make(name: str, *objects: str, report: Report = REPORT) -> Path:
        component.write(report, tmp_path / "generated")
        folder = tmp_path / "overlay"
        folder.mkdir()
        names = [f"object{i}.yaml" for i in range(len(objects))]
        for file, text in zip(names, objects, strict=True):
            (folder / file).write_text(text)
        (folder / "kustomization.yaml").write_text(
            f"resources: [{', '.join(names)}]\ncomponents: [../generated/{name}]\n"
        )
        return folder

    return make


def test_cpu_sets_target_bounds_and_resources_and_leaves_the_rest(overlay):
    built = build(overlay("cpu", DEPLOYMENT, HPA))
    assert built.returncode == 0, built.stderr
    assert "averageUtilization: 64" in built.stdout
    assert "minReplicas: 4" in built.stdout
    assert "maxReplicas: 40" in built.stdout
    assert "stabilizationWindowSeconds: 77" in built.stdout
    assert "cpu: 1900m" in built.stdout
    assert "memory: 288Mi" in built.stdout
    assert built.stdout.count("nvidia.com/gpu") == 2
    assert "capacity-run: 20260101T000000Z-abcdef" in built.stdout


def test_inflight_scales_on_the_pods_metric_first_and_on_cpu_past_it(overlay):
    built = build(overlay("inflight", DEPLOYMENT, HPA))
    assert built.returncode == 0, built.stderr
    assert "name: inference_requests_in_flight" in built.stdout
    assert "averageValue: 2900m" in built.stdout
    assert "averageUtilization: 70" in built.stdout
    assert built.stdout.count("- pods:") == 1
    assert built.stdout.count("- resource:") == 1


def test_keda_sets_the_threshold_of_the_first_trigger_and_keeps_its_query(overlay):
    built = build(overlay("keda", DEPLOYMENT, SCALED))
    assert built.returncode == 0, built.stderr
    assert 'threshold: "2.9"' in built.stdout
    assert "query: sum(inference_requests_in_flight)" in built.stdout
    assert "minReplicaCount: 4" in built.stdout
    assert "maxReplicaCount: 40" in built.stdout


@pytest.mark.parametrize(("name", "objects"), [("keda", (DEPLOYMENT, HPA)), ("cpu", (DEPLOYMENT, SCALED))])
def test_a_component_for_another_way_to_scale_fails_instead_of_doing_nothing(overlay, name, objects):
    built = build(overlay(name, *objects))
    assert built.returncode != 0
    assert "sentiment-inference" in built.stderr


def test_every_file_names_the_run_and_what_was_wrong_with_it(tmp_path):
    noted = msgspec.structs.replace(REPORT.findings, warnings=["Other processes used 1.3 CPUs."])
    component.write(msgspec.structs.replace(REPORT, findings=noted), tmp_path)
    files = list(tmp_path.rglob("*.yaml"))
    assert len(files) == 12
    assert all("run 20260101T000000Z-abcdef" in file.read_text().splitlines()[0] for file in files)
    assert all("# Note: Other processes used 1.3 CPUs.\n" in file.read_text() for file in files)


def test_without_cpu_or_memory_seen_only_what_was_measured_is_set(overlay):
    blind = msgspec.structs.replace(
        TARGETS,
        target_cpu_percent=None,
        cpu_request_cores=None,
        cpu_limit_cores=None,
        memory_request_bytes=None,
        memory_limit_bytes=None,
    )
    folder = overlay("inflight", DEPLOYMENT, HPA, report=msgspec.structs.replace(REPORT, derivation=blind))
    assert not (folder.parent / "generated" / "cpu").exists()
    built = build(folder)
    assert built.returncode == 0, built.stderr
    assert "averageUtilization" not in built.stdout
    assert "memory: 64Mi" in built.stdout


def test_without_targets_nothing_is_written(tmp_path):
    assert component.write(msgspec.structs.replace(REPORT, derivation=None), tmp_path / "generated") == []
    assert not (tmp_path / "generated").exists()


@pytest.mark.parametrize(
    ("name", "components"),
    [("cpu", []), ("inflight", ["autoscale-inflight"]), ("keda", ["autoscale-keda"])],
)
def test_each_stands_on_the_projects_own_base(tmp_path, name, components):
    k8s = ROOT / "k8s"
    if not (k8s / "base").is_dir():
        pytest.skip("no k8s/base in this tree")
    component.write(REPORT, tmp_path / "generated")
    folder = tmp_path / "overlay"
    folder.mkdir()
    listed = [os.path.relpath(k8s / "components" / each, folder.resolve()) for each in components]
    listed.append(f"../generated/{name}")
    base = os.path.relpath(k8s / "base", folder.resolve())
    (folder / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{', '.join(listed)}]\n")
    built = build(folder)
    assert built.returncode == 0, built.stderr
    assert "capacity-run: 20260101T000000Z-abcdef" in built.stdout
    assert "1900m" in built.stdout


README = (ROOT / "k8s" / "README.md").read_text()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Objects of k8s/README's commands, run as they stand there, with another overlay or list of components."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    component.write(REPORT, folder / "capacity" / "component")
    (block,) = [text for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "k8s/measured" in text]
    # What follows needs a cluster.
    script = block[: block.index("kubectl diff")]

    def run(name: str, components: str, pool: str = "cpu") -> list[dict]:
        assert components in README
        text = script.replace("component/inflight", f"component/{name}").replace("overlays/cpu", f"overlays/{pool}")
        text = text.replace("[../components/autoscale-inflight, inflight]", components)
        text = text.replace("sentiment-inference\n", f"sentiment-inference{'-gpu' if pool == 'gpu' else ''}\n", 1)
        done = subprocess.run(["sh", "-e"], input=text, cwd=folder, capture_output=True, text=True, check=False)
        shutil.rmtree(folder / "k8s" / "measured")
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return run


@pytest.mark.parametrize(
    ("name", "components", "pool"),
    [
        ("cpu", "[cpu]", "cpu"),
        ("inflight", "[../components/autoscale-inflight, inflight]", "cpu"),
        ("keda", "[../components/autoscale-keda, keda]", "cpu"),
        ("inflight", "[inflight]", "gpu"),
        ("keda", "[../components/autoscale-keda, keda]", "gpu"),
    ],
)
def test_the_readme_puts_it_on_an_overlay_and_only_what_was_measured_changes(measured, name, components, pool):
    objects = measured(name, components, pool)
    scaler = next(each for each in objects if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"))
    suffix = "Count" if name == "keda" else "s"
    # Not the overlay's own.
    assert (scaler["spec"][f"minReplica{suffix}"], scaler["spec"][f"maxReplica{suffix}"]) == (4, 40)
    assert scaler["metadata"]["annotations"][component.ANNOTATION] == REPORT.run.id
    text = yaml.safe_dump(scaler["spec"])
    assert {"cpu": "averageUtilization: 64", "inflight": "averageValue: 2900m", "keda": "threshold: '2.9'"}[
        name
    ] in text
    namespaces = {each["metadata"].get("namespace") for each in objects if each["kind"] != "Namespace"}
    assert namespaces == {f"sentiment-inference{'-gpu' if pool == 'gpu' else ''}"}
    for each in objects:
        for version in VERSIONS:
            check(canonical(each), version)


def test_bounds_that_are_guesses_say_so_and_measured_ones_do_not(tmp_path):
    component.write(REPORT, tmp_path / "guessed")
    options = Options(base_rps=100.0, peak_rps=900.0)
    component.write(msgspec.structs.replace(REPORT, options=options), tmp_path / "given")
    for file in ("cpu/hpa.yaml", "keda/scaledobject.yaml"):
        guessed = (tmp_path / "guessed" / file).read_text()
        assert "guess: --base-rps was not given" in guessed
        assert "guess: --peak-rps was not given" in guessed
        assert "guess" not in (tmp_path / "given" / file).read_text()
