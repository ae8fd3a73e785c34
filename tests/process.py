"""The real server in a process of its own, on a port the kernel picks, as users run it."""

import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import httpx

from app.http.connection.limits import BEAT_SECONDS, BEATS
from tests.text_model import text_model

# Reading all the authorities that a system trusts would take longer than most requests here.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
ROOT = Path(__file__).parent.parent
START_SECONDS = 60


WARNS = """
import sys, warnings

class Importing:
    def find_spec(name, *_):
        if name == "uvicorn":
            warnings.warn("a library is imported")

def opening(event, arguments):
    if event == "open" and str(arguments[0]).endswith("manifest.json"):
        warnings.warn("a library is at work")

sys.meta_path.insert(0, Importing)
sys.addaudithook(opening)
"""


def warning_libraries(folder: Path) -> dict[str, str]:
    """Environment, with a file in `folder`, in which libraries warn: when uvicorn is imported, and when a manifest is
    opened."""
    (folder / "sitecustomize.py").write_text(WARNS)
    return {"PYTHONPATH": str(folder), "PYTHONWARNINGS": "always"}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def await_beats(port: int) -> None:
    """Until the server's event loop has had the time, and the turns, in which a client may say that it has sent all."""
    for _ in range(BEATS):
        time.sleep(2 * BEAT_SECONDS)
        assert httpx.get(f"http://127.0.0.1:{port}/live", verify=NO_TLS).status_code == 200


class ServerProcess:
    """`python -m app`, or another module, with the given settings, as a context manager; `logs()` and `errors()` have
    what it wrote."""

    # Settings of every server that does not say otherwise.
    defaults: ClassVar[dict[str, object]] = {}

    def __init__(
        self,
        model_dir: Path | None = None,
        *,
        module: str = "app",
        cwd: Path = ROOT,
        output: int | Literal["closed"] | None = None,
        environment: Mapping[str, str] | None = None,
        max_files: int | None = None,
        **settings: object,
    ) -> None:
        """model_dir: the artifact, by default the one of tests.text_model.

        output: a descriptor for its standard output, if not a file; `logs()` is empty then, so say which `port`.

        environment: variables besides the settings. max_files: that it may have open at once.
        """
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("APP_", "OTEL_"))}
        chosen = {
            "APP_PROVIDER": "cpu",
            "APP_HOST": "127.0.0.1",
            "APP_PORT": "0",
            "APP_MODEL_DIR": str(model_dir or text_model()),
        }
        chosen |= {f"APP_{name.upper()}": str(value) for name, value in (self.defaults | settings).items()}
        # Closed with the process, in __exit__.
        self._out = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self._err = tempfile.TemporaryFile("w+b")  # noqa: SIM115

        def prepare() -> None:
            if output == "closed":
                os.close(1)
            if max_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))

        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=cwd,
            env={**clean, **chosen, **(environment or {})},
            stdout=output if isinstance(output, int) else self._out,
            stderr=self._err,
            preexec_fn=prepare,
        )
        port = settings.get("port")
        self._port = port if isinstance(port, int) and port else None

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._out.close()
        self._err.close()

    @property
    def port(self) -> int:
        """The port it listens on, from its own log line."""
        while self._port is None:
            for line in self.logs():
                if line.get("event") == "listening":
                    self._port = line["port"]
            self._still_running()
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> httpx.Response:
        """An answer on a connection of its own."""
        return httpx.get(self.url + path, verify=NO_TLS, timeout=START_SECONDS)

    def ready(self) -> "ServerProcess":
        """Waits until /ready answers 200."""
        with httpx.Client(verify=NO_TLS) as client:
            while True:
                try:
                    if client.get(f"{self.url}/ready").status_code == 200:
                        return self
                except httpx.TransportError:
                    pass
                self._still_running()

    def wait(self, seconds: float = START_SECONDS) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def output(self) -> str:
        """All of standard output so far."""
        self._out.flush()
        return Path(f"/proc/self/fd/{self._out.fileno()}").read_text()

    def logs(self) -> list[dict]:
        """Its JSON log lines so far; a line half-written is left out."""
        lines = self.output().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def request_log(self, request_id: str) -> dict:
        """The one line of a request; it is written after the answer, so it may take a moment."""
        while True:
            lines = [line for line in self.logs() if line.get("request_id") == request_id]
            if lines:
                assert len(lines) == 1, lines
                return lines[0]
            self._still_running()

    def errors(self) -> str:
        """All of standard error so far."""
        return Path(f"/proc/self/fd/{self._err.fileno()}").read_text()

    def metric(self, name: str, **labels: str) -> float:
        """One sample from /metrics; 0.0 if it is not there."""
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items()):
                    return sample.value
        return 0.0

    def _still_running(self) -> None:
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}: {self.errors()}")
        time.sleep(0.02)
