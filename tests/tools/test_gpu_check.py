"""`python -m loadtest.benchmark.gpu_check` as people run it, on a CPU; and what it makes of what a GPU says."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loadtest.benchmark import gpu_sections, gpu_use
from loadtest.benchmark.gpu_check import SHARES, measure, shown
from loadtest.benchmark.gpu_sections import SECTIONS, Unmeasured, Work, Wrong, agreement, placed
from loadtest.benchmark.gpu_use import Gpus
from loadtest.benchmark.server import service, serving
from tests import onnx_models
from tests.process import ROOT
from tests.text_model import text_model

# The gpu extra has none of these.
WITHOUT_DEV = """
import sys
sys.modules.update(dict.fromkeys(["psutil", "onnx", "httpx", "locust", "tqdm", "matplotlib", "yaml"]))
"""
CUDA = "CUDAExecutionProvider"
QUICK = ("--seconds", "3600", "--load-seconds", "0.3")


def gpu_check(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess, dict]:
    """What it wrote, and its report. Loads are short, and nothing is out of time on any machine."""
    (folder / "sitecustomize.py").write_text(WITHOUT_DEV)
    out = folder / "out" / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.benchmark.gpu_check", *map(str, arguments), *("--out", out), *QUICK],
        cwd=ROOT,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads(out.read_text()) if out.exists() else {}


def work(**fields: object) -> Work:
    folder = str(text_model())
    return Work(**{"provider": "cpu", "artifact": folder, "cpu_artifact": folder, "load_seconds": 0.1} | fields)


def test_without_a_gpu_the_rest_is_measured_with_what_the_gpu_extra_brings(tmp_path):
    model = text_model()
    done, report = gpu_check(tmp_path, "--provider", "cpu", "--artifact", model, "--cpu-artifact", model)

    assert (done.returncode, done.stderr) == (0, "")
    found = report["sections"]
    assert list(found) == list(SHARES)
    assert set(found["gate"]["seconds"]) == {"verifying", "loading", "warming"}
    assert found["provider"]["nodes on each"].keys() == {"CPUExecutionProvider"}
    assert found["agreement"]["label, equal share"] == 1
    assert found["gpu"]["unmeasured"] == found["bound"]["unmeasured"] == "needs CUDA"
    assert found["session"]["rows/s, batch 128"].keys() == {"length 16", "length 64", "length 256"}
    served = found["server"]
    for name in ("one connection", *(f"APP_HTTP_PROCESSES={n}" for n in (1, 2, 4, 8))):
        assert served[name]["req/s"] > 0
        assert served[name]["/session"] == pytest.approx(served[name]["req/s"] / found["session"]["best rows/s"])
    assert sum(name.startswith("APP_RUNNERS=") for name in served) == 2
    assert not any("wrong" in section for section in found.values())
    assert "nothing that was measured is wrong" in done.stdout
    assert "UNMEASURED: needs CUDA" in done.stdout


def test_a_tensor_model_is_measured_with_random_tensors(tmp_path, package):
    model = package(onnx_models.mlp)
    only = ("--only", "agreement", "session")
    done, report = gpu_check(tmp_path, "--provider", "cpu", "--artifact", model, "--cpu-artifact", model, *only)

    assert (done.returncode, done.stderr) == (0, "")
    found = report["sections"]
    assert list(found) == ["gate", "agreement", "session"]
    assert found["agreement"]["scores, difference"]["largest"] < 1e-5
    assert found["session"]["rows/s, batch 32"].keys() == {"length 1"}
    with serving(service(model)) as running:
        inputs = gpu_sections.inputs_of(running, work(artifact=str(model)))
        load = gpu_sections.client(0, running, inputs, 2, 0.1)
    assert load["requests_per_second"] > 0
    assert load["refused_per_second"] == 0


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="there is a GPU")
def test_without_a_gpu_and_without_a_stand_in_one_line_says_what_is_missing(tmp_path):
    done, report = gpu_check(tmp_path, "--artifact", text_model())

    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert "missing: an NVIDIA device (/dev/nvidia0), the driver (libcuda.so.1)" in done.stderr
    assert report["unavailable"] in done.stderr


def test_a_folder_without_an_artifact_is_wrong_usage(tmp_path):
    done, _ = gpu_check(tmp_path, "--artifact", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere" in done.stderr


def test_answers_that_differ_are_wrong_and_the_rest_goes_on(tmp_path, package):
    model, other = package(onnx_models.mlp), package(lambda path: onnx_models.mlp(path, classes=4))
    only = ("--only", "agreement", "gpu")
    done, report = gpu_check(tmp_path, "--provider", "cpu", "--artifact", model, "--cpu-artifact", other, *only)

    assert done.returncode == 1
    assert "expected a mean difference" in report["sections"]["agreement"]["wrong"]
    assert "unmeasured" in report["sections"]["gpu"]
    assert done.stdout.endswith("wrong: agreement\n")


def test_other_labels_are_wrong(monkeypatch):
    labels = iter([["good", "bad"], ["good", "good"]])
    monkeypatch.setattr(
        gpu_sections, "answers", lambda *_: [{"label": np.array([each], np.object_)} for each in next(labels)]
    )
    with pytest.raises(Wrong, match=r"label: expected at least 0\.9 of the answers to be equal"):
        list(agreement(work()))


def test_a_section_that_is_out_of_time_is_stopped_and_says_so():
    found = measure(work(section="session", seconds=0.1))
    assert found["unmeasured"].startswith("stopped after")


def test_a_section_that_cannot_run_says_why_in_one_line(tmp_path):
    found = measure(work(section="gate", seconds=600, artifact=str(tmp_path)))
    assert found["wrong"].startswith("ArtifactError: ")
    assert "\n" not in found["wrong"]
    assert f"  WRONG: {found['wrong']}" in shown("gate", found)


def test_what_a_server_said_before_it_ended_is_in_the_report(tmp_path):
    # It is an artifact for whoever reads its manifest, and none for the gate.
    (tmp_path / "manifest.json").write_bytes((text_model() / "manifest.json").read_bytes())
    found = measure(work(section="server", seconds=600, artifact=str(tmp_path)))
    assert "ended with 3" in found["wrong"]
    assert "model.onnx" in found["wrong"]


def test_every_section_has_a_share_of_the_time():
    assert SECTIONS.keys() == SHARES.keys()


def node(name: str, provider: str) -> dict:
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": name, "provider": provider}}


def test_nodes_are_counted_once_by_the_provider_that_ran_them():
    events = [node("MatMul", CUDA), node("MatMul", CUDA), node("Gather", "CPUExecutionProvider")]
    events += [{"cat": "Node", "name": "MatMul_fence_before", "args": {"op_name": "MatMul"}}, {"cat": "Session"}]
    nodes, elsewhere = placed(events, CUDA)
    assert nodes == {CUDA: 1, "CPUExecutionProvider": 1}
    assert elsewhere == {"Gather": 1}


def test_a_model_whose_nodes_stay_on_the_cpu_is_wrong(monkeypatch):
    monkeypatch.setattr(gpu_sections, "PROVIDERS", {"cpu": "CPUExecutionProvider", "cuda": "AzureExecutionProvider"})
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    with pytest.raises(Wrong, match="expected most nodes on Azure"):
        list(gpu_sections.provider(work(provider="cuda")))


class Nvml(SimpleNamespace):
    """Two GPUs, of which one is a slice that does not tell its utilisation."""

    class NVMLError(Exception):
        pass

    used = (1000, 24)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, index: int) -> str:
        return f"GPU {index}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "595.1"

    def nvmlDeviceGetMemoryInfo(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(used=self.used[index])

    def nvmlDeviceGetUtilizationRates(self, index: int) -> SimpleNamespace:
        if index:
            raise self.NVMLError
        return SimpleNamespace(gpu=70)


def test_gpus_are_summed_and_the_most_is_kept(monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Gpus() as gpus:
        assert gpus.used_bytes() == 1024
        assert gpus.utilization_percent() == 70
        nvml.used = (3000, 24)
    assert (gpus.peak_bytes, gpus.peak_utilization_percent) == (3024, 70)


def test_where_nvml_does_not_answer_that_is_not_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Unmeasured, match=r"NVML: .*pynvml"):
        Gpus()


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU as far as NVML goes, and a CUDA that is the CPU."""
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_sections, "create_context", lambda: setattr(nvml, "used", (5000, 24)))
    load_model = gpu_sections.load_model

    def loaded(folder: Path, **_: object):
        nvml.used = (nvml.used[0] + nvml.adds, 24)
        return load_model(folder)

    monkeypatch.setattr(gpu_sections, "load_model", loaded)
    return nvml


def test_memory_of_the_context_and_of_the_model_is_what_each_adds(a_gpu):
    a_gpu.adds = 6_000_000
    found = dict(gpu_sections.gpu(work(provider="cuda", seconds=1)))
    assert found["GPUs, driver"] == ["GPU 0", "GPU 1", "595.1"]
    assert found["CUDA context, MB"] == pytest.approx(0.004)
    assert found["with the model after its largest batch, MB"] == pytest.approx(6.004)
    assert found["while it runs"]["busy %"] == 70


def test_a_model_that_takes_no_memory_of_the_gpu_is_wrong(a_gpu):
    a_gpu.adds = -4000
    with pytest.raises(Wrong, match="more GPU memory"):
        list(gpu_sections.gpu(work(provider="cuda", seconds=1)))


def test_what_is_missing_names_each_part(monkeypatch):
    monkeypatch.setattr(gpu_use, "Path", lambda *_: SimpleNamespace(glob=lambda _: [], exists=lambda: False))
    monkeypatch.setattr(gpu_use.ctypes, "CDLL", lambda *_: (_ for _ in ()).throw(OSError("no such file")))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert gpu_use.missing() == [
        "an NVIDIA device (/dev/nvidia0)",
        "the driver (libcuda.so.1)",
        "the onnxruntime-gpu wheel (extra gpu)",
    ]
