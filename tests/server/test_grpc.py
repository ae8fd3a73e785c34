"""The Open Inference Protocol over gRPC, against real servers: `tritonclient.grpc` as published, and plain calls for
what it does not say (metadata, cancelling, health).

tritonclient runs in a process of its own: it brings the protocol's messages under the same names.
"""

import multiprocessing
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from app.errors import ConfigError
from app.grpc import LABEL
from app.grpc.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING
from app.grpc.health import response as health_response
from app.grpc.protocol import open_inference_pb2 as messages
from app.settings import PREFIX, Settings
from tests.process import NO_TLS, ROOT, ServerProcess, free_port
from tests.server.test_lifecycle import (  # noqa: F401
    HOUR_MS,
    PATIENCE_SECONDS,
    QUICK,
    HeldServer,
    await_event,
    await_traffic,
    events,
    pool,
    turner,
    until,
)
from tests.server.test_tritonclient import TYPES, every_type, strings
from tests.server.triton_grpc import ask_aio, ask_sync
from tests.text_model import NAME, VERSION, text_model

SERVICE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
PATIENT = {"request_timeout_ms": HOUR_MS, "max_queue_wait_ms": HOUR_MS}


class Client:
    """Plain calls, each with a time limit, so that nothing waits for ever."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def begin(self, request: bytes, service: str = SERVICE, method: str = "ModelInfer", **how: Any) -> Any:
        """A call that is under way; its `result()` is the answer's bytes."""
        how.setdefault("timeout", PATIENCE_SECONDS)
        return self.channel.unary_unary(f"/{service}/{method}").future(request, wait_for_ready=True, **how)

    def infer(self, request: bytes, **how: Any) -> messages.ModelInferResponse:
        return messages.ModelInferResponse.FromString(self.begin(request, **how).result())

    def watch(self, service: bytes = b"") -> Any:
        """The stream of a service's health."""
        return self.channel.unary_stream(f"/{HEALTH}/Watch")(service, timeout=PATIENCE_SECONDS, wait_for_ready=True)


def texts(*items: str, model: str = NAME, **more: Any) -> bytes:
    """A request in typed contents."""
    contents = {"bytes_contents": [item.encode() for item in items]}
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(items)], "contents": contents}
    return messages.ModelInferRequest(model_name=model, inputs=[tensor], **more).SerializeToString()


def turns(*rounds: int) -> bytes:
    """A request to the model of test_lifecycle."""
    raw = np.array(rounds, np.int64).tobytes()
    tensor = {"name": "rounds", "datatype": "INT64", "shape": [len(rounds)]}
    request = messages.ModelInferRequest(model_name="test-model", inputs=[tensor], raw_input_contents=[raw])
    return request.SerializeToString()


def refusal(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Code, message and trailing metadata of a call that is refused."""
    error = call.exception()
    assert error is not None, "it was answered"
    return call.code(), call.details(), dict(call.trailing_metadata())


class Served(ServerProcess):
    """A server with gRPC, which refuses nothing for being late."""

    def __init__(self, model_dir: Path, **settings: object) -> None:
        self.grpc_port = free_port()
        super().__init__(model_dir, grpc_port=self.grpc_port, **{**PATIENT, **settings})


@pytest.fixture(scope="module")
def servers(package: Callable[..., Path]) -> Iterator[dict[str, Served]]:
    """By the model's name."""
    folders = {"types": package(every_type, "types"), NAME: text_model()}
    with ExitStack() as stack:
        found = {name: stack.enter_context(Served(folder)) for name, folder in folders.items()}
        for server in found.values():
            server.ready()
        yield found


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


Ask = Callable[..., Any]


@pytest.fixture(params=[ask_sync, ask_aio])
def ask(request: pytest.FixtureRequest, elsewhere: ProcessPoolExecutor, servers: dict[str, Served]) -> Ask:
    """Asks a model's server with one of the two clients: `ask(server, method, *args, **kwargs)`."""

    def use(server: str, method: str, *args: Any, **kwargs: Any) -> Any:
        return elsewhere.submit(request.param, f"127.0.0.1:{servers[server].grpc_port}", method, args, kwargs).result()

    return use


@pytest.fixture
def client(servers: dict[str, Served]) -> Iterator[Client]:
    """Of the text model's server."""
    with Client(servers[NAME].grpc_port) as found:
        yield found


def test_a_ready_server_and_its_model_say_so(ask: Ask) -> None:
    assert ask(NAME, "is_server_live") is True
    assert ask(NAME, "is_server_ready") is True
    assert ask(NAME, "is_model_ready", NAME, VERSION) is True
    assert ask(NAME, "is_model_ready", NAME) is True


def test_an_unknown_model_or_version_is_not_ready(ask: Ask) -> None:
    assert ask(NAME, "is_model_ready", "otherwise") is False
    assert ask(NAME, "is_model_ready", NAME, "0") is False


def test_metadata_say_what_to_send(ask: Ask) -> None:
    assert ask(NAME, "get_server_metadata")["name"]
    found = ask(NAME, "get_model_metadata", NAME)
    assert (found["name"], found["versions"]) == (NAME, [VERSION])
    assert found["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": ["-1"]}]
    assert [spec["name"] for spec in found["outputs"]] == ["label", "score", "probabilities"]
    assert ask(NAME, "get_model_metadata", "otherwise").status == "StatusCode.NOT_FOUND"


def test_every_datatype_comes_back_as_it_was_sent(ask: Ask) -> None:
    inputs = {f"x_{name}": array for name, (_, array) in TYPES.items()}
    answer = ask("types", "infer", "types", inputs, request_id="one")
    assert answer.response == {"model_name": "types", "model_version": "7", "id": "one"}
    for name, (_, array) in TYPES.items():
        found = answer.arrays[f"y_{name}"]
        if name == "BYTES":
            found = np.array([item.decode() for item in found.ravel()], np.object_).reshape(found.shape)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_only_the_outputs_asked_for_come_and_the_likeliest_classes(ask: Ask) -> None:
    answer = ask(NAME, "infer", NAME, strings("I love it.", "awful"), outputs={"probabilities": 1, "score": 0})
    assert list(answer.arrays) == ["probabilities", "score"]
    assert [found.decode().split(":")[2] for found in answer.arrays["probabilities"].ravel()] == [
        "positive",
        "negative",
    ]


def test_what_cannot_be_answered_raises_the_clients_exception_without_the_clients_text(ask: Ask) -> None:
    refused = ask(NAME, "infer", NAME, {"secret-name": np.array(["secret text"], np.object_)})
    assert refused.status == "StatusCode.INVALID_ARGUMENT"
    assert "secret" not in refused.message
    assert ask(NAME, "infer", "otherwise", strings("x")).status == "StatusCode.NOT_FOUND"
    assert ask(NAME, "get_model_config", NAME).status == "StatusCode.UNIMPLEMENTED"


def test_typed_contents_are_answered_in_typed_contents(client: Client) -> None:
    response = client.infer(texts("I love it.", "awful", id="7"))
    outputs = {output.name: output for output in response.outputs}
    assert (response.id, response.model_version, list(response.raw_output_contents)) == ("7", VERSION, [])
    assert list(outputs["label"].contents.bytes_contents) == [b"positive", b"negative"]
    assert len(outputs["probabilities"].contents.fp32_contents) == 4


def test_grpc_and_http_answer_with_the_same_numbers(client: Client, servers: dict[str, Served]) -> None:
    data = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["A good day."]}
    answer = httpx.post(f"{servers[NAME].url}/v2/models/{NAME}/infer", json={"inputs": [data]}, verify=NO_TLS)
    outputs = {output.name: output for output in client.infer(texts("A good day.")).outputs}
    (found,) = (each["data"] for each in answer.json()["outputs"] if each["name"] == "probabilities")
    assert list(outputs["probabilities"].contents.fp32_contents) == pytest.approx(found)


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"\xff\xff\xff", "INVALID_ARGUMENT"),
        (b"", "NOT_FOUND"),
        (texts("x", model="otherwise"), "NOT_FOUND"),
        (texts("x", model_version="0"), "NOT_FOUND"),
        (texts(), "INVALID_ARGUMENT"),
        (texts(*["x"] * 600), "RESOURCE_EXHAUSTED"),
        (texts("x", parameters={"timeout": messages.InferParameter(int64_param=-1)}), "INVALID_ARGUMENT"),
        (texts("x" * (5 << 20)), "RESOURCE_EXHAUSTED"),
    ],
    ids=["garbage", "nothing", "model", "version", "no text", "too many", "timeout", "too large"],
)
def test_a_bad_request_has_its_code_and_harms_nobody(client: Client, request_bytes: bytes, code: str) -> None:
    found, message, _ = refusal(client.begin(request_bytes))
    assert found.name == code, message
    assert "otherwise" not in message
    assert client.infer(texts("fine")).outputs


@pytest.mark.parametrize("method", ["ServerLive", "ModelReady", "ModelMetadata"])
def test_what_is_no_message_is_refused_by_every_method(client: Client, method: str) -> None:
    code, message, _ = refusal(client.begin(b"\xff\xff", method=method))
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, f"message: expected a {method}Request")


def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    assert refusal(client.begin(b"", method="RepositoryIndex"))[0] == grpc.StatusCode.UNIMPLEMENTED


def test_health_is_checked_and_watched_by_name(client: Client) -> None:
    for name in (b"", b"\x0a\x1e" + SERVICE.encode()):
        assert client.begin(name, HEALTH, "Check").result() == health_response(SERVING)
        watching = client.watch(name)
        assert next(watching) == health_response(SERVING)
        watching.cancel()
    unknown = b"\x0a\x05other"
    assert refusal(client.begin(unknown, HEALTH, "Check"))[0] == grpc.StatusCode.NOT_FOUND
    watching = client.watch(unknown)
    assert next(watching) == health_response(SERVICE_UNKNOWN)
    watching.cancel()
    assert refusal(client.begin(b"\xff", HEALTH, "Check"))[0] == grpc.StatusCode.INVALID_ARGUMENT


class Held(HeldServer):
    """With gRPC, and one runner that the test holds."""

    def __init__(self, model_dir: Path, **settings: object) -> None:
        self.grpc_port = free_port()
        super().__init__(model_dir, runners=1, grpc_port=self.grpc_port, **{**PATIENT, **settings})

    def counted(self, code: int) -> float:
        return self.metric("inference_requests_total", route=LABEL, code=str(code))

    @contextmanager
    def occupied(self, client: Client) -> Iterator[Any]:
        """A call whose run lasts until the end of the block."""
        with self.runs_held():
            call = client.begin(turns(QUICK))
            await_traffic(self, in_flight=1, waiting=0)
            yield call


@pytest.fixture(scope="module")
def held(turner: Path) -> Iterator[Held]:  # noqa: F811
    with Held(turner, max_queue_rows=8) as server:
        yield server.ready()


@pytest.fixture
def holder(held: Held) -> Iterator[Client]:
    with Client(held.grpc_port) as found:
        yield found


def test_a_request_id_goes_in_and_out_and_names_the_one_log_line(held: Held, holder: Client) -> None:
    call = holder.begin(turns(QUICK, QUICK), metadata=(("x-request-id", "order-17"),))
    assert call.result()
    assert dict(call.trailing_metadata())["x-request-id"] == "order-17"
    line = held.request_log("order-17")
    assert (line["route"], line["status"], line["rows"]) == (LABEL, 200, 2)
    assert line["body_bytes"] == len(turns(QUICK, QUICK))


def test_an_id_that_is_no_name_is_replaced(holder: Client) -> None:
    call = holder.begin(turns(QUICK), metadata=(("x-request-id", "two words"),))
    assert call.result()
    assert dict(call.trailing_metadata())["x-request-id"] != "two words"


def test_a_call_that_is_cancelled_while_it_waits_is_not_run(held: Held, holder: Client) -> None:
    left, rows = held.counted(499), held.metric("inference_batch_rows_sum")
    with held.occupied(holder) as running:
        waiting = [holder.begin(turns(QUICK)) for _ in range(5)]
        await_traffic(held, in_flight=6, waiting=5)
        for call in waiting:
            call.cancel()
        await_traffic(held, in_flight=1, waiting=0)
    assert running.result()
    await_traffic(held, in_flight=0, waiting=0)
    assert held.counted(499) == left + 5
    assert held.metric("inference_batch_rows_sum") == rows + 1


def test_a_clients_deadline_is_the_servers_too(held: Held, holder: Client) -> None:
    # Both sides have a clock: the client may leave before the server would say so itself.
    ended, rows = held.counted(504) + held.counted(499), held.metric("inference_batch_rows_sum")
    with held.occupied(holder) as running:
        call = holder.begin(turns(QUICK), timeout=0.3)
        assert refusal(call)[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        await_traffic(held, in_flight=1, waiting=0)
    assert running.result()
    await_traffic(held, in_flight=0, waiting=0)
    assert held.counted(504) + held.counted(499) == ended + 1
    assert held.metric("inference_batch_rows_sum") == rows + 1


def test_a_full_queue_refuses_with_the_time_to_come_back_and_answers_what_it_accepted(
    held: Held, holder: Client
) -> None:
    refused = held.counted(503)
    with held.occupied(holder) as running:
        accepted = [holder.begin(turns(number)) for number in range(8)]
        await_traffic(held, in_flight=9, waiting=8)
        for _ in range(5):
            code, message, metadata = refusal(holder.begin(turns(QUICK)))
            assert (code, message) == (grpc.StatusCode.UNAVAILABLE, "queue full")
            assert int(metadata["retry-after"]) >= 1
            assert int(metadata["grpc-retry-pushback-ms"]) == 1000 * int(metadata["retry-after"])
            assert metadata["x-request-id"]
    assert running.result()
    for number, call in enumerate(accepted):
        response = messages.ModelInferResponse.FromString(call.result())
        assert response.raw_output_contents[0] == np.array([number]).tobytes()
    assert held.counted(503) == refused + 5


def test_a_server_that_is_not_ready_says_so_and_when_it_is_watched_tells_how_it_goes_on(turner: Path) -> None:  # noqa: F811
    with Held(turner, drain_delay_seconds=600) as server, Client(server.grpc_port) as client:
        with server.runs_held():  # the gate's too
            watching = client.watch()
            assert next(watching) == health_response(NOT_SERVING)
            code, _, metadata = refusal(client.begin(turns(QUICK)))
            assert (code, metadata["retry-after"]) == (grpc.StatusCode.UNAVAILABLE, "1")
        assert next(watching) == health_response(SERVING)
        assert client.infer(turns(QUICK)).outputs
        server.terminate()
        assert next(watching) == health_response(NOT_SERVING)
        # Whoever comes all the same is answered.
        assert client.infer(turns(QUICK)).outputs
        server.terminate()
        assert server.wait() == 0


def test_what_runs_and_what_waits_is_answered_before_the_process_ends(turner: Path) -> None:  # noqa: F811
    with Held(turner, drain_timeout_seconds=600) as server, Client(server.grpc_port) as client:
        server.ready()
        with server.occupied(client) as running:
            watching = client.watch()
            waiting = [client.begin(turns(number)) for number in range(6)]
            await_traffic(server, in_flight=7, waiting=6)
            server.terminate()
            assert await_event(server, "draining")["in_flight"] == 7
        for call in (running, *waiting):
            assert call.result()
        # A stream that is watched holds nothing up.
        assert list(watching) == [health_response(SERVING), health_response(NOT_SERVING)]
        assert server.wait() == 0
        assert "drain timeout" not in events(server)
        assert server.errors() == ""


def statuses(server: ServerProcess) -> list[int]:
    """Of each call that it has logged."""
    return [line["status"] for line in server.logs() if line["event"] == "request"]


class Switch:
    """A Service of one address: whoever connects reaches the server whose port is `target` at that time."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


def test_a_server_that_goes_loses_no_call_as_connections_are_renewed_within_its_delay() -> None:
    """What a rolling update needs: clients keep their connections through a Service that has forgotten the Pod."""
    going, staying = free_port(), free_port()
    settings = {"grpc_max_connection_age_seconds": 1, "drain_delay_seconds": 5, **PATIENT}
    codes: Counter[str] = Counter()
    over = threading.Event()
    with ServerProcess(grpc_port=going, **settings) as old, ServerProcess(grpc_port=staying, **settings) as new:
        old.ready(), new.ready()
        service = Switch(going)

        def ask_on() -> None:
            with Client(service.port) as client:
                while not over.is_set():
                    call = client.begin(texts("fine"))
                    codes["OK" if call.exception() is None else call.code().name] += 1
                    over.wait(0.005)

        with ThreadPoolExecutor(4) as clients:
            ends = [clients.submit(ask_on) for _ in range(4)]
            until(lambda: codes["OK"] >= 40)
            service.target = staying
            old.terminate()
            assert old.wait() == 0
            settled = codes["OK"]
            until(lambda: codes["OK"] >= settled + 20)
            over.set()
            for end in ends:
                end.result()
        service.close()
        assert set(codes) == {"OK"}
        # A line is written after its answer.
        until(lambda: len(statuses(old)) + len(statuses(new)) == codes["OK"])
        assert {*statuses(old), *statuses(new)} == {200}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"http_processes": 2}, "APP_HTTP_PROCESSES=2: expected 1 with APP_GRPC_PORT"),
        ({"role": "gateway", "queue_url": "redis://127.0.0.1:1"}, "expected 0 with APP_ROLE=gateway"),
        ({"grpc_port": 70000}, "APP_GRPC_PORT='70000' is not valid"),
    ],
)
def test_settings_that_do_not_go_with_grpc_are_exit_code_2_and_one_line(settings: dict[str, Any], says: str) -> None:
    with ServerProcess(**{"grpc_port": free_port(), **settings}) as server:
        assert server.wait() == ConfigError.exit_code
        assert says in server.errors()
        assert len(server.errors().splitlines()) == 1


def test_a_port_in_use_is_exit_code_2_and_one_line(servers: dict[str, Served]) -> None:
    taken = servers[NAME].grpc_port
    with ServerProcess(grpc_port=taken) as server:
        assert server.wait() == ConfigError.exit_code
        assert f"APP_GRPC_PORT={taken}: cannot listen there" in server.errors()
        assert len(server.errors().splitlines()) == 1


def test_without_its_setting_nothing_of_grpc_is_imported() -> None:
    assert Settings.model_fields["grpc_port"].default == 0
    program = (
        "import sys, threading, app.main; app.main.create_app()\n"
        "assert not {'grpc', 'google.protobuf'} & sys.modules.keys(), 'imported'\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert PREFIX not in done.stderr
