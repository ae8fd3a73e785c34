"""Traffic for locust: `locust -f loadtest/locustfile.py --host URL`, of what the model there takes. Closed loop
(default): users that wait for their answer. Open loop (`--loop open`): arrivals at the rate of a shape that wait for
nothing, timed from when they were due.
Exit code 1 when the objective is violated. Locust and the standard library only: it also runs in k8s/jobs/loadtest.
"""

import json
import logging
import random
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, LoadTestShape, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtest.payloads import Payload, PayloadError, Served, shown
from loadtest.shapes import NAMES, Shape, ShapeError, shape
from loadtest.texts import MIX, mixed, shares_of

log = logging.getLogger("loadtest")

TEXTS = 2000
# Requests of each kind, as shares of arrivals and of users: fewer than ten users send fewer kinds.
KINDS = {"single": 8, "batch": 1, "oip": 1}
# Tensors to choose from, made before the test starts.
TENSORS = 64
NUMBER = re.compile(r"\d+(\.\d+)?")
# An arrival sent later than this has waited for the client, not for the server.
LATE_MS = 10.0
OUTSTANDING = 2000
GRACE_SECONDS = 5.0


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("sentiment-inference")

    def option(name: str, text: str, **more: Any) -> None:
        group.add_argument(f"--{name}", env_var=f"LOADTEST_{name.replace('-', '_').upper()}", help=text, **more)

    option("loop", "users wait for answers, arrivals wait for nothing", choices=("closed", "open"), default="closed")
    text = "traffic over time, in users (closed) or requests per second (open); none: --users until --run-time"
    option("shape", text, choices=("none", *NAMES), default="none")
    option("base", "lowest rate or users of the shape", type=float, default=1.0)
    option("peak", "highest rate or users of the shape", type=float, default=20.0)
    option("shape-seconds", "length of the shape", type=float, default=60.0)
    option("trace", "CSV with seconds,rate for the shape csv", default="")
    option("sources", "greenlets that make the arrivals of an open loop, over all workers", type=int, default=8)
    option("kinds", "for a text model: single, batch, oip or all of them", choices=(*KINDS, "all"), default="all")
    option("batch-rows", "texts in one batch request", type=int, default=8)
    option("model", "its name, if the server has several or does not list them", default="")
    option(
        "trace-ratio",
        "share of requests that begin a trace of their own, sampled, by traceparent",
        type=float,
        default=0.0,
    )
    option("size", "most that an axis of a random tensor that may vary has", type=int, default=8)
    option("mix", f"shares of {', '.join(MIX)} texts", default=",".join(str(share) for share, _, _ in MIX.values()))
    option("slo-p95-ms", "objective; violated: exit code 1", type=float, default=100.0)
    option("allowed-failure-percent", "requests that may fail; more: exit code 1", type=float, default=1.0)


class Traffic:
    """What this process sends and when, from the options; set when a test starts."""

    texts: list[str] = []
    infer_path = ""
    # All that is sent to a model that takes no text, whatever the kind.
    payloads: list[Payload] = []
    shape: Shape | None = None
    started = 0.0
    late_ms: deque[float] = deque(maxlen=5000)


def chosen_shape(options: Any) -> Shape | None:
    """The shape of the options; an open loop without one is a constant rate. Raises ShapeError."""
    if options.shape == "none":
        seconds = float(options.run_time or options.shape_seconds)
        return None if options.loop == "closed" else shape("constant", options.peak, options.peak, seconds)
    trace = Path(options.trace) if options.trace else None
    return shape(options.shape, options.base, options.peak, options.shape_seconds, trace)


@events.init.add_listener
def _check(environment: Environment, **_: Any) -> None:
    """Wrong options end the process before anything is sent."""
    options = environment.parsed_options
    if options is None:
        return
    try:
        shares_of(options.mix)
        Traffic.shape = chosen_shape(options)
    except (ShapeError, ValueError) as error:
        raise SystemExit(f"loadtest: {error}") from None


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    Traffic.infer_path, Traffic.payloads = f"/v2/models/{options.model}/infer", []
    try:
        served = Served.ask((environment.host or "").rstrip("/"), options.model)
        Traffic.infer_path = served.path
        Traffic.payloads = [] if served.takes_text else served.payloads(TENSORS, options.size)
    except PayloadError as error:
        log.warning(f"{error}: sending texts")
    Traffic.texts = mixed(TEXTS, seed=1, shares=shares_of(options.mix))
    Traffic.shape = chosen_shape(options)
    Traffic.started = time.perf_counter()
    Traffic.late_ms.clear()


class _Client(FastHttpUser):
    """Knows how to send each kind of request."""

    abstract = True
    network_timeout = 30.0
    connection_timeout = 5.0

    def send(self, kind: str, due: float | None = None) -> None:
        """One request of a kind; `due` is when it should have left, if nothing waited."""
        name, payload = self.request(kind)
        headers = dict(payload.headers) | self.traced()
        with self.client.post(
            payload.path, data=payload.body, headers=headers, name=name, catch_response=True
        ) as response:
            if response.status_code >= 400:
                # Numbers would make every message another one.
                response.failure(f"{response.status_code}: {NUMBER.sub('#', shown(response.content))}")
            if due is not None:
                response.request_meta["response_time"] = (time.perf_counter() - due) * 1e3

    def traced(self) -> dict[str, str]:
        """W3C's header of a trace that begins here and is sampled, for its share of the requests."""
        if random.random() >= self.environment.parsed_options.trace_ratio:
            return {}
        return {"traceparent": f"00-{random.getrandbits(128) | 1:032x}-{random.getrandbits(64) | 1:016x}-01"}

    def request(self, kind: str) -> tuple[str, Payload]:
        """Name in the statistics, and what is sent."""
        options = self.environment.parsed_options
        if Traffic.payloads:
            return "/v2/models/infer", random.choice(Traffic.payloads)
        if kind == "single":
            return "/predict", Payload("/predict", json.dumps({"text": random.choice(Traffic.texts)}).encode())
        texts = random.choices(Traffic.texts, k=options.batch_rows)
        if kind == "batch":
            return "/predict/batch", Payload("/predict/batch", json.dumps({"texts": texts}).encode())
        tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}
        return "/v2/models/infer", Payload(Traffic.infer_path, json.dumps({"inputs": [tensor]}).encode())


class _WaitingUser(_Client):
    """A closed loop's: the next request when the last is answered."""

    abstract = True
    wait_time = constant(0)
    kind = ""

    @task
    def ask(self) -> None:
        self.send(self.kind)


class SingleUser(_WaitingUser):
    """One text in a request."""

    kind, weight = "single", KINDS["single"]


class BatchUser(_WaitingUser):
    """Several texts in one request."""

    kind, weight = "batch", KINDS["batch"]


class OipUser(_WaitingUser):
    """Several texts over the Open Inference Protocol."""

    kind, weight = "oip", KINDS["oip"]


class ArrivalSource(_Client):
    """A share of an open loop's arrivals: each leaves when it is due, in a greenlet of its own."""

    concurrency = OUTSTANDING

    def on_start(self) -> None:
        # A bound on memory; arrivals beyond it wait, and their wait counts.
        self._pool = Pool(OUTSTANDING)

    def on_stop(self) -> None:
        self._pool.join(timeout=GRACE_SECONDS)
        self._pool.kill()

    @task
    def arrive(self) -> None:
        """Until the test ends."""
        options = self.environment.parsed_options
        kinds, weights = zip(*KINDS.items(), strict=True)
        rng, traffic = random.Random(), Traffic.shape
        assert traffic is not None
        at = time.perf_counter() - Traffic.started
        while (at := traffic.next_arrival(at, rng, 1 / options.sources)) <= traffic.seconds:
            due = Traffic.started + at
            gevent.sleep(max(0.0, due - time.perf_counter()))
            kind = options.kinds if options.kinds != "all" else random.choices(kinds, weights)[0]
            self._pool.spawn(self.send, kind, due)
            Traffic.late_ms.append((time.perf_counter() - due) * 1e3)
        gevent.sleep(traffic.seconds)  # the shape ends the test


class Load(LoadTestShape):
    """How many of which users: the shape's, or locust's own --users, --spawn-rate and --run-time."""

    use_common_options = True

    def tick(self) -> Any:
        assert self.runner is not None
        options = self.runner.environment.parsed_options
        at, chosen = self.get_run_time(), chosen_shape(options)
        seconds = chosen.seconds if chosen is not None else float(options.run_time or "inf")
        if at > seconds:
            return None
        if options.loop == "open":
            return options.sources, options.sources, [ArrivalSource]
        users = [each for each in (SingleUser, BatchUser, OipUser) if options.kinds in (each.kind, "all")]
        if chosen is None:
            return options.num_users or 1, options.spawn_rate or 1, users
        count = max(1, round(chosen.rate(at)))
        return count, max(1, count), users


def lateness() -> float:
    """99th percentile of how late this process sent its recent arrivals, in ms."""
    values = sorted(Traffic.late_ms)
    return values[int(len(values) * 0.99)] if len(values) >= 100 else 0.0


@events.report_to_master.add_listener
def _report(client_id: str, data: dict[str, Any]) -> None:
    data["late_ms"] = lateness()


_worst_worker = {"late_ms": 0.0}


@events.worker_report.add_listener
def _collect(client_id: str, data: dict[str, Any]) -> None:
    _worst_worker["late_ms"] = max(_worst_worker["late_ms"], float(data.get("late_ms", 0.0)))


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    """Sets the exit code, says why, and says when the client was the limit."""
    runner = environment.runner
    if runner is None or isinstance(runner, WorkerRunner):
        return
    options, total = environment.parsed_options, environment.stats.total
    late = max(lateness(), _worst_worker["late_ms"])
    busy = runner.cpu_warning_emitted or getattr(runner, "worker_cpu_warning_emitted", False)
    if busy or late > LATE_MS:
        log.warning(
            f"the client is saturated (CPU {'over its limit' if busy else 'ok'}, 1 % of arrivals left {late:.0f} ms "
            "late or more): these are not the server's numbers; use --processes or more workers"
        )
    environment.process_exit_code = 1
    if not total.num_requests:
        log.error("objective violated: no request was sent")
        return
    p95, failed = total.get_response_time_percentile(0.95), 100 * total.fail_ratio
    held = p95 <= options.slo_p95_ms and failed <= options.allowed_failure_percent
    log.log(
        logging.INFO if held else logging.ERROR,
        f"objective {'held' if held else 'violated'}: p95 {p95:.0f} ms (at most {options.slo_p95_ms:g}), failed "
        f"{failed:.2f} % (at most {options.allowed_failure_percent:g}), {total.total_rps:.1f} requests/s",
    )
    environment.process_exit_code = 0 if held else 1
