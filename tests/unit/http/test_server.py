"""Listening sockets; the rest of a server's life is in test_lifecycle."""

import socket

import pytest

from app.errors import ConfigError
from app.http.server import listen


def test_sockets_on_one_address_share_its_port_and_nobody_else_may() -> None:
    sockets = listen("127.0.0.1", 0, 3)
    try:
        (address,) = {sock.getsockname() for sock in sockets}
        with pytest.raises(ConfigError, match=str(address[1])):
            listen(*address, 2)
        with socket.create_connection(address):
            pass
    finally:
        for sock in sockets:
            sock.close()
