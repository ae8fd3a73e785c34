"""The page's state over real processes; tests/page opens it in a browser."""

from collections.abc import Iterator

import httpx
import pytest

from tests.process import NO_TLS, START_SECONDS, ServerProcess
from tests.text_model import NAME

TEXTS = ["a fine day", "an awful day", "so so"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def processes(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with ServerProcess(http_processes=request.param, max_queue_wait_ms=600_000, request_timeout_ms=600_000) as process:
        yield process.ready()


def test_the_state_is_that_of_all_processes(processes):
    before = processes.get("/state").json()["totals"]
    for text in TEXTS:
        answer = httpx.post(f"{processes.url}/predict", json={"text": text}, verify=NO_TLS, timeout=START_SECONDS)
        assert answer.status_code == 200
    # Each on a connection of its own, and so of either process.
    for _ in range(4):
        state = processes.get("/state").json()
        totals = state["totals"]
        assert (state["stage"], state["model"]["name"]) == ("ready", NAME)
        assert totals["requests"]["200"] - before["requests"].get("200", 0) == len(TEXTS)
        assert totals["answered"] - before["answered"] == totals["rows"] - before["rows"] == len(TEXTS)
        assert totals["runner_busy_seconds"] > before["runner_busy_seconds"]


def test_a_server_without_the_page_answers_404():
    with ServerProcess(page="false") as process:
        process.ready()
        assert [process.get(path).status_code for path in ("/", "/state", "/page/page.js")] == [404] * 3
        assert process.get("/docs").status_code == 200
