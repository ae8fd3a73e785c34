"""Jobs through a real redis-server: a gateway and workers in processes of their own, ended in every way there is."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests import onnx_models
from tests.process import NO_TLS, START_SECONDS, ServerProcess, free_port
from tests.redis_server import RedisServer
from tests.text_model import SLOW, text_model

TEXTS = (["a fine day"], ["an awful day", "good"], ["bad", "the heron waits", "excellent"])
# With a slow model a job of as many texts takes seconds, so that a worker is found at it.
MANY = ["a fine day"] * 4000
JSON = {"content-type": "application/json"}
LEASE_SECONDS = 1
FOR_EVER_SECONDS = 3600
WORKER = {"module": "app.worker"}
WORKERS = 2


def until(holds: Callable[[], object], seconds: float = 2 * START_SECONDS) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "not reached"
        time.sleep(0.02)


class Jobs:
    """A queue, its gateway, and a way to start workers."""

    def __init__(self, redis: RedisServer, stack: ExitStack) -> None:
        self.redis, self._stack = redis, stack
        self.gateway = self._start(role="gateway", model_dir="/nowhere").ready()
        self.client = stack.enter_context(httpx.Client(base_url=self.gateway.url, verify=NO_TLS, timeout=START_SECONDS))

    def _start(self, module: str = "app", **settings: object) -> ServerProcess:
        settings = {"queue_url": self.redis.url, "model_dir": text_model()} | settings
        return self._stack.enter_context(ServerProcess(module=module, **settings))  # type: ignore[arg-type]

    def worker(self, products: int = 0, **settings: object) -> ServerProcess:
        """Ready, with a short lease unless `settings` say otherwise."""
        chosen = {"job_lease_seconds": LEASE_SECONDS, "model_dir": text_model(products)} | settings
        return self._start("app.worker", **chosen).ready()

    def submit(self, texts: list[str], key: str | None = None) -> str:
        answer = self.client.post(
            "/jobs", json={"texts": texts}, headers={"idempotency-key": key} if key is not None else {}
        )
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
        return answer.json()["id"]

    def answer(self, job_id: str) -> dict:
        return self.client.get(f"/jobs/{job_id}").json()

    def status(self, job_id: str) -> str:
        return self.answer(job_id)["status"]

    def results_written(self) -> int:
        """How often any result was written, as Redis' own log of commands has it."""
        return self.redis.written().count(b"\r\n$6\r\nstatus\r\n")


@pytest.fixture
def jobs(redis_server: RedisServer) -> Iterator[Jobs]:
    with ExitStack() as stack:
        yield Jobs(redis_server, stack)


def jobs_logged(worker: ServerProcess, status: str) -> list[dict]:
    return [line for line in worker.logs() if line.get("event") == "job" and line["status"] == status]


def test_every_job_is_answered_once_whatever_is_killed(jobs: Jobs, pytestconfig: pytest.Config) -> None:
    count = pytestconfig.getoption("--jobs")
    with ServerProcess() as server:
        expected = [
            httpx.post(f"{server.ready().url}/predict/batch", json={"texts": texts}, verify=NO_TLS).json()
            for texts in TEXTS
        ]
    # Nobody is there to answer yet.
    ids = [jobs.submit(TEXTS[index % len(TEXTS)]) for index in range(count)]
    assert jobs.redis.client.xlen("jobs") == count
    submissions = jobs.results_written()
    workers = [jobs.worker() for _ in range(WORKERS)]
    kills = max(4, count // 200)
    for step in range(1, kills + 1):
        left = count - count * step // (kills + 1)
        until(lambda left=left: jobs.redis.client.xlen("jobs") <= left)
        workers[step % WORKERS].process.kill()
        if step == kills // 2:
            jobs.redis.kill()
            jobs.redis.start()
        workers[step % WORKERS] = jobs.worker()
    until(lambda: jobs.redis.client.xlen("jobs") == 0)
    for index, job_id in enumerate(ids):
        answer = jobs.answer(job_id)
        assert answer == {"id": job_id, "status": "done"} | expected[index % len(TEXTS)]
    assert jobs.results_written() - submissions == count
    assert jobs.redis.client.xlen("jobs:dead") == 0
    for worker in workers:
        worker.terminate()
        assert worker.wait() == 0


def test_a_job_that_ends_every_worker_is_a_dead_letter_and_in_nobody_elses_way(jobs: Jobs) -> None:
    poison = jobs.submit(MANY)
    others = [jobs.submit(TEXTS[0]) for _ in range(3)]
    for _ in range(2):
        worker = jobs.worker(SLOW, job_max_deliveries=2)
        until_running(jobs, poison, worker)
        worker.process.kill()
        worker.wait()
    worker = jobs.worker(SLOW, job_max_deliveries=2)
    until(lambda: jobs.status(poison) == "failed" and all(jobs.status(each) == "done" for each in others))
    assert "error" in jobs.answer(poison)
    ((_, letter),) = jobs.redis.client.xrange("jobs:dead")
    assert letter == {b"id": poison.encode(), b"reason": b"WorkerLost", b"deliveries": b"3"}
    assert worker.metric("job_dead_letters_total") == 1
    assert worker.metric("job_redeliveries_total") >= 1
    assert worker.metric("jobs_total", outcome="failed") == 1


def until_running(jobs: Jobs, job_id: str, worker: ServerProcess) -> None:
    """Until it is that worker that has the job."""

    def held() -> bool:
        pending = jobs.redis.client.xpending_range("jobs", "workers", "-", "+", 100)
        names = {each["consumer"].decode() for each in pending}
        return any(f"-{worker.process.pid}-" in name for name in names) and jobs.status(job_id) == "running"

    until(held)


def test_who_has_lost_its_lease_writes_nothing(jobs: Jobs) -> None:
    job_id = jobs.submit(MANY)
    submissions = jobs.results_written()
    slow = jobs.worker(SLOW)
    until_running(jobs, job_id, slow)
    slow.process.send_signal(signal.SIGSTOP)
    other = jobs.worker()
    until(lambda: jobs.status(job_id) == "done")
    slow.process.send_signal(signal.SIGCONT)
    until(lambda: jobs_logged(slow, "lease lost"))
    assert jobs.results_written() - submissions == 1
    assert (slow.metric("jobs_total", outcome="done"), other.metric("jobs_total", outcome="done")) == (0, 1)
    assert other.metric("job_redeliveries_total") == 1


def test_a_lease_is_renewed_for_as_long_as_the_work_takes(jobs: Jobs) -> None:
    job_id = jobs.submit(MANY)
    first = jobs.worker(SLOW)
    until_running(jobs, job_id, first)
    second = jobs.worker(SLOW)
    until(lambda: jobs.status(job_id) == "done")
    assert first.metric("jobs_total", outcome="done") == 1
    assert second.metric("job_redeliveries_total") == 0


def test_a_worker_that_is_told_to_end_gives_back_what_it_cannot_finish(jobs: Jobs) -> None:
    job_id = jobs.submit(MANY)
    first = jobs.worker(SLOW, job_lease_seconds=FOR_EVER_SECONDS, drain_timeout_seconds=0)
    until_running(jobs, job_id, first)
    first.terminate()
    assert first.wait() == 0
    assert jobs.status(job_id) == "queued"
    jobs.worker(job_lease_seconds=FOR_EVER_SECONDS)
    until(lambda: jobs.status(job_id) == "done")


def test_a_worker_that_is_told_to_end_finishes_what_it_can(jobs: Jobs) -> None:
    job_id = jobs.submit(MANY[:1000])
    worker = jobs.worker(SLOW, drain_timeout_seconds=FOR_EVER_SECONDS)
    until_running(jobs, job_id, worker)
    worker.terminate()
    assert worker.wait() == 0
    assert jobs.status(job_id) == "done"


def test_a_gateway_needs_no_model_and_is_ready_while_the_queue_answers(jobs: Jobs) -> None:
    gateway = jobs.gateway
    assert gateway.get("/live").status_code == 200
    assert jobs.client.post("/predict", json={"text": "a fine day"}).status_code == 404
    described = gateway.get("/openapi.json").json()["paths"]
    assert "202" in described["/jobs"]["post"]["responses"]
    assert "/jobs/{job_id}" in described
    assert "/predict" not in described
    jobs.submit(TEXTS[0])
    until(lambda: gateway.metric("jobs_backlog") == 1 and gateway.metric("job_oldest_age_seconds") > 0)
    jobs.redis.kill()
    until(lambda: gateway.get("/ready").status_code == 503)
    refused = jobs.client.post("/jobs", json={"texts": TEXTS[0]})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert gateway.get("/live").status_code == 200
    jobs.redis.start()
    gateway.ready()
    jobs.submit(TEXTS[0])
    until(lambda: gateway.metric("jobs_backlog") == 2)


def test_what_is_wrong_with_a_request_is_said_when_it_is_submitted(jobs: Jobs) -> None:
    for body, status in (({"texts": []}, 422), ({"texts": [3]}, 422), ({"text": "a"}, 422)):
        assert jobs.client.post("/jobs", json=body).status_code == status, body
    assert jobs.client.post("/jobs", content=b"{", headers=JSON).status_code == 400
    headers = {"idempotency-key": "k" * 257}
    assert jobs.client.post("/jobs", json={"texts": TEXTS[0]}, headers=headers).status_code == 400
    first = jobs.submit(TEXTS[0], key="order 7")
    assert jobs.submit(TEXTS[0], key="order 7") == first
    other = jobs.client.post("/jobs", json={"texts": TEXTS[1]}, headers={"idempotency-key": "order 7"})
    assert other.status_code == 422
    assert jobs.client.get(f"/jobs/{'0' * 32}").status_code == 404
    assert jobs.redis.client.xlen("jobs") == 1


def test_a_server_with_a_queue_answers_both_at_once_and_later(redis_server: RedisServer) -> None:
    with ServerProcess(queue_url=redis_server.url) as server:
        server.ready()
        assert httpx.post(f"{server.url}/predict", json={"text": "good"}, verify=NO_TLS).status_code == 200
        assert httpx.post(f"{server.url}/jobs", json={"texts": ["good"]}, verify=NO_TLS).status_code == 202


def test_without_a_queue_there_are_no_jobs(server: ServerProcess) -> None:
    assert httpx.post(f"{server.url}/jobs", json={"texts": ["good"]}, verify=NO_TLS).status_code == 404
    assert server.get(f"/jobs/{'0' * 32}").status_code == 404


@pytest.mark.parametrize(
    ("module", "settings", "says"),
    [
        ("app.worker", {}, "APP_QUEUE_URL"),
        ("app", {"role": "gateway"}, "APP_QUEUE_URL"),
        ("app", {"queue_url": "http://:hush@queue"}, "APP_QUEUE_URL"),
        ("app", {"queue_url": "redis://queue", "http_processes": 2}, "APP_HTTP_PROCESSES=2"),
    ],
)
def test_settings_that_do_not_go_together_are_exit_code_2_and_one_line(module: str, settings: dict, says: str) -> None:
    with ServerProcess(module=module, **settings) as process:
        assert process.wait() == 2
        (line,) = process.errors().splitlines()
        assert says in line
        assert "hush" not in line


def test_a_worker_takes_only_a_model_of_texts(redis_server: RedisServer, package: Callable) -> None:
    with ServerProcess(package(onnx_models.mlp), module="app.worker", queue_url=redis_server.url) as worker:
        assert worker.wait() == 2
        assert "tensors" in worker.errors()


def test_who_waits_for_a_redis_that_says_nothing_ends_when_it_is_told_to(redis_server: RedisServer) -> None:
    url = redis_server.url
    with ServerProcess(role="gateway", queue_url=url) as gateway, ServerProcess(queue_url=url, **WORKER) as worker:
        gateway.ready()
        worker.ready()
        redis_server.process.send_signal(signal.SIGSTOP)
        for process in (gateway, worker):
            process.terminate()
            assert process.wait() == 0


def test_neither_password_nor_text_is_ever_said() -> None:
    with RedisServer(port=free_port(), password="hush-hush") as redis, ExitStack() as stack:
        jobs = Jobs(redis, stack)
        worker = jobs.worker()
        job_id = jobs.submit(["an excellent secret"])
        until(lambda: jobs.status(job_id) == "done")
        redis.kill()
        until(lambda: jobs.gateway.get("/ready").status_code == 503)
        wrong = stack.enter_context(
            ServerProcess(module="app.worker", queue_url=redis.url.replace("hush-hush", "hush-quiet"))
        )
        redis.start()
        until(lambda: any("does not answer" in line["event"] for line in wrong.logs()))
        assert wrong.get("/ready").json()["stage"] == "connecting"
        said = ""
        for process in (jobs.gateway, worker, wrong):
            said += process.output() + process.errors() + process.get("/metrics").text
        assert Counter(json.loads(line)["event"] for line in worker.output().splitlines() if "job" in line)["job"] == 1
        for secret in ("hush", "excellent", "secret"):
            assert secret not in said
