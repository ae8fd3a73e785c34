"""Credentials planted in every setting that holds one: found in no log, error, metric, page, document or trace."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.otlp_receiver import ClientTrace, Receiver
from tests.process import NO_TLS, ROOT, START_SECONDS, ServerProcess, free_port
from tests.redis_server import RedisServer

PLANTED = "canary-secret-of-the-queue", "canary-secret-of-a-client", "canary-secret-of-traces", "canary-secret-of-a-url"
QUEUE, CLIENT, TRACES, URL = PLANTED
# Whatever a person or Prometheus looks at.
SHOWN = ("/", "/docs", "/openapi.json", "/metrics", "/ready", "/state", "/v2", "/nowhere", "/jobs/" + "0" * 32)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def environment(receiver: Receiver) -> dict[str, str]:
    return receiver.environment | {"OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{TRACES}"}


def said_by(server: ServerProcess) -> str:
    return server.output() + server.errors()


def none_of(text: str) -> None:
    assert [each for each in PLANTED if each in text] == []


def test_a_gateway_and_a_worker_with_a_queue_that_answers_and_one_that_does_not(receiver: Receiver, tmp_path: Path):
    (tmp_path / "keys").write_text(f"shop:{CLIENT}\n")
    port = free_port()
    settings = {"queue_url": f"redis://:{QUEUE}@127.0.0.1:{port}/0", "api_keys_file": tmp_path / "keys"}
    shown, trace = [], ClientTrace()
    with ServerProcess(role="gateway", environment=environment(receiver), **settings) as gateway:  # type: ignore[arg-type]
        keys = [{"authorization": f"Bearer {CLIENT}"}, {"authorization": f"Bearer {CLIENT}x"}, {}]

        def ask(method: str, path: str) -> None:
            for headers in keys:
                answer = httpx.request(
                    method, gateway.url + path, json={"texts": ["a fine day"]}, headers=headers | trace.sampled,
                    verify=NO_TLS, timeout=START_SECONDS,
                )  # fmt: skip
                shown.append(answer.text + str(answer.headers))

        ask("POST", "/jobs")  # nobody listens there yet
        with (
            RedisServer(port=port, password=QUEUE),
            ServerProcess(
                module="app.worker",
                environment=environment(receiver),
                **settings,  # type: ignore[arg-type]
            ) as worker,
        ):
            gateway.ready()
            worker.ready()
            ask("POST", "/jobs")
            for path in SHOWN:
                ask("GET", path)
            receiver.named("job", trace)
            none_of(said_by(worker) + worker.get("/metrics").text)
        none_of(said_by(gateway))
    none_of("".join(shown))
    none_of(receiver.raw.decode("latin-1"))


@pytest.mark.parametrize(
    "settings",
    [
        {"queue_url": f"nonsense://:{QUEUE}@127.0.0.1:1/0"},
        {"queue_url": f"redis://:{QUEUE}@127.0.0.1:not-a-port/0"},
        {"queue_url": f"redis://:{QUEUE}@127.0.0.1:1/0", "http_processes": 2},
        {"queue_url": f"redis://:{QUEUE}@127.0.0.1:1/0", "max_queue_rows": "none"},
    ],
    ids=("scheme", "port", "together", "another setting"),
)
def test_a_process_that_does_not_start(settings: dict[str, object]):
    with ServerProcess(role="gateway", **settings) as server:  # type: ignore[arg-type]
        assert server.wait() == 2
        none_of(said_by(server))


def test_an_endpoint_for_traces_with_a_token_in_it():
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"collector:{TRACES}@127.0.0.1:1"}
    with ServerProcess(environment=endpoint) as server:
        assert server.wait() == 2
        none_of(said_by(server))


def test_a_file_of_keys_with_a_line_that_is_none(tmp_path: Path):
    (tmp_path / "keys").write_text(f"{CLIENT}\n")
    with ServerProcess(api_keys_file=tmp_path / "keys") as server:
        assert server.wait() == 2
        none_of(said_by(server))


def test_a_signed_url_that_is_not_fetched(tmp_path: Path):
    url = f"http://user:{URL}@127.0.0.1:{free_port()}/model?X-Amz-Signature={URL}"
    command = [sys.executable, "-m", "model.fetch", url, str(tmp_path / "model"), "--timeout-seconds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode != 0
    none_of(done.stdout + done.stderr)
