"""Keys, the admin port and CORS, as clients of a real process meet them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.process import NO_TLS, START_SECONDS, ServerProcess, free_port

KEY, OTHER = "the-key-of-the-shop", "a-key-of-the-garden"
ORIGIN = "https://shop.example.com"
TEXT = {"text": "the heron waits"}


class Guarded(ServerProcess):
    """With keys, an admin port of its own and an origin."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "keys"
        self.keys.write_text(f"shop:{KEY}\ngarden:{OTHER}\n")
        self.admin = free_port()
        super().__init__(
            api_keys_file=self.keys, admin_port=self.admin, cors_origins=f"{ORIGIN}, https://other.example"
        )

    def ask(
        self, method: str, path: str, key: str | None = None, *, admin: bool = False, **more: Any
    ) -> httpx.Response:
        url = f"http://127.0.0.1:{self.admin}" if admin else self.url
        headers = more.pop("headers", {}) | ({} if key is None else {"authorization": f"Bearer {key}"})
        return httpx.request(method, url + path, headers=headers, verify=NO_TLS, timeout=START_SECONDS, **more)

    def counted(self, client: str) -> float:
        text = self.ask("GET", "/metrics", admin=True).text
        line = f'inference_client_requests_total{{client="{client}",code="200"}} '
        return float(next(each for each in text.splitlines() if each.startswith(line)).removeprefix(line))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with Guarded(tmp_path_factory.mktemp("keys")) as server:
        server.ready()
        yield server


def test_inference_takes_a_key_and_probes_do_not(guarded: Guarded):
    assert guarded.ask("POST", "/predict", KEY, json=TEXT).status_code == 200
    for key in (None, "wrong", KEY[:-1]):
        refused = guarded.ask("POST", "/predict", key, json=TEXT)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"].startswith("expected `Authorization: Bearer`")
        assert guarded.ask("GET", "/v2", key).status_code == 401
    for path in ("/live", "/ready", "/v2/health/ready"):
        assert guarded.ask("GET", path).status_code == 200


def test_logs_and_metrics_say_who_asked_and_no_key(guarded: Guarded):
    before = guarded.counted("garden")
    answer = guarded.ask("POST", "/predict", OTHER, json=TEXT)
    assert guarded.request_log(answer.headers["x-request-id"])["client"] == "garden"
    assert guarded.counted("garden") == before + 1
    refused = guarded.ask("POST", "/predict", "somebody-elses-key", json=TEXT)
    assert "client" not in guarded.request_log(refused.headers["x-request-id"])
    said = guarded.output() + guarded.errors() + guarded.ask("GET", "/metrics", admin=True).text
    for key in (KEY, OTHER, "somebody-elses-key"):
        assert key not in said


def test_metrics_documentation_and_page_are_on_the_admin_port_alone(guarded: Guarded):
    for path in ("/metrics", "/docs", "/docs/docs.css", "/openapi.json", "/", "/state", "/page/page.js"):
        assert guarded.ask("GET", path, KEY).status_code == 404
        assert guarded.ask("GET", path, admin=True).status_code == 200
    # The page asks where it is.
    assert guarded.ask("POST", "/predict", KEY, admin=True, json=TEXT).status_code == 200
    assert guarded.ask("POST", "/predict", admin=True, json=TEXT).status_code == 401
    for path in ("/live", "/ready"):
        assert guarded.ask("GET", path, admin=True).status_code == 200


def test_a_page_of_an_allowed_origin_may_ask(guarded: Guarded):
    preflight = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    allowed = guarded.ask("OPTIONS", "/predict", headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert guarded.ask("OPTIONS", "/predict", headers=preflight | {"origin": "https://else.example"}).status_code == 400
    answer = guarded.ask("POST", "/predict", KEY, json=TEXT, headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_new_key_holds_without_a_restart_and_an_old_one_no_more(tmp_path: Path):
    with Guarded(tmp_path) as server:
        server.ready()
        server.keys.write_text("shop:another-key-of-the-shop\n")
        while server.ask("POST", "/predict", "another-key-of-the-shop", json=TEXT).status_code != 200:
            assert server.process.poll() is None
        assert server.ask("POST", "/predict", KEY, json=TEXT).status_code == 401


def test_what_does_not_go_together_or_cannot_be_read_is_exit_code_2(tmp_path: Path):
    for settings, line in (
        ({"api_keys_file": tmp_path / "nowhere"}, "nowhere: cannot be read"),
        ({"admin_port": free_port(), "http_processes": 2}, "expected 1 with APP_ADMIN_PORT"),
    ):
        with ServerProcess(**settings) as server:  # type: ignore[arg-type]
            assert server.wait() == 2
            assert line in server.errors()
