"""Probes and the scrape: /live, /ready, /metrics. They never wait for the model."""

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder


async def live(request: Request) -> Response:
    """200 while the process can make progress; 503 when a runner is stuck."""
    stuck = request.app.state.lifecycle.stuck()
    return JSONResponse({"error": stuck}, 503) if stuck else JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """200 once the model has passed every check; 503 with the stage before, and while draining."""
    lifecycle = request.app.state.lifecycle
    if lifecycle.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"error": "not ready", "stage": lifecycle.stage}, 503, {"retry-after": "1"})


async def metrics(request: Request) -> Response:
    """Prometheus text; OpenMetrics, which has exemplars, for who asks for that."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(await request.app.state.metrics_source.render(encode), media_type=media_type)
