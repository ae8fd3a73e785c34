"""A real redis-server of a test's own, that can be killed and started again without losing what it confirmed."""

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import redis

from tests.manifests import tool

DEBIAN_PACKAGE = "apt-get install redis-server"


class RedisServer:
    """A context manager. Listens on a socket of the file system, since a port may be taken meanwhile; on a port too
    where one is given."""

    def __init__(self, *, port: int = 0, password: str = "") -> None:
        program = tool("redis-server", DEBIAN_PACKAGE)
        # Short: the path of a socket has at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))
        path = self._folder / "socket"
        self._command = [
            *(program, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(path)),
            *("--requirepass", password, "--dir", str(self._folder), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"),
        ]
        self.url = f"redis://:{password}@127.0.0.1:{port}/0" if port else f"unix://{path}"
        self.client = redis.Redis(unix_socket_path=str(path), password=password or None, protocol=2)
        self.start()

    def start(self) -> None:
        """Starts it, with all that it had."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert self.process.poll() is None, "redis-server has ended"
                time.sleep(0.01)

    def written(self) -> bytes:
        """Every change so far, as commands."""
        return b"".join(file.read_bytes() for file in sorted(self._folder.glob("appendonlydir/*.incr.aof")))

    def kill(self) -> None:
        """Ends it as a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "RedisServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.client.close()
        shutil.rmtree(self._folder, ignore_errors=True)
