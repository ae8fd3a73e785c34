"""Many requests of every kind against the real server: memory stays flat, gauges return to zero, nothing fails.

A few hundred in the suite; `make soak` sends many more and looks at memory.
"""

import http.client
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.process import ServerProcess
from tests.text_model import NAME

CONNECTIONS = 6
# What resident memory may gain over two thirds of the requests: the allocator's unrest, whatever their number.
GROWTH_BYTES = 16 * 2**20
PATIENCE_SECONDS = 60
INFER = f"/v2/models/{NAME}/infer"
JSON = {"content-type": "application/json"}
WORDS = (
    "the kettle sings while our neighbour paints her fence a cheerful green and nobody minds that it drips on "
    "Monday we found seven odd socks under an old sofa which explains quite a lot about last winter"
).split()


class Visitor:
    """One client: a connection kept open, a repertoire of requests, and what came of them."""

    def __init__(self, port: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
        self.statuses: Counter[int] = Counter()
        self.abandoned = 0

    def text(self, words: int) -> str:
        """A sentence nobody sent before."""
        return " ".join([*self.chance.choices(WORDS, k=words), f"{self.chance.getrandbits(40):x}!"])

    def length(self) -> int:
        """Mostly short, sometimes longer than the model's window."""
        return int(min(400, self.chance.paretovariate(1.0) * 4))

    def ask(self, path: str, body: bytes, **headers: str) -> None:
        self.connection.request("POST", path, body, JSON | headers)
        response = self.connection.getresponse()
        response.read()
        self.statuses[response.status] += 1

    def single(self) -> None:
        self.ask("/predict", json.dumps({"text": self.text(self.length())}).encode())

    def batch(self) -> None:
        texts = [self.text(self.length()) for _ in range(self.chance.randint(1, 12))]
        self.ask("/predict/batch", json.dumps({"texts": texts}).encode())

    def protocol(self) -> None:
        texts = [self.text(self.length()) for _ in range(self.chance.randint(1, 4))]
        spec = {"name": "text", "shape": [len(texts)], "datatype": "BYTES"}
        if self.chance.random() < 0.5:
            self.ask(INFER, json.dumps({"inputs": [spec | {"data": texts}]}).encode())
            return
        raw = b"".join(len(part).to_bytes(4, "little") + part for part in (text.encode() for text in texts))
        spec["parameters"] = {"binary_data_size": len(raw)}
        header = json.dumps({"inputs": [spec], "parameters": {"binary_data_output": True}}).encode()
        self.ask(INFER, header + raw, **{"inference-header-content-length": str(len(header))})

    def invalid(self) -> None:
        path = self.chance.choice(["/predict", "/predict/batch", INFER, "/v2/models/another/infer"])
        bodies = [b"", b"{", b"[]", b'{"text": ""}', b'{"texts": [1]}', b'{"inputs": [{}]}', b"\xff" * 100]
        self.ask(path, self.chance.choice(bodies), **self.chance.choice([{}, {"content-encoding": "br"}]))
        # An error may close the connection; the next request opens it again.

    def abandon(self) -> None:
        """Sends a whole request or a part of one on a connection of its own, and leaves."""
        body = json.dumps({"texts": [self.text(self.length()) for _ in range(3)]}).encode()
        head = (
            f"POST /predict/batch HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        message = head.encode() + b"\r\n\r\n" + body
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS) as client:
            client.sendall(message[: self.chance.choice([20, len(message) - 5, len(message)])])
            if self.chance.random() < 0.5:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.abandoned += 1

    def visit(self, requests: int) -> None:
        kinds: list[Callable[[], None]] = [self.single, self.batch, self.protocol, self.invalid, self.abandon]
        for kind in self.chance.choices(kinds, [60, 8, 12, 12, 8], k=requests):
            kind()
        self.connection.close()


def visit(visitors: list[Visitor], requests: int) -> None:
    with ThreadPoolExecutor(len(visitors)) as pool:
        for visitor, outcome in [(v, pool.submit(v.visit, requests // len(visitors))) for v in visitors]:
            outcome.result()
            assert visitor.connection.sock is None


def settled(server: ServerProcess) -> dict[str, float]:
    """Waits until nothing is in flight; every inference request so far by status."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while True:
        samples = [
            sample
            for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
            for sample in family.samples
        ]
        gauges = {sample.name: sample.value for sample in samples if not sample.labels}
        if gauges["inference_requests_in_flight"] == gauges["inference_queue_rows"] == 0:
            break
        assert time.monotonic() < limit, "something is in flight for ever"
        time.sleep(0.01)
    counts: Counter[str] = Counter()
    for sample in samples:
        if sample.name == "inference_requests_total":
            counts[sample.labels["code"]] += sample.value
    return counts


def roam(requests: int) -> float:
    """Sends so many requests of every kind; nothing fails, everything is counted. Returns what memory gained, in bytes,
    over the last two thirds of them."""
    with ServerProcess(max_queue_wait_ms=600_000, request_timeout_ms=3_600_000).ready() as server:
        process = psutil.Process(server.process.pid)
        visitors = [Visitor(server.port, seed) for seed in range(CONNECTIONS)]
        # The largest batches on every runner at once: what the allocator needs at most, it needs from now on.
        largest = json.dumps({"texts": [visitors[0].text(400) for _ in range(24)]}).encode()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for outcome in [pool.submit(visitor.ask, "/predict/batch", largest) for visitor in visitors]:
                outcome.result()
        visit(visitors, requests // 3)
        settled(server)
        before, files = process.memory_info().rss, process.num_fds()
        visit(visitors, requests - requests // 3)
        counts = settled(server)
        grown = process.memory_info().rss - before
        assert process.num_fds() <= files + CONNECTIONS

        statuses = sum((visitor.statuses for visitor in visitors), Counter())
        assert {code: count for code, count in counts.items() if code.startswith("5") and count} == {}
        assert {code for code in statuses if code >= 500} == set()
        assert statuses[200] > requests // 2
        # Every answer was counted; a request that was left may have been answered before that was noticed.
        assert statuses[200] <= counts["200"] <= statuses[200] + sum(visitor.abandoned for visitor in visitors)
        for code in (400, 404, 415, 422):
            assert counts[str(code)] >= statuses[code] > 0
        assert {line["event"] for line in server.logs()}.isdisjoint({"unhandled"})
        assert server.errors() == ""
        server.terminate()
        assert server.wait() == 0
        return grown


def test_gauges_return_to_zero_and_nothing_fails_over_requests_of_every_kind() -> None:
    roam(600)


@pytest.mark.soak
def test_memory_stays_flat_over_many_requests(request: pytest.FixtureRequest) -> None:
    requests = request.config.getoption("--soak-requests")
    grown = roam(requests)
    print(f"{requests} requests: {grown / 2**20:+.1f} MiB resident")
    assert grown <= GROWTH_BYTES, f"{grown / 2**20:.1f} MiB more after {requests} requests"
