"""Jobs that wait in Redis or Valkey for a worker. The modules here take the extra `queue`."""

from importlib.util import find_spec

from app.errors import ConfigError


def require_library() -> None:
    """Raises ConfigError where the extra is not installed."""
    if find_spec("redis") is None:
        raise ConfigError("APP_QUEUE_URL: the extra `queue` is not installed; pip install redis")
