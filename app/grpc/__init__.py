"""The Open Inference Protocol over gRPC, over the same predictor as HTTP. The modules here take the extra `grpc`."""

from importlib.util import find_spec

from app.errors import ConfigError
from app.settings import Settings

# Of metrics and log lines.
LABEL = "grpc_model_infer"


def require(settings: Settings) -> None:
    """Raises ConfigError where these settings and this installation cannot serve gRPC."""
    if settings.http_processes > 1:
        raise ConfigError(f"APP_HTTP_PROCESSES={settings.http_processes}: expected 1 with APP_GRPC_PORT")
    if settings.role == "gateway":
        raise ConfigError(f"APP_GRPC_PORT={settings.grpc_port}: expected 0 with APP_ROLE=gateway, which has no model")
    if find_spec("grpc") is None:
        raise ConfigError("APP_GRPC_PORT: the extra `grpc` is not installed; pip install grpcio protobuf")
