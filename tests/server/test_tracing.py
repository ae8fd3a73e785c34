"""Traces, as a real receiver of OTLP gets them over HTTP from real processes."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from app import __version__
from tests.otlp_receiver import PARENT_ID, ClientTrace, Receiver
from tests.process import NO_TLS, ROOT, ServerProcess, free_port
from tests.redis_server import RedisServer
from tests.text_model import NAME, SLOW, text_model

PATIENCE_SECONDS = 60
TEXT = "the heron waits"
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}


@pytest.fixture
def trace() -> ClientTrace:
    return ClientTrace()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def server(receiver: Receiver) -> Iterator[ServerProcess]:
    """One with the settings that there are without any."""
    with ServerProcess(environment=receiver.environment) as server:
        yield server.ready()


@pytest.fixture
def start(receiver: Receiver) -> Iterator[Start]:
    running: list[ServerProcess] = []

    def started(module: str = "app", environment: dict[str, str] | None = None, **settings: object) -> ServerProcess:
        process = ServerProcess(module=module, environment=receiver.environment | (environment or {}), **settings)  # type: ignore[arg-type]
        running.append(process)
        return process.ready()

    yield started
    for process in running:
        process.__exit__()


def post(server: ServerProcess, path: str = "/predict", body: object = None, **headers: str) -> httpx.Response:
    body = {"text": TEXT} if body is None else body
    return httpx.post(server.url + path, json=body, headers=headers, verify=NO_TLS, timeout=PATIENCE_SECONDS)


def attributes(span: Span) -> dict[str, object]:
    values = {pair.key: pair.value for pair in span.attributes}
    return {name: value.string_value or value.int_value for name, value in values.items()}


def lines(server: ServerProcess, event: str) -> list[dict]:
    return [line for line in server.logs() if line.get("event") == event]


def test_a_request_is_a_span_of_its_clients_trace_with_its_wait_and_its_run(
    receiver: Receiver, server: ServerProcess, trace: ClientTrace
):
    post(server, **trace.sampled)
    (request,), (queue,), (run,), (batch,) = (
        receiver.named(name, trace) for name in ("POST /predict", "queue", "run", "batch")
    )
    assert {span.trace_id.hex() for span in (request, queue, run, batch)} == {trace.id}
    assert request.parent_span_id.hex() == PARENT_ID
    assert {span.parent_span_id for span in (queue, run, batch)} == {request.span_id}
    assert request.kind == Span.SPAN_KIND_SERVER
    assert [link.span_id for link in batch.links] == [request.span_id]
    assert [link.span_id for link in run.links] == [batch.span_id]
    times = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in (request, queue, run)]
    assert times[0][0] <= times[1][0] <= times[1][1] <= times[2][0] + 1000 <= times[2][1] + 1000 <= times[0][1] + 2000


def test_a_span_says_what_is_known_of_the_request_but_its_text(
    receiver: Receiver, server: ServerProcess, trace: ClientTrace
):
    post(server, **trace.sampled, **{"x-request-id": "order-7"})
    (request,), (batch,) = receiver.named("POST /predict", trace), receiver.named("batch", trace)
    found = attributes(request)
    assert found.pop("tokens") == attributes(batch)["tokens"] > 0
    assert found.pop("http.request.body.size") == len('{"text":"the heron waits"}')
    assert found == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "request.id": "order-7",
        "model.name": NAME,
        "model.version": "2.1",
        "rows": 1,
    }
    assert receiver.resources[0]["service.name"] == "sentiment-inference"
    assert receiver.resources[0]["service.version"] == __version__
    for word in TEXT.split():
        assert word.encode() not in receiver.raw


def test_a_run_is_linked_to_all_of_its_requests(receiver: Receiver, start: Start, trace: ClientTrace):
    server = start(model_dir=text_model(SLOW), runners=1, max_batch_rows=8)
    clients = [threading.Thread(target=post, args=(server,), kwargs=trace.sampled) for _ in range(9)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    requests = {span.span_id for span in receiver.named("POST /predict", trace, 9)}
    assert {link.span_id for span in receiver.named("batch", trace) for link in span.links} == requests


def test_what_the_client_did_not_sample_is_not_sent_but_its_log_line_has_the_trace(
    receiver: Receiver, server: ServerProcess, trace: ClientTrace
):
    post(server, **trace.not_sampled)
    post(server, "/predict/batch", {"texts": [TEXT]}, **trace.sampled)
    receiver.named("POST /predict/batch", trace)
    assert not [span for span in receiver.spans if trace.has(span) and span.name == "POST /predict"]
    assert [line["trace_id"] for line in lines(server, "request")].count(trace.id) == 2


def test_a_ratio_of_the_traces_that_begin_here_is_sent(receiver: Receiver, start: Start, trace: ClientTrace):
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}
    server = start(environment=sampler)
    for _ in range(5):
        post(server)
    post(server, "/predict/batch", {"texts": [TEXT]}, **trace.sampled)
    receiver.named("POST /predict/batch", trace)
    begun_here = {line["trace_id"] for line in lines(server, "request")} - {trace.id}
    assert len(begun_here) == 5
    assert not begun_here & {span.trace_id.hex() for span in receiver.spans}


def test_only_what_is_the_services_fault_is_an_error(receiver: Receiver, server: ServerProcess, trace: ClientTrace):
    assert post(server, body={"no": "text"}, **trace.sampled).status_code == 422
    (wrong,) = receiver.named("POST /predict", trace)
    assert (wrong.status.code, attributes(wrong)["error.type"]) == (Status.STATUS_CODE_UNSET, "Invalid")
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with ServerProcess(role="gateway", queue_url=nowhere, environment=receiver.environment) as gateway:
        assert post(gateway, "/jobs", {"texts": [TEXT]}, **trace.sampled).status_code == 503
        (refused,) = receiver.named("POST /jobs", trace)
    assert (refused.status.code, attributes(refused)["error.type"]) == (Status.STATUS_CODE_ERROR, "Unavailable")


def test_exemplars_lead_from_a_bucket_to_a_trace_for_who_asks_for_openmetrics(
    receiver: Receiver, server: ServerProcess, trace: ClientTrace
):
    post(server, **trace.sampled)
    (request,) = receiver.named("POST /predict", trace)
    asked = httpx.get(f"{server.url}/metrics", headers=OPENMETRICS, verify=NO_TLS)
    assert asked.headers["content-type"].startswith("application/openmetrics-text")
    ours = [line for line in asked.text.splitlines() if line.startswith("inference_request_duration_seconds_bucket")]
    (exemplar,) = (line.partition(" # ")[2] for line in ours if trace.id in line)
    assert f'span_id="{request.span_id.hex()}"' in exemplar
    assert asked.text.endswith("# EOF\n")
    plain = httpx.get(f"{server.url}/metrics", verify=NO_TLS)
    assert trace.id not in plain.text


def test_a_trace_goes_through_the_queue_to_the_worker(
    receiver: Receiver, start: Start, redis_server: RedisServer, trace: ClientTrace
):
    gateway = start(role="gateway", queue_url=redis_server.url)
    answer = post(gateway, "/jobs", {"texts": [TEXT]}, **trace.sampled)
    worker = start("app.worker", queue_url=redis_server.url)
    (request,), (job,), (run,) = (receiver.named(name, trace) for name in ("POST /jobs", "job", "run"))
    assert {span.trace_id.hex() for span in (request, job, run)} == {trace.id}
    assert request.parent_span_id.hex() == PARENT_ID
    assert job.parent_span_id == request.span_id
    assert run.parent_span_id == job.span_id
    assert job.kind == Span.SPAN_KIND_CONSUMER
    found = attributes(job)
    assert (found["job.id"], found["job.status"], found["rows"]) == (answer.json()["id"], "done", 1)
    assert [line["trace_id"] for line in lines(worker, "job")] == [trace.id]


def test_several_http_processes_send_the_spans_of_requests(receiver: Receiver, start: Start, trace: ClientTrace):
    server = start(http_processes=2)
    post(server, **trace.sampled)
    (request,), (run,) = receiver.named("POST /predict", trace), receiver.named("run", trace)
    assert run.parent_span_id == request.span_id


def test_what_is_left_is_sent_at_the_end(receiver: Receiver, start: Start, trace: ClientTrace):
    server = start(environment={"OTEL_BSP_SCHEDULE_DELAY": "3600000"})
    post(server, **trace.sampled)
    server.terminate()
    assert server.wait() == 0
    assert receiver.named("POST /predict", trace)


def test_without_a_collector_requests_are_answered_and_the_process_ends(start: Start, trace: ClientTrace):
    server = start(environment={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"})
    assert post(server, **trace.sampled).status_code == 200
    server.terminate()
    assert server.wait() == 0


def test_a_bad_variable_is_one_line_and_exit_code_2(receiver: Receiver):
    with ServerProcess(environment=receiver.environment | {"OTEL_TRACES_SAMPLER": "sometimes"}) as server:
        assert server.wait() == 2
        (line,) = server.errors().splitlines()
        assert "OTEL_TRACES_SAMPLER=sometimes: expected one of" in line


def test_without_an_endpoint_nothing_of_opentelemetrys_sdk_is_imported():
    program = "import sys; from app.main import create_app; create_app(); print('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
