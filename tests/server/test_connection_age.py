"""Clients that keep their connections, and two replicas. Between them is what kube-proxy is: a replica is chosen for
each connection, and never again while it lasts.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx

from loadtest.client import Client
from loadtest.connection import Answers, Target
from tests.process import NO_TLS, ServerProcess

CLIENTS = 16
ANSWERS = 400
PATIENCE_SECONDS = 60


class Service:
    """Relays each connection to the next of `endpoints`. open: how many each of them has."""

    def __init__(self) -> None:
        self.endpoints: list[int] = []
        self.open: Counter[int] = Counter()
        self._turn = itertools.count()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = self.endpoints[next(self._turn) % len(self.endpoints)]
        self.open[port] += 1
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))
        finally:
            self.open[port] -= 1


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


@asynccontextmanager
async def clients(service: Service) -> AsyncIterator[Client]:
    """So many, each of which asks again when it is answered, on a connection that it keeps."""
    async with await asyncio.start_server(service.relay, "127.0.0.1", 0) as listening:
        target = Target.of(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/predict")
        client = Client(target, [target.post(b'{"text": "It rains."}')])
        client.hold(CLIENTS)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                yield client
        finally:
            await client.close()
            while service.open.total():
                await asyncio.sleep(0.005)


async def answered(client: Client, count: int) -> list[int]:
    """The statuses of the next so many answers."""
    client.answers = answers = Answers()
    while len(answers.statuses) < count:
        await asyncio.sleep(0.005)
    return answers.statuses


async def test_clients_of_one_replica_spread_to_one_that_is_added_and_lose_no_request() -> None:
    first, added = (ServerProcess(max_connection_seconds=0.2) for _ in range(2))
    with first.ready(), added.ready():
        service = Service()
        service.endpoints = [first.port]
        async with clients(service) as client:
            statuses = set(await answered(client, ANSWERS))
            assert service.open == {first.port: CLIENTS}
            service.endpoints.append(added.port)
            # In turn, so half of them once each has connected anew.
            while service.open[added.port] < CLIENTS / 4:
                statuses |= set(await answered(client, 1))
            before = added.metric("inference_requests_total")
            assert statuses | set(await answered(client, ANSWERS)) == {200}
            assert added.metric("inference_requests_total") - before > ANSWERS / 8


async def test_without_an_age_a_replica_that_is_added_relieves_nobody() -> None:
    with ServerProcess(max_connection_seconds=0).ready() as first, ServerProcess().ready() as added:
        service = Service()
        service.endpoints = [first.port]
        async with clients(service) as client:
            await answered(client, ANSWERS)
            service.endpoints.append(added.port)
            assert set(await answered(client, ANSWERS)) == {200}
            assert service.open == {first.port: CLIENTS}


def test_an_old_connection_ends_with_its_answer_in_every_http_process() -> None:
    with ServerProcess(max_connection_seconds=1e-9, http_processes=2).ready() as server:
        for _ in range(8):
            answer = httpx.post(f"{server.url}/predict", json={"text": "It rains."}, verify=NO_TLS)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
