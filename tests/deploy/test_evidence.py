"""k8s/evidence.py against recorded API answers, Pods' metrics and a real Prometheus: promote, wait or roll back."""

import copy
import json
import math
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from app.telemetry.metrics import Metrics
from loadtest.benchmark.server import free_port
from tests.deploy.test_diagnose import Kubectl, Object, ago, crashed, healthy, thing, unready
from tests.deploy.test_k8s_prometheus import Prometheus, start
from tests.manifests import K8S, tool

PROMOTE, WAIT, ROLL_BACK, UNKNOWN = 0, 10, 20, 2
CANARY = {"app.kubernetes.io/name": "sentiment-inference", "track": "canary"}
STABLE_POD, CANARY_POD = "web-1-a", "web-canary-1-a"


@pytest.fixture
def kubectl(tmp_path: Path) -> Kubectl:
    return Kubectl(tmp_path, "evidence.py")


def rolled_out(deployment: Object) -> Object:
    deployment["spec"]["template"]["spec"] = {"containers": [{"name": "server", "image": "registry.example.com/i:1"}]}
    deployment["status"] |= {"observedGeneration": 1, "updatedReplicas": 1, "availableReplicas": 1}
    deployment["metadata"]["generation"] = 1
    return deployment


def release() -> dict[str, Object]:
    """The stable Pod alone."""
    parts = healthy()
    rolled_out(parts["deployment"])
    return parts


def beside(weight: int = 5) -> dict[str, Object]:
    """The stable Pod, a candidate's as healthy, and the route between them."""
    parts = release()
    # Objects like the stable ones, under other names.
    text = json.dumps({name: parts[name] for name in ("deployment", "replicas", "pod", "service", "pieces")})
    text = text.replace('"web', '"web-canary').replace("-web", "-web-canary")
    for name, each in json.loads(text.replace('"track": "stable"', '"track": "canary"')).items():
        parts[f"canary {name}"] = each
    refs = [{"name": "web", "weight": 100 - weight}, {"name": "web-canary", "weight": weight}]
    parts["route"] = thing("HTTPRoute", "web", spec={"rules": [{"backendRefs": refs}]}, status={})
    parts["route"]["status"]["parents"] = [{"conditions": [{"type": "Accepted", "status": "True"}]}]
    return parts


def metrics(ok: int, *, errors: int = 0, refused: int = 0, slow: int = 0, says: tuple[int, int] = (0, 0),
            reference: tuple[float, float] | None = (0.6, 0.4)) -> str:  # fmt: skip
    """/metrics as the server has it: `ok` answers of 10 ms, some of 400 ms, and predictions of two labels."""
    source = Metrics(["/predict"])
    source.requests.labels("/predict", "200").inc(ok + slow)
    source.requests.labels("/predict", "500").inc(errors)
    source.requests.labels("/predict", "503").inc(refused)
    source.rejected.labels("queue_full").inc(refused)
    text = generate_latest(source.registry).decode()
    lines = [line for line in text.splitlines() if not line.startswith("inference_request_duration_seconds_bucket")]
    buckets = [(0.005, 0), (0.01, ok), (0.25, ok), (0.5, ok + slow), (math.inf, ok + slow)]
    for bound, count in buckets:
        le = "+Inf" if math.isinf(bound) else bound
        lines.append(f'inference_request_duration_seconds_bucket{{le="{le}",route="/predict"}} {count}.0')
    for label, count, ratio in zip(('p"os', "neg"), says, reference or (None, None), strict=True):
        escaped = label.replace('"', '\\"')
        lines.append(f'inference_predictions_total{{label="{escaped}"}} {count}.0')
        if ratio is not None:
            lines.append(f'model_reference_prediction_ratio{{label="{escaped}"}} {ratio}')
    return "\n".join(lines) + "\n"


def path_of(pod: str) -> str:
    return f"/api/v1/namespaces/ns/pods/{pod}:8000/proxy/metrics"


class Answer:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        assert not done.stderr, done.stderr
        answer = json.loads(done.stdout)
        self.reason, self.judged = answer["reason"], answer["judged"]
        self.checks: dict[str, Object] = {each["name"]: each for each in answer["checks"]}
        # The exit code is the verdict, and each check that is not well is in the reason.
        assert EXIT[answer["verdict"]] == self.code
        for each in answer["checks"]:
            assert (each["reason"] in self.reason) or each["state"] in ("ok", "-", "wait")

    def state(self, name: str) -> str:
        return str(self.checks[name]["state"])


EXIT = {"promote": PROMOTE, "wait": WAIT, "roll back": ROLL_BACK}
WELL = metrics(2000)


def ask(kubectl: Kubectl, parts: dict[str, Object], stable: str = WELL, canary: str | None = None) -> Answer:
    raw = {path_of(STABLE_POD): [stable]} | ({path_of(CANARY_POD): [canary]} if canary else {})
    return Answer(kubectl.run(list(parts.values()), "--seconds", "0", "--json", raw=raw))


def test_a_candidate_that_does_as_well_as_the_stable_pods_is_promoted(kubectl: Kubectl) -> None:
    answer = ask(kubectl, beside(), metrics(9000, says=(5400, 3600)), metrics(500, says=(290, 210)))

    assert (answer.code, answer.judged) == (PROMOTE, "canary")
    assert answer.checks["requests"]["values"] == {"stable": 9000, "canary": 500}
    assert answer.checks["weight"]["values"] == {"stable": 95, "canary": 5}
    assert answer.checks["predictions"]["values"]["canary"] < 0.01
    assert {each["state"] for each in answer.checks.values()} == {"ok", "-"}


def test_metrics_on_a_port_of_their_own_are_read_there(kubectl: Kubectl) -> None:
    parts = release()
    (container,) = parts["pod"]["spec"]["containers"]
    container["ports"].append({"name": "admin", "containerPort": 9000, "protocol": "TCP"})
    raw = {path_of(STABLE_POD).replace(":8000/", ":9000/"): [WELL]}
    answer = Answer(kubectl.run(list(parts.values()), "--seconds", "0", "--json", raw=raw))

    assert answer.checks["requests"]["values"] == {"stable": 2000}


def test_without_a_candidate_the_release_itself_is_judged(kubectl: Kubectl) -> None:
    well = ask(kubectl, release())
    failing = ask(kubectl, release(), metrics(2000, errors=100))

    assert (well.code, well.judged) == (PROMOTE, "stable")
    assert failing.code == ROLL_BACK
    assert "100 of 2100" in failing.reason


@pytest.mark.parametrize(
    ("canary", "code", "about"),
    [
        (metrics(0), WAIT, "requests"),
        # Even none that fails of 299 does not show that less than 1 % do.
        (metrics(299), WAIT, "requests"),
        (metrics(300), PROMOTE, ""),
        (metrics(9, errors=1), WAIT, "errors"),
        (metrics(297, errors=4), WAIT, "errors"),
        (metrics(500, errors=3), PROMOTE, ""),
        # A candidate that fails wholly is told at once.
        (metrics(0, errors=6), ROLL_BACK, "errors"),
        (metrics(980, errors=30), ROLL_BACK, "errors"),
        # Within the bound, and more often than the stable Pods: none of 2000.
        (metrics(3000, errors=20), ROLL_BACK, "errors"),
        (metrics(500, refused=40), ROLL_BACK, "refused"),
        (metrics(500, slow=100), ROLL_BACK, "p95 seconds"),
        # Some of the first are slow; p95 is not.
        (metrics(980, slow=10), PROMOTE, ""),
    ],
)
def test_requests_decide_when_they_are_enough(kubectl: Kubectl, canary: str, code: int, about: str) -> None:
    answer = ask(kubectl, beside(), WELL, canary)

    assert answer.code == code, answer.reason
    if about:
        assert answer.state(about) == ("wait" if code == WAIT else "bad")


def test_errors_that_the_stable_pods_have_as_often_are_not_the_candidate_s_but_the_bound_holds(
    kubectl: Kubectl,
) -> None:
    alike = ask(kubectl, beside(), metrics(20000, errors=100), metrics(1990, errors=10))
    beyond = ask(kubectl, beside(), metrics(20000, errors=1000), metrics(1900, errors=95))

    assert alike.code == PROMOTE
    assert beyond.code == ROLL_BACK


def test_slower_than_the_stable_pods_is_worse_even_within_the_objective(kubectl: Kubectl) -> None:
    slower = metrics(0, slow=0).replace('le="0.25",route="/predict"} 0.0', 'le="0.25",route="/predict"} 900.0')
    slower = slower.replace('le="0.5",route="/predict"} 0.0', 'le="0.5",route="/predict"} 900.0')
    slower = slower.replace('le="+Inf",route="/predict"} 0.0', 'le="+Inf",route="/predict"} 900.0')
    slower = slower.replace('code="200",route="/predict"} 0.0', 'code="200",route="/predict"} 900.0')

    answer = ask(kubectl, beside(), WELL, slower)

    assert (answer.code, answer.state("p95 seconds")) == (ROLL_BACK, "bad")
    assert "900 of 900 took more than 0.01 s" in answer.reason


SAYS_AS_REFERENCE, SAYS_OTHERWISE = (600, 400), (100, 900)


@pytest.mark.parametrize(
    ("stable", "canary", "reference", "code"),
    [
        (SAYS_AS_REFERENCE, SAYS_OTHERWISE, (0.6, 0.4), ROLL_BACK),
        # All clients ask something else today.
        (SAYS_OTHERWISE, SAYS_OTHERWISE, (0.6, 0.4), WAIT),
        # A new model, with a reference of its own.
        (SAYS_AS_REFERENCE, SAYS_OTHERWISE, (0.1, 0.9), PROMOTE),
        (SAYS_AS_REFERENCE, SAYS_OTHERWISE, None, PROMOTE),
        (SAYS_AS_REFERENCE, (3, 27), (0.6, 0.4), WAIT),
        # A label that is never said.
        (SAYS_AS_REFERENCE, (0, 1000), (0.6, 0.4), ROLL_BACK),
    ],
)
def test_predictions_are_held_to_the_model_s_own_reference(
    kubectl: Kubectl,
    stable: tuple[int, int],
    canary: tuple[int, int],
    reference: tuple[float, float] | None,
    code: int,
) -> None:
    answer = ask(kubectl, beside(), metrics(1000, says=stable), metrics(1000, says=canary, reference=reference))

    assert answer.code == code, answer.reason


def test_a_model_without_labels_has_no_such_check(kubectl: Kubectl) -> None:
    assert "predictions" not in ask(kubectl, beside(), WELL, metrics(500)).checks


def test_the_weight_of_nothing_and_no_requests_is_named(kubectl: Kubectl) -> None:
    answer = ask(kubectl, beside(weight=0), WELL, metrics(0))

    assert (answer.code, answer.state("weight")) == (WAIT, "wait")


def still_rolling(parts: dict[str, Object]) -> None:
    parts["canary deployment"]["status"]["updatedReplicas"] = 0


def unseen(parts: dict[str, Object]) -> None:
    parts["canary deployment"]["metadata"]["generation"] = 2


def stuck(parts: dict[str, Object]) -> None:
    parts["canary deployment"]["status"]["conditions"][1] |= {"status": "False", "reason": "ProgressDeadlineExceeded"}


def invalid_artifact(parts: dict[str, Object]) -> None:
    unready(parts["canary pod"], **crashed(3, message="checksum differs"))
    parts["canary deployment"]["status"]["availableReplicas"] = 0
    parts["canary pieces"]["endpoints"] = None


def restarted(parts: dict[str, Object]) -> None:
    parts["canary pod"]["status"]["containerStatuses"][0] |= {
        "restartCount": 1,
        "lastState": {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": ago(3000)}},
    }


def restarted_long_ago(parts: dict[str, Object]) -> None:
    restarted(parts)
    state = parts["canary pod"]["status"]["containerStatuses"][0]
    state["lastState"]["terminated"]["finishedAt"] = ago(8000)


def no_endpoint(parts: dict[str, Object]) -> None:
    parts["canary pieces"]["endpoints"] = None


def stable_rolls(parts: dict[str, Object]) -> None:
    parts["deployment"]["status"]["updatedReplicas"] = 0


def stable_is_not_well(parts: dict[str, Object]) -> None:
    parts["pod"]["status"]["containerStatuses"][0] |= {
        "restartCount": 1,
        "lastState": crashed(137, "OOMKilled")["lastState"],
    }


@pytest.mark.parametrize(
    ("fault", "code", "about"),
    [
        (still_rolling, WAIT, "rollout"),
        (unseen, WAIT, "rollout"),
        (stuck, ROLL_BACK, "rollout"),
        (invalid_artifact, ROLL_BACK, "faults"),
        (restarted, ROLL_BACK, "restarted"),
        (restarted_long_ago, PROMOTE, ""),
        (no_endpoint, ROLL_BACK, "endpoints"),
        (stable_rolls, WAIT, "rollout"),
        (stable_is_not_well, WAIT, "faults"),
    ],
)
def test_what_the_cluster_says_decides_as_well(kubectl: Kubectl, fault: Any, code: int, about: str) -> None:
    parts = beside()
    fault(parts)

    answer = ask(kubectl, parts, WELL, metrics(500))

    assert answer.code == code, answer.reason
    if about:
        assert about in answer.reason


def test_a_candidate_without_any_pod_waits(kubectl: Kubectl) -> None:
    parts = beside()
    del parts["canary pod"]
    parts["canary pieces"]["endpoints"] = None
    parts["canary deployment"]["status"] |= {"updatedReplicas": 0, "availableReplicas": 0, "replicas": 0}

    assert ask(kubectl, parts).code == WAIT


def test_only_what_comes_within_the_time_counts_and_a_restart_in_it_begins_at_zero(kubectl: Kubectl) -> None:
    raw = {
        path_of(STABLE_POD): [metrics(90000, errors=9000), metrics(90400, errors=9000)],
        # Less than before.
        path_of(CANARY_POD): [metrics(5000), metrics(350)],
    }
    answer = Answer(kubectl.run(list(beside().values()), "--seconds", "1", "--json", raw=raw))

    assert answer.code == PROMOTE
    assert answer.checks["requests"]["values"] == {"stable": 400, "canary": 350}
    assert answer.checks["errors"]["values"] == {"stable": 0, "canary": 0}


def test_the_text_has_both_side_by_side_and_the_reason_at_its_end(kubectl: Kubectl) -> None:
    raw = {path_of(STABLE_POD): [WELL], path_of(CANARY_POD): [metrics(500, errors=50)]}
    done = kubectl.run(list(beside().values()), "--seconds", "0", raw=raw)
    lines = done.stdout.splitlines()

    assert lines[0].split() == ["stable", "canary", "bound"]
    assert any(line.split()[:4] == ["bad", "errors", "0.0", "0.0909"] for line in lines)
    assert lines[-1] == "canary: roll back: errors: 50 of 550, beyond 0.01"


def test_what_it_cannot_say_is_exit_code_2_and_one_line(kubectl: Kubectl) -> None:
    parts = beside()
    second = copy.deepcopy(parts["canary deployment"])
    second["metadata"] |= {"name": "another", "uid": "another"}
    for items, said in (
        (list(parts.values()), "give --prometheus URL"),
        ([*parts.values(), second], "more than one Deployment has track canary"),
        ([parts["client"]], "no Deployment of sentiment-inference with track stable"),
    ):
        done = kubectl.run(items, "--seconds", "0")
        assert done.returncode == UNKNOWN
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    other = kubectl.run(list(parts.values()), "--app", "fraud")
    assert "--app sentiment-inference?" in other.stderr
    for wrong in (("--seconds", "-1"), ("--prometheus", "prometheus:9090"), ("--max-error-ratio", "1")):
        assert kubectl.run([], *wrong).returncode == UNKNOWN
    nobody = kubectl.run(list(parts.values()), "--prometheus", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == UNKNOWN
    assert "gives no answer" in nobody.stderr


class Pod:
    """A stand-in for a Pod's /metrics: each scrape counts on."""

    def __init__(self, **per_scrape: Any) -> None:
        pod = self
        self.scrapes = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                count, pod.scrapes = pod.scrapes, pod.scrapes + 1
                body = metrics(**{name: each * count for name, each in per_scrape.items()}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def target(self, pod: str) -> Object:
        labels = {"namespace": "ns", "pod": pod, "track": "unused"}
        return {"targets": [f"127.0.0.1:{self.server.server_port}"], "labels": labels}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real one that has scraped three Pods, of which one is another service's."""
    binary, folder, port = tool("prometheus", "apt-get install prometheus"), tmp_path_factory.mktemp("p"), free_port()
    pods = [Pod(ok=1000), Pod(ok=900, errors=100), Pod(ok=500)]
    targets = [pod.target(name) for pod, name in zip(pods, (STABLE_POD, CANARY_POD, "other-1-a"), strict=True)]
    configuration = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "pods", "static_configs": targets}],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(configuration))
    process = start(binary, folder, port)
    try:
        url = f"http://127.0.0.1:{port}"
        Prometheus(url).wait_for("count(count_over_time(inference_requests_total[1m]) > 3) >= 3 * 15")
        yield url
    finally:
        process.terminate()
        process.wait()
        for pod in pods:
            pod.server.shutdown()
            pod.server.server_close()


def test_a_real_prometheus_tells_the_tracks_apart_by_their_pods(kubectl: Kubectl, prometheus: str) -> None:
    failing = Answer(kubectl.run(list(beside().values()), "--json", "--prometheus", prometheus))
    alone = Answer(kubectl.run(list(release().values()), "--json", "--prometheus", prometheus))

    assert (failing.code, failing.state("errors")) == (ROLL_BACK, "bad")
    # Increases are extrapolated, and rounded.
    assert failing.checks["errors"]["values"] == {"stable": 0, "canary": pytest.approx(0.1, abs=0.01)}
    assert failing.checks["p50 seconds"]["values"]["canary"] == pytest.approx(0.0075)
    assert (alone.code, alone.judged) == (PROMOTE, "stable")


def test_chance_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(K8S))
    from promotion.chance import at_least, more_often

    assert at_least(5, 10, 0.5) == 1
    assert at_least(10, 10, 0.5) == pytest.approx(2**-10)
    assert at_least(2, 3, 0.1) == pytest.approx(3 * 0.01 * 0.9 + 0.001)
    # All 3 cases on one side of 5 and 5: 10 of the 120 ways to choose them.
    assert more_often(3, 5, 0, 5) == pytest.approx(10 / 120)
    assert more_often(1, 10, 1, 10) == 1
    assert more_often(100, 1_000_000, 10, 1_000_000) < 1e-15
