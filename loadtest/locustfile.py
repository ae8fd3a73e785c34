"""Traffic for locust: `locust -f loadtest/locustfile.py --host http://…`; web UI, headless, `--processes`, workers.

Closed loop (default): users that wait for their answer, `--users` of them or as many as a shape says. Open loop
(`--loop open`): arrivals that wait for nothing, at the rate a shape says; their latency counts from when they were due,
so that a slow server cannot hide behind clients that wait for it. Exit code 1 when the objective is violated.
Locust and the standard library only: the same files run in a cluster (k8s/jobs/loadtest).
"""

import json
import logging
import random
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

from loadtest.shapes import NAMES, Shape, ShapeError, shape
from loadtest.texts import MIX, mixed

log = logging.getLogger("loadtest")

TEXTS = 2000
# Requests of each kind, as shares of arrivals and of users: fewer than ten users send fewer kinds.
KINDS = {"single": 8, "batch": 1, "oip": 1}
JSON = {"Content-Type": "application/json"}
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
    option("kinds", "single, batch, oip or all of them", choices=(*KINDS, "all"), default="all")
    option("batch-rows", "texts in one batch request", type=int, default=8)
    option("model", "name in the Open Inference Protocol's path", default="sentiment")
    option("mix", f"shares of {', '.join(MIX)} texts", default=",".join(str(share) for share, _, _ in MIX.values()))
    option("slo-p95-ms", "objective; violated: exit code 1", type=float, default=100.0)
    option("allowed-failure-percent", "requests that may fail; more: exit code 1", type=float, default=1.0)


class Traffic:
    """What this process sends and when, from the options; set when a test starts."""

    texts: list[str] = []
    shape: Shape | None = None
    started = 0.0
    late_ms: deque[float] = deque(maxlen=5000)


def chosen_shape(options: Any) -> Shape | None:
    """The shape of the options; an open loop without one is a constant rate. Raises ShapeError."""
    name = options.shape
    if name == "none":
        if options.loop == "closed":
            return None
        seconds = float(options.run_time or options.shape_seconds)
        return shape("constant", options.peak, options.peak, seconds)
    return shape(
        name, options.base, options.peak, options.shape_seconds, Path(options.trace) if options.trace else None
    )


@events.init.add_listener
def _check(environment: Environment, **_: Any) -> None:
    """Wrong options end the process before anything is sent."""
    options = environment.parsed_options
    if options is None:
        return
    try:
        shares = tuple(float(share) for share in options.mix.split(","))
        if len(shares) != len(MIX) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError
    except ValueError:
        raise SystemExit(f"--mix {options.mix!r}: needs {len(MIX)} shares ({', '.join(MIX)})") from None
    try:
        # A worker has no trace of its own unless it sends arrivals.
        Traffic.shape = chosen_shape(options)
    except ShapeError as error:
        raise SystemExit(f"loadtest: {error}") from None


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    Traffic.texts = mixed(TEXTS, seed=1, shares=tuple(float(share) for share in options.mix.split(",")))
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
        path, name, body = self.request(kind)
        with self.client.post(path, data=body, headers=JSON, name=name, catch_response=True) as response:
            if due is not None:
                response.request_meta["response_time"] = (time.perf_counter() - due) * 1e3

    def request(self, kind: str) -> tuple[str, str, str]:
        """Path, name in the statistics, body."""
        options = self.environment.parsed_options
        if kind == "single":
            return "/predict", "/predict", json.dumps({"text": random.choice(Traffic.texts)})
        texts = random.choices(Traffic.texts, k=options.batch_rows)
        if kind == "batch":
            return "/predict/batch", "/predict/batch", json.dumps({"texts": texts})
        tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}
        return f"/v2/models/{options.model}/infer", "/v2/models/infer", json.dumps({"inputs": [tensor]})


class SingleUser(_Client):
    """One text at a time, the next when the last is answered."""

    weight = KINDS["single"]
    wait_time = constant(0)

    @task
    def predict(self) -> None:
        self.send("single")


class BatchUser(_Client):
    """Several texts in one request."""

    weight = KINDS["batch"]
    wait_time = constant(0)

    @task
    def predict(self) -> None:
        self.send("batch")


class OipUser(_Client):
    """Several texts over the Open Inference Protocol."""

    weight = KINDS["oip"]
    wait_time = constant(0)

    @task
    def infer(self) -> None:
        self.send("oip")


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
        classes = {"single": SingleUser, "batch": BatchUser, "oip": OipUser}
        users = [classes[options.kinds]] if options.kinds != "all" else list(classes.values())
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
            "the client is saturated (CPU %s, 1 %% of arrivals left %.0f ms late or more): these are not the server's "
            "numbers; use --processes or more workers",
            "over its limit" if busy else "ok",
            late,
        )
    if not total.num_requests:
        log.error("objective violated: no request was sent")
        environment.process_exit_code = 1
        return
    p95, failed = total.get_response_time_percentile(0.95), 100 * total.fail_ratio
    held = p95 <= options.slo_p95_ms and failed <= options.allowed_failure_percent
    log.log(
        logging.INFO if held else logging.ERROR,
        "objective %s: p95 %.0f ms (at most %g), failed %.2f %% (at most %g), %.1f requests/s",
        "held" if held else "violated",
        p95,
        options.slo_p95_ms,
        failed,
        options.allowed_failure_percent,
        total.total_rps,
    )
    environment.process_exit_code = 0 if held else 1
