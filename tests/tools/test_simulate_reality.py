"""Real replica processes behind the balancer: that it balances and resizes, and that the simulator foresees them."""

import asyncio

import numpy as np
import pytest

from loadtest.client import Client
from loadtest.connection import Answers, Target
from loadtest.shapes import shape
from loadtest.simulate.fleet import Timeline
from tests.tools import reality
from tests.tools.balancer import Balancer, standin
from tests.tools.compare import Observed, compare


async def answered(client, count):
    while len(client.answers.statuses) < count:
        await asyncio.sleep(0.01)


async def test_the_balancer_spreads_requests_evenly_and_loses_none_when_a_replica_stops():
    async with Balancer(standin(servers=4, seconds=0.02), pending_seconds=0.0) as balancer:
        balancer.resize(3)
        await balancer.until_ready(3)
        target = Target.of(f"http://127.0.0.1:{balancer.port}/")
        client = Client(target, [target.post(b"{}")])
        client.hold(9)
        await answered(client, 50)
        assert {backend.in_flight for backend in balancer.ready} <= {1, 2, 3, 4, 5}
        stopped = balancer.backends[-1]
        balancer.resize(2)
        await asyncio.wait_for(stopped.process.wait(), 10)
        await answered(client, len(client.answers.statuses) + 50)
        client.hold(0)
        await client.drain(10)
        await client.close()
        assert set(client.answers.statuses) == {200}


async def test_a_replica_that_is_stopped_while_it_starts_leaves_no_process():
    async with Balancer(standin(servers=1, seconds=0.01), pending_seconds=0.0) as balancer:
        balancer.resize(1)
        backend = balancer.backends[0]
        while backend.process is None:
            await asyncio.sleep(0.001)
        balancer.resize(0)
        await asyncio.wait_for(backend.process.wait(), 10)
        assert balancer.ready == []


async def test_without_a_ready_replica_the_balancer_says_so():
    async with Balancer(standin(servers=1, seconds=0.01), pending_seconds=60.0) as balancer:
        target = Target.of(f"http://127.0.0.1:{balancer.port}/")
        client, answers = Client(target, [target.post(b"{}")]), Answers()
        await client.arrive(shape("constant", 50, 50, 0.3), answers)
        await client.drain(10)
        await client.close()
        assert set(answers.statuses) == {503}


def test_errors_are_what_they_are_called():
    at = [i / 10 for i in range(40)]
    line = Timeline(at, [50.0] * 40, [4] * 40, [4] * 40, [110.0] * 40, [1.0] * 40, [0.0] * 40, 0.1)
    rng = np.random.default_rng(0)
    due = list(np.linspace(0, 3.99, 400))
    seen = Observed(at=at, ready=[5] * 40, due=due, latency_ms=list(rng.permutation([100.0] * 400)))
    errors, rows = compare([line], seen, 4.0)
    assert len(rows) == 2
    assert errors.p95_median_relative == pytest.approx(0.1)
    assert errors.replicas_mean_absolute == 1
    assert errors.replicas_relative == pytest.approx(0.2)


# It measures, and a busy machine starts processes late.
@pytest.mark.soak
async def test_the_simulator_foresees_how_many_replicas_there_are():
    errors, figure = await reality.run(seconds=40.0, base=30.0, peak=180.0)
    assert errors.seconds_compared >= 30
    assert errors.replicas_relative < 0.6
    assert len(figure.axes) == 3
