"""The CPU image as Kubernetes runs it: read-only, no capabilities, not root, little memory.

`make image-test` runs these: they need Podman, and an image named by TEST_IMAGE with the model of tests.text_model.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import pytest

from tests.process import ROOT
from tests.text_model import NAME, VERSION, text_model

IMAGE = os.environ.get("TEST_IMAGE", "")
pytestmark = pytest.mark.skipif(not IMAGE, reason="TEST_IMAGE names no image: `make image-test` builds one")

START_SECONDS = 60
MEMORY = "512m"
# What the restricted Pod Security Standard asks for, and a limit on everything else.
CONFINED = (
    "--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges",
    "--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--no-healthcheck",
)  # fmt: skip


def podman(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    command = ["podman", *runtime(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


@cache
def runtime() -> tuple[str, ...]:
    """Podman's default OCI runtime if it starts a container here; crun refuses a machine with both cgroup versions."""
    start = ("run", "--rm", *CONFINED, "--entrypoint=true", IMAGE)
    tried = []
    for choice in ((), ("--runtime=runc",)):
        attempt = subprocess.run(["podman", *choice, *start], capture_output=True, text=True, timeout=120, check=False)
        if attempt.returncode == 0:
            return choice
        tried.append(attempt.stderr.strip())
    raise AssertionError(f"Podman starts no container here: {tried}")


@cache
def memory_limit() -> tuple[str, ...]:
    """`--memory`, if this machine's cgroups enforce it."""
    flag = (f"--memory={MEMORY}",)
    if podman("run", "--rm", *CONFINED, *flag, "--entrypoint=true", IMAGE).returncode == 0:
        return flag
    print("this machine's cgroups take no memory limit: the container runs without one")
    return ()


class Container:
    """The image's own entry point, confined, on a port the kernel picks."""

    def __init__(self, *flags: str, **settings: object) -> None:
        environment = [f"--env=APP_{name.upper()}={value}" for name, value in {"port": 0, **settings}.items()]
        started = podman("run", "--detach", *CONFINED, *memory_limit(), *flags, *environment, IMAGE)
        assert started.returncode == 0, started.stderr
        self.id = started.stdout.strip()

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        podman("rm", "--force", "--time=0", self.id)

    def inspect(self) -> dict:
        return json.loads(podman("inspect", self.id).stdout)[0]

    def output(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        logs = podman("logs", self.id)
        return logs.stdout, logs.stderr

    def ready(self) -> "Container":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.inspect()["State"]["Running"], self.output()
            if port := re.search(r'"port":(\d+).*"event":"listening"', self.output()[0]):
                self.url = f"http://127.0.0.1:{port[1]}"
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"not ready after {START_SECONDS} s: {self.output()}")

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        return podman("exec", self.id, *command)

    def wait(self) -> int:
        """Its exit code."""
        return int(podman("wait", self.id, seconds=START_SECONDS).stdout)

    def in_flight(self) -> bool:
        text = httpx.get(f"{self.url}/metrics").text
        return re.search(r"^inference_requests_in_flight [1-9]", text, re.MULTILINE) is not None


@pytest.fixture(scope="module")
def server() -> Iterator[Container]:
    with Container() as container:
        yield container.ready()


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads(podman("image", "inspect", IMAGE).stdout)[0]


def test_it_predicts(server):
    answer = httpx.post(f"{server.url}/predict", json={"text": "What a lovely little café 😍"})
    assert answer.status_code == 200
    assert answer.json()["label"] == "positive"
    assert answer.headers["x-model"] == f"{NAME}/{VERSION}"


def test_its_processes_are_not_root_and_have_no_capabilities(server):
    status = server.exec("cat", "/proc/1/status").stdout
    assert re.search(r"^Uid:\s+10001\s+10001\s+10001\s+10001$", status, re.MULTILINE)
    assert re.search(r"^Gid:\s+10001\s+10001\s+10001\s+10001$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)


# /dev has its own rules: Podman gives /dev/shm and /dev/mqueue to every container.
WRITABLE = """
import os, pathlib
for place in ("/", "/tmp", "/var/tmp", "/run", "/srv", "/models/current", "/opt/venv", "/home"):
    if os.path.isdir(place):
        try:
            pathlib.Path(place, "probe").write_text("")
            print(place)
        except OSError:
            pass
"""


def test_it_serves_without_a_writable_path(server):
    assert server.exec("python", "-c", "print('runs')").stdout == "runs\n"
    assert server.exec("python", "-c", WRITABLE).stdout == ""


def test_its_memory_is_limited(server):
    if not memory_limit():
        pytest.skip("this machine's cgroups take no memory limit")
    assert server.inspect()["HostConfig"]["Memory"] == 512 * 1024**2
    assert server.inspect()["State"]["OOMKilled"] is False


def test_its_health_check_passes_when_it_is_ready(server, config):
    kind, *command = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    port = server.url.rpartition(":")[2]
    assert podman("exec", f"--env=APP_PORT={port}", server.id, *command).returncode == 0
    # Nothing listens on port 1: the check can fail.
    assert podman("exec", "--env=APP_PORT=1", server.id, *command).returncode != 0


@pytest.mark.parametrize("tool", ["pip", "pip3", "gcc", "cc", "make", "git", "curl"])
def test_it_has_no_tool_that_serving_does_not_need(server, tool):
    assert server.exec("python", "-c", f"import shutil; print(shutil.which({tool!r}))").stdout == "None\n"


def test_it_has_no_installer_even_as_a_module(server):
    assert "No module named pip" in server.exec("python", "-m", "pip", "--version").stderr


def test_no_build_secret_is_left_in_it(server):
    assert server.exec("ls", "/etc/pip.conf", "/run/secrets/ca.pem").stdout == ""


def test_every_module_was_compiled_when_it_was_built(server):
    script = (
        "import sys, app.main, model.verify\n"
        "modules = [m for m in list(sys.modules.values()) if (getattr(m, '__file__', None) or '').endswith('.py')]\n"
        "import os\n"
        "own = [m for m in modules if m.__file__.startswith(('/srv/', '/opt/venv/'))]\n"
        "print(len(own) > 100, [m.__name__ for m in own if not os.path.exists(m.__cached__ or '')])\n"
    )
    assert server.exec("python", "-c", script).stdout == "True []\n"


def test_the_gate_can_be_run_in_it(server):
    verified = server.exec("python", "-m", "model.verify", "/models/current")
    assert verified.returncode == 0
    assert f"{NAME} {VERSION} passes on cpu" in verified.stdout


def test_its_labels_say_what_is_in_it(config, server):
    digest = server.exec("sha256sum", "/models/current/manifest.json").stdout.split()[0]
    labels = config["Labels"]
    assert labels["sentiment-inference.model.name"] == NAME
    assert labels["sentiment-inference.model.version"] == VERSION
    assert labels["sentiment-inference.model.digest"] == digest
    version = server.exec("python", "-c", "import app; print(app.__version__)").stdout.strip()
    assert labels["org.opencontainers.image.version"] == version
    revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == revision


def test_its_bom_has_what_its_file_system_has_and_its_label_that_bom_s_digest(config):
    path = ROOT / "sbom" / "cpu.cdx.json"
    assert config["Labels"]["sentiment-inference.sbom.digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
    components = {each["name"]: each for each in json.loads(path.read_text())["components"]}
    assert components["libc6"]["purl"].startswith("pkg:deb/debian/libc6@")
    assert components[NAME]["type"] == "machine-learning-model"
    for name in ("numpy", "onnxruntime", "cryptography", "redis"):
        # The lock's hashes, of what is installed.
        assert components[name]["externalReferences"], name
        assert {"name": "syft:package:type", "value": "python"} in components[name]["properties"]


def test_built_twice_on_bases_of_the_same_content_it_has_the_same_layers():
    def layers(image: str) -> list[str]:
        return json.loads(podman("image", "inspect", image).stdout)[0]["RootFS"]["Layers"]

    # Above the base: pip taken away, libraries, model, code.
    assert layers(IMAGE)[-4:] == layers(f"{IMAGE}-again")[-4:]
    assert layers(IMAGE) != layers(f"{IMAGE}-again")


def test_its_user_is_a_number_and_it_stops_on_sigterm(config):
    assert config["Config"]["User"] == "10001:10001"
    assert config["Config"]["StopSignal"] == "SIGTERM"


def test_it_runs_as_any_user():
    with Container("--user=123456:0") as container:
        container.ready()


def test_sigterm_drains_and_the_exit_code_is_0():
    rows = 256
    with Container() as container, ThreadPoolExecutor(1) as pool:
        container.ready()
        texts = ["a film that is neither good nor bad, and rather long " * 5] * rows
        answer = pool.submit(httpx.post, f"{container.url}/predict/batch", json={"texts": texts}, timeout=60)
        while not container.in_flight():
            assert not answer.done(), "answered before it could be drained: send more rows"
        assert podman("kill", "--signal=TERM", container.id).returncode == 0
        assert container.wait() == 0
        assert answer.result().status_code == 200
        assert len(answer.result().json()["predictions"]) == rows
        assert container.output()[1] == ""


def flip_a_bit(folder: Path) -> None:
    middle = (folder / "model.onnx").stat().st_size // 2
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def take_away(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(flip_a_bit, "/mounted/model.onnx: sha256 mismatch"), (take_away, "/mounted/tokenizer.json: cannot be read")],
    ids=["one bit", "missing file"],
)
def test_a_damaged_mounted_model_is_exit_code_3_and_one_line(tmp_path, damage: Callable[[Path], None], says):
    folder = tmp_path / "model"
    shutil.copytree(text_model(), folder)
    damage(folder)
    with Container(f"--volume={folder}:/mounted:ro", model_dir="/mounted") as container:
        assert container.wait() == 3
        (line,) = container.output()[1].splitlines()
        assert says in line


def test_a_good_mounted_model_is_served(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(text_model(), folder)
    with Container(f"--volume={folder}:/mounted:ro", model_dir="/mounted") as container:
        container.ready()


def test_a_bad_setting_is_exit_code_2_and_one_line():
    with Container(runners="none") as container:
        assert container.wait() == 2
        (line,) = container.output()[1].splitlines()
        assert "APP_RUNNERS='none'" in line
