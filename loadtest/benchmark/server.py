"""Servers as processes of their own on a port of this machine: start, wait until ready, CPU and memory, end. Knows no
load.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from app.artifact.manifest import read_artifact
from app.errors import ArtifactError
from app.settings import Settings

ROOT = Path(__file__).parent.parent.parent
# What the server serves by itself.
SERVED = str(ROOT / Settings.model_fields["model_dir"].default)
HOST = "127.0.0.1"


def any_artifact(folder: str) -> Path:
    """An option's value: an artifact's folder. Raises ArgumentTypeError if it is none."""
    try:
        return read_artifact(Path(folder)).folder
    except ArtifactError as error:
        raise ArgumentTypeError(str(error)) from None


def text_artifact(folder: str) -> Path:
    """An option's value: what is measured here is sentences. Raises ArgumentTypeError if the model takes none."""
    task = read_artifact(any_artifact(folder)).manifest.task
    if task != "text-classification":
        raise ArgumentTypeError(f"{folder}: expected a text-classification model, found {task}; make load measures any")
    return Path(folder)


@dataclass(frozen=True)
class Command:
    """How to start a server; `{port}` in arguments and environment stands for the port it gets."""

    arguments: Sequence[str]
    ready_path: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Running:
    """A server process and its workers, as /proc has them: where a GPU is checked, psutil need not be installed."""

    pid: int
    port: int
    ready_seconds: float

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def processes(self) -> dict[int, list[str]]:
        """By their ids, what /proc/PID/stat says of each from its state on. The first has the model."""
        stats = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended
                stats[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        found = [self.pid]
        for pid in found:
            found += [child for child, stat in stats.items() if int(stat[1]) == pid]
        return {pid: stats[pid] for pid in found}

    def cpu_seconds(self) -> list[float]:
        """Of each process, in user and kernel mode."""
        return [(int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") for stat in self.processes().values()]

    def peak_bytes(self) -> int:
        """Largest resident size so far, summed over processes."""
        lines = [line for pid in self.processes() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def service(artifact: Path, **settings: object) -> Command:
    """This server."""
    chosen = {"model_dir": artifact, "provider": "cpu", "host": HOST, "port": "{port}"} | settings
    return Command(
        [sys.executable, "-m", "app"], "/ready", {f"APP_{name.upper()}": str(value) for name, value in chosen.items()}
    )


def floor() -> Command:
    """The web floor, with the service's own server and options."""
    options = ("--loop", "uvloop", "--http", "httptools", "--no-server-header")
    return _uvicorn("loadtest.benchmark.floor:app", 1, "/", {}, *options)


def plain(artifact: Path, workers: int) -> Command:
    """The script everybody writes."""
    return _uvicorn("loadtest.benchmark.plain:app", workers, "/docs", {"PLAIN_MODEL_DIR": str(artifact)})


def _uvicorn(app: str, workers: int, ready_path: str, environment: dict[str, str], *options: str) -> Command:
    base = [sys.executable, "-m", "uvicorn", app, "--host", HOST, "--port", "{port}", "--workers", str(workers)]
    return Command([*base, "--log-level", "warning", "--no-access-log", *options], ready_path, environment)


@contextmanager
def serving(command: Command, end_seconds: float = 30.0) -> Iterator[Running]:
    """Starts a server, waits until its ready path answers, ends it: for good where that takes longer than it may."""
    port = free_port()
    arguments = [part.replace("{port}", str(port)) for part in command.arguments]
    environment = {name: value.replace("{port}", str(port)) for name, value in command.environment.items()}
    started = time.perf_counter()
    process = subprocess.Popen(
        arguments, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not _answers(f"http://{HOST}:{port}{command.ready_path}"):
            if process.poll() is not None:
                raise RuntimeError(f"{arguments} ended with {process.returncode}")
            time.sleep(0.005)
        yield Running(process.pid, port, time.perf_counter() - started)
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(end_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def _answers(url: str) -> bool:
    """A 404 or 405 will do for a server without a readiness route."""
    try:
        urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - a loopback address made above
    except urllib.error.HTTPError as error:
        return error.code in (404, 405)
    except OSError:
        return False
    return True
