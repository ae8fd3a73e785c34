"""gRPC's server on the event loop that HTTP has: its port and limits, and its end with the service's drain.

Knows no message.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from app.access import ApiKeys
from app.errors import ConfigError
from app.grpc.health import Health
from app.grpc.service import SERVICE, Hook, InferenceService
from app.lifecycle import Lifecycle
from app.request_log import RequestLog
from app.settings import Settings
from app.telemetry.logging import logger
from app.telemetry.metrics import Metrics

# Beyond the request's own timeout, for an answer that is on its way when a connection has reached its age.
AGE_GRACE_SECONDS = 1.0


class Methods(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Which handler a method has."""

    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def service(self, details: Any) -> Any:
        """The handler; None for an unknown method, which is answered UNIMPLEMENTED."""
        return self._handlers.get(details.method)


def options(settings: Settings) -> list[tuple[str, int]]:
    """Of gRPC's core."""
    return [
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        # A connection to a Service is to one Pod for as long as it lasts.
        ("grpc.max_connection_age_ms", int(settings.grpc_max_connection_age_seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", int(settings.request_timeout_ms + AGE_GRACE_SECONDS * 1000)),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # A port that another process has is an error, not shared.
        ("grpc.so_reuseport", 0),
    ]


class GrpcServer:
    """`start`, and at the end of the lifespan `stop`."""

    def __init__(self, server: Any, lifecycle: Lifecycle, grace_seconds: float) -> None:
        self._server = server
        self._lifecycle = lifecycle
        self._grace_seconds = grace_seconds
        self._stopping: asyncio.Task[None] | None = None
        lifecycle.on_change.append(self._follow)

    @classmethod
    async def start(
        cls,
        settings: Settings,
        lifecycle: Lifecycle,
        metrics: Metrics,
        hooks: Sequence[Hook],
        log: RequestLog,
        keys: ApiKeys | None = None,
    ) -> "GrpcServer":
        """Serves from now on. Raises ConfigError naming the address if it cannot be had."""
        service = InferenceService(settings, lifecycle, metrics, hooks, log, keys)
        handlers = service.handlers() | Health(lifecycle, (SERVICE,)).handlers()
        server = grpc.aio.server(handlers=[Methods(handlers)], options=options(settings))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            server.add_insecure_port(f"{host}:{settings.grpc_port}")
        except RuntimeError:
            address = f"APP_HOST={settings.host!r} APP_GRPC_PORT={settings.grpc_port}"
            raise ConfigError(f"{address}: cannot listen there") from None
        await server.start()
        logger().info("listening for gRPC", host=settings.host, port=settings.grpc_port)
        return cls(server, lifecycle, settings.drain_timeout_seconds)

    def _follow(self) -> None:
        """Once new requests are refused, clients are told to go elsewhere, and accepted ones are answered."""
        if self._lifecycle.refusing and self._stopping is None:
            self._stopping = asyncio.create_task(self._server.stop(self._grace_seconds))

    async def stop(self) -> None:
        """Until every accepted request is answered, or the drain's time is over."""
        self._lifecycle.refuse()
        assert self._stopping is not None
        await self._stopping
