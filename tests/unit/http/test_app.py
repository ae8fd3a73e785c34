"""What is added to the application is around every route, inference included; hooks hold for all but probes."""

import asyncio

import pytest
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, StreamingResponse
from structlog.testing import capture_logs

from app.errors import Forbidden, Unauthorized
from app.http import middleware
from app.http.routes import ROUTES, Route
from app.runtime.session import Model
from tests.text_model import NAME, VERSION
from tests.unit.http.asgi import PREDICT, Client, Served, held, until
from tests.unit.http.test_connection import connected, leave

KEY, ORIGIN = "a-key", "https://shop.example"
# Of what is asked for here: 404 is a route of another task, 400 and 422 one that takes another body.
ANSWERS = (200, 400, 404, 422)
PAGES = ("/docs", "/openapi.json", "/nowhere")


def path_of(route: Route) -> str:
    return route.path.format(model_name=NAME, model_version=VERSION, job_id="0" * 32)


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


# --- middleware -------------------------------------------------------------------------------------------------------


class KeyRequired:
    """Pure ASGI: 401 to all that comes without the key."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != f"Bearer {KEY}".encode():
            await JSONResponse({"error": "no key"}, 401)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Stamping(BaseHTTPMiddleware):
    """Adds a header to every answer."""

    async def dispatch(self, request: Request, call_next):
        response = await call_next(request)
        response.headers["x-stamp"] = "stamped"
        return response


@pytest.mark.parametrize("route", ROUTES, ids=named)
async def test_an_authenticating_middleware_is_around_every_route(reviews: Model, route: Route) -> None:
    async with Served(reviews) as served:
        served.app.add_middleware(KeyRequired)
        refused = await served.ask(path_of(route), route.method, PREDICT)
        assert (refused.status, refused.body) == (401, {"error": "no key"})
        admitted = await served.ask(path_of(route), route.method, PREDICT, authorization=f"Bearer {KEY}")
        assert admitted.status != 401


async def test_what_a_middleware_refuses_costs_no_inference(reviews: Model) -> None:
    async with Served(reviews) as served:
        served.app.add_middleware(KeyRequired)
        client = Client(PREDICT)
        await served(client)
        assert client.asked == 0
        assert served.in_flight == served.sample("inference_batch_rows_count") == 0


@pytest.mark.parametrize(
    ("path", "method", "body", "status"),
    [
        ("/predict", "POST", PREDICT, 200),
        ("/predict", "POST", b"{", 400),
        ("/predict", "GET", b"", 405),
        ("/v2/models/another/infer", "POST", b'{"inputs": []}', 404),
        ("/live", "GET", b"", 200),
        ("/nowhere", "GET", b"", 404),
    ],
)
async def test_cors_headers_reach_answers_and_errors(
    reviews: Model, path: str, method: str, body: bytes, status: int
) -> None:
    async with Served(reviews) as served:
        served.app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN], expose_headers=["x-model"])
        client = await served.ask(path, method, body, origin=ORIGIN)
        assert client.status == status
        assert client.headers["access-control-allow-origin"] == ORIGIN
        assert client.headers["access-control-expose-headers"] == "x-model"
        other = await served.ask(path, method, body, origin="https://elsewhere.example")
        assert "access-control-allow-origin" not in other.headers


async def test_a_browser_may_ask_first(reviews: Model) -> None:
    async with Served(reviews) as served:
        served.app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN], allow_methods=["POST"])
        preflight = {"origin": ORIGIN, "access_control_request_method": "POST"}
        client = await served.ask("/predict", "OPTIONS", **preflight)
        assert (client.status, client.headers["access-control-allow-origin"]) == (200, ORIGIN)


@pytest.mark.parametrize("route", ROUTES, ids=named)
async def test_a_middleware_of_starlettes_own_kind_is_around_every_route(reviews: Model, route: Route) -> None:
    async with Served(reviews) as served:
        served.app.add_middleware(Stamping)
        client = await served.ask(path_of(route), route.method, PREDICT)
        assert client.status in ANSWERS
        assert client.headers["x-stamp"] == "stamped"


async def test_a_middleware_that_fails_is_500_in_the_one_shape(reviews: Model) -> None:
    class Failing(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next):
            raise ValueError("it failed")

    async with Served(reviews) as served:
        served.app.add_middleware(Failing)
        client = Client(PREDICT)
        with pytest.raises(ValueError, match="it failed"):  # for the server's log
            await served(client)
        assert (client.status, client.body) == (500, {"error": "internal error"})


async def test_behind_a_middleware_a_client_that_leaves_is_still_noticed(reviews: Model) -> None:
    async with Served(model := held(reviews)) as served:
        served.app.add_middleware(Stamping)
        client = Client(PREDICT)
        task = asyncio.create_task(served(client))
        await until(lambda: model.entered)
        client.leave()
        await until(lambda: served.requests(499) == 1)
        assert served.in_flight == 0
        assert served.rejected("client_closed") == 1
        await task


@pytest.mark.parametrize("stamped", [False, True])
async def test_a_connection_that_is_lost_is_noticed_with_and_without_a_middleware(
    reviews: Model, stamped: bool
) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    async with Served(model := held(reviews)) as served:
        if stamped:
            served.app.add_middleware(Stamping)
        with capture_logs() as lines:
            async with connected(served.app) as (_, writer):
                writer.write(head % len(PREDICT) + PREDICT)
                await until(lambda: model.entered)
                leave(writer)
                await until(lambda: served.requests(499) == 1)
                assert served.in_flight == 0
        assert [line["event"] for line in lines] == ["request"]


async def test_an_answer_that_is_made_as_it_goes_comes_through_a_middleware_and_the_connection(reviews: Model) -> None:
    go_on = asyncio.Event()

    async def parts():
        yield b"first"
        await go_on.wait()
        yield b"second"

    async with Served(reviews) as served:
        served.app.add_api_route("/stream", lambda: StreamingResponse(parts()))
        served.app.add_middleware(Stamping)
        async with connected(served.app) as (reader, writer):
            writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"x-stamp: stamped" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readuntil(b"first\r\n")
            go_on.set()
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"6\r\nsecond")


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that a hook was asked about; it lets only those in who have the key, and nobody in to /v2."""
    paths = []

    async def require_key(connection: HTTPConnection) -> None:
        paths.append(connection.url.path)
        if connection.headers.get("authorization") != f"Bearer {KEY}":
            raise Unauthorized("a key is needed")
        if connection.url.path == "/v2":
            raise Forbidden("not for you")
        if connection.headers.get("x-teapot"):
            raise HTTPException(418, "a teapot", {"X-Spout": "short"})

    monkeypatch.setattr(middleware, "HOOKS", (require_key,))
    return paths


@pytest.mark.parametrize("route", ROUTES, ids=named)
async def test_hooks_hold_for_every_route_that_is_not_exempt(reviews: Model, asked: list[str], route: Route) -> None:
    async with Served(reviews) as served:
        client = await served.ask(path_of(route), route.method, PREDICT)
        if route.exempt:
            assert (client.status, asked) == (200, [])
            return
        assert (client.status, client.body, asked) == (401, {"error": "a key is needed"}, [path_of(route)])
        assert client.headers["www-authenticate"] == "Bearer"
        assert client.headers["x-request-id"]
        admitted = await served.ask(path_of(route), route.method, PREDICT, authorization=f"Bearer {KEY}")
        assert admitted.status == 403 if route.path == "/v2" else admitted.status in ANSWERS


@pytest.mark.parametrize("path", PAGES)
async def test_hooks_hold_for_pages_too(reviews: Model, asked: list[str], path: str) -> None:
    async with Served(reviews) as served:
        assert (await served.ask(path)).status == 401


def test_probes_and_metrics_alone_are_exempt() -> None:
    exempt = {route.path for route in ROUTES if route.exempt}
    assert exempt == {"/live", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready"}


async def test_what_a_hook_refuses_is_counted_and_its_body_is_not_read(reviews: Model, asked: list[str]) -> None:
    async with Served(reviews) as served:
        client = Client(PREDICT)
        await served(client)
        assert (client.status, client.asked, client.headers["connection"]) == (401, 0, "close")
        assert served.requests(401) == served.rejected("unauthorized") == 1


@pytest.mark.parametrize("path", ["/predict", "/v2/models/stats"])
async def test_a_hook_may_refuse_with_fastapis_own_exception(reviews: Model, asked: list[str], path: str) -> None:
    async with Served(reviews) as served:
        method = "POST" if path == "/predict" else "GET"
        client = await served.ask(path, method, PREDICT, authorization=f"Bearer {KEY}", x_teapot="1")
        assert (client.status, client.body) == (418, {"error": "a teapot"})
        assert client.headers["x-spout"] == "short"
