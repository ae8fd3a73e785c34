"""The listening socket; the rest of a server's life is in tests/server/test_lifecycle.py."""

import socket

import pytest

from app.errors import ConfigError
from app.http.server import listen


def test_a_port_is_bound_once_and_nobody_else_may_have_it() -> None:
    with listen("127.0.0.1", 0) as sock:
        address = sock.getsockname()
        with pytest.raises(ConfigError, match=str(address[1])):
            listen(*address)
        with socket.create_connection(address):
            pass
