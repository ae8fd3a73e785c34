"""What an image costs: `python3 docker/measure.py IMAGE`: its size, its time to ready, its memory. README's numbers.

Needs Linux, Podman or Docker, and the right to read the container's /proc entry (root, for a container of root's).
Standard library only. Memory is the resident set: what a cgroup's limit counts, and pages of files that it can reclaim.
"""

# ruff: noqa: S603 - it runs what it is told to
import argparse
import gzip
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFINED = ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=host"]
LIMITS = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
# What each load sends: from how many clients at once, how many rows, of how many words. The last ones fill the body
# and the queue that the default settings allow.
LOADS = [(1, 8, 200), (8, 8, 200), (1, 512, 16), (1, 512, 200), (1, 512, 1600), (4, 512, 1600), (8, 512, 1600)]
ROUNDS = 2


class Engine:
    """Podman or Docker, with flags for this machine."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __call__(self, *arguments: str) -> str:
        ended = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"measure: {' '.join([*self.command, *arguments])}: {ended.stderr.strip()}")
        return ended.stdout.strip()


def sizes(engine: Engine, image: str) -> tuple[int, int]:
    """Bytes of the image's files, and of its layers as a registry keeps them: gzip."""
    packed = gzip.GzipFile(fileobj=(counter := Counter()), mode="wb", compresslevel=6)
    with subprocess.Popen([*engine.command, "save", image], stdout=subprocess.PIPE) as saving:
        assert saving.stdout
        while chunk := saving.stdout.read(1 << 20):
            packed.write(chunk)
    packed.close()
    return int(engine("image", "inspect", "--format", "{{.Size}}", image)), counter.size


class Counter:
    """A file that only counts."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


class Running:
    """A container of the image, measured from outside."""

    def __init__(self, engine: Engine, image: str, flags: list[str]) -> None:
        self.engine = engine
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        settings = [f"--env=APP_PORT={self.port}", "--env=APP_REQUEST_TIMEOUT_MS=120000"]
        self.id = engine("create", *CONFINED, *LIMITS, *flags, *settings, image)
        started = time.monotonic()
        engine("start", self.id)
        self.pid = int(engine("inspect", "--format", "{{.State.Pid}}", self.id))
        self.first_mib = 0.0
        while self.ask("GET", "/ready") != 200:
            # The last look before it is ready: interpreter and libraries, the model not or only partly.
            if not self.first_mib and self.ask("GET", "/live") == 200:
                self.first_mib = self.memory("VmRSS")
            time.sleep(0.005)
        self.ready_seconds = time.monotonic() - started

    def ask(self, method: str, path: str, body: object = None) -> int:
        """The status; 0 if nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            headers = {"content-type": "application/json"} if body else {}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def memory(self, field: str) -> float:
        """MiB of a field of /proc/PID/status."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
        raise KeyError(field)

    def work(self, clients: int, rows: int, words: int) -> str:
        """Sends a load; says what it took."""
        body = {"texts": ["good " * words] * rows}
        with ThreadPoolExecutor(clients) as pool:
            statuses = list(pool.map(lambda _: self.ask("POST", "/predict/batch", body), range(clients * ROUNDS)))
        load = f"{clients} clients x {rows} rows x {words} words"
        if not Path(f"/proc/{self.pid}").exists():
            return f"{load}: killed (is the memory limit too low?)"
        answered = f"{statuses.count(200)} of {len(statuses)} answered"
        return f"{load}: peak {self.memory('VmHWM'):.0f} MiB, then {self.memory('VmRSS'):.0f} MiB; {answered}"

    def remove(self) -> None:
        self.engine("rm", "--force", self.id)


def main() -> None:
    """Command line of `python3 docker/measure.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--engine", default="podman", help="podman or docker, with flags: 'podman --runtime runc'")
    parser.add_argument("--flags", default="--memory=512m --cpus=2", help="of the container (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=5)
    args = parser.parse_args()
    engine, flags = Engine(args.engine.split()), args.flags.split()

    whole, compressed = sizes(engine, args.image)
    print(f"image: {whole / 1e6:.0f} MB, {compressed / 1e6:.0f} MB compressed")
    seconds = []
    for _ in range(args.starts):
        running = Running(engine, args.image, flags)
        seconds.append(running.ready_seconds)
        running.remove()
    low, high = min(seconds), max(seconds)
    print(f"start to ready: {statistics.median(seconds):.2f} s, {low:.2f} to {high:.2f} in {args.starts} starts")
    for load in LOADS:
        running = Running(engine, args.image, flags)
        if load is LOADS[0]:
            time.sleep(1)
            anonymous = running.memory("RssAnon")
            print(f"memory before the model is loaded: {running.first_mib:.0f} MiB")
            print(f"memory when ready: {running.memory('VmRSS'):.0f} MiB, of them not pages of files {anonymous:.0f}")
        print(running.work(*load), flush=True)
        running.remove()


if __name__ == "__main__":
    main()
