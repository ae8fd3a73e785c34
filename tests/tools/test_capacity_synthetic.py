"""Capacity found on servers whose capacity is known by construction: fixed service time, batches, collapse.

What is compared with numbers takes a machine with time for it: part of `make soak`.
"""

import asyncio
from contextlib import asynccontextmanager

import msgspec
import pytest

from loadtest.capacity.measure import closed_step, open_step
from loadtest.capacity.run import run
from loadtest.capacity.schema import Options
from loadtest.client import Client
from loadtest.connection import Target

QUICK = Options(slo_p95_ms=150, max_in_flight=32, min_step_seconds=0.5, max_step_seconds=1.0, start_seconds=1.0)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def serving(handle):
    """A server on loopback; `await handle()` says what each request is answered. Yields its URL."""

    async def serve(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                writer.write(await handle())
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predict"


def fixed(servers, seconds):
    """`servers` at once, each request takes `seconds`: capacity servers/seconds, knee at `servers`."""
    free = asyncio.Semaphore(servers)

    async def handle():
        async with free:
            await asyncio.sleep(seconds)
        return ANSWER

    return handle


def batching(rows, seconds):
    """One runner takes up to `rows` waiting requests, whose run takes `seconds` however many they are: capacity
    rows/seconds; a full batch runs while the next waits, so throughput is full at `rows` in flight at the earliest."""
    waiting = []
    running = False

    async def run():
        nonlocal running
        running = True
        while waiting:
            batch = [waiting.pop(0) for _ in range(min(rows, len(waiting)))]
            await asyncio.sleep(seconds)
            for future in batch:
                if not future.done():
                    future.set_result(ANSWER)
            await asyncio.sleep(0)  # who was answered may ask again before the next batch is taken
        running = False

    tasks = set()

    async def handle():
        future = asyncio.get_running_loop().create_future()
        waiting.append(future)
        if not running:
            task = asyncio.ensure_future(run())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return await future

    return handle


def collapsing(servers, seconds, healthy):
    """As `fixed`, but every request beyond `healthy` in flight slows all of them: more load, less throughput."""
    free = asyncio.Semaphore(servers)
    present = 0

    async def handle():
        nonlocal present
        present += 1
        try:
            async with free:
                await asyncio.sleep(seconds * (1 + max(0, present - healthy) / 4))
        finally:
            present -= 1
        return ANSWER

    return handle


def refusing(servers, seconds, admitted):
    """As `fixed`, but refuses at once what would be more than `admitted` in flight."""
    inner = fixed(servers, seconds)
    present = 0

    async def handle():
        nonlocal present
        if present >= admitted:
            return REFUSAL
        present += 1
        try:
            return await inner()
        finally:
            present -= 1

    return handle


async def measured(handle, **options):
    async with serving(handle) as url:
        chosen = msgspec.structs.replace(QUICK, **options)
        return await run(Target.of(url), chosen)


@pytest.fixture(scope="module")
def reports():
    """All servers at once: they and their clients mostly sleep."""

    async def all_of_them():
        runs = {
            "fixed": measured(fixed(servers=4, seconds=0.05)),
            "steady traffic": measured(fixed(servers=6, seconds=0.05), growth_percent_per_second=0.0),
            "batching": measured(batching(rows=8, seconds=0.04)),
            "collapsing": measured(collapsing(servers=8, seconds=0.05, healthy=12)),
            "refusing": measured(refusing(servers=4, seconds=0.05, admitted=8)),
            "bursts": measured(refusing(servers=6, seconds=0.025, admitted=6), max_in_flight=8),
            "too slow": measured(fixed(servers=2, seconds=0.05), slo_p95_ms=20.0),
        }
        return dict(zip(runs, await asyncio.gather(*runs.values()), strict=True))

    return asyncio.run(all_of_them())


@pytest.mark.soak
def test_a_server_with_a_fixed_service_time_is_measured_within_ten_percent(reports):
    report = reports["fixed"]
    assert report.findings.peak_rps == pytest.approx(4 / 0.05, rel=0.1)
    assert report.findings.knee_in_flight == pytest.approx(4, rel=0.1)
    assert report.derivation.target_in_flight <= 4
    assert report.derivation.target_rps < 4 / 0.05


@pytest.mark.soak
def test_however_slowly_traffic_grows_the_target_stays_under_the_knee(reports):
    report = reports["steady traffic"]
    assert report.findings.peak_rps == pytest.approx(6 / 0.05, rel=0.1)
    assert report.derivation.growth_factor == 1
    assert 0 < report.derivation.target_in_flight <= 6


@pytest.mark.soak
def test_a_batch_server_is_measured_within_ten_percent(reports):
    report = reports["batching"]
    assert report.findings.peak_rps == pytest.approx(8 / 0.04, rel=0.1)
    # Whoever asks while a batch runs waits for the next: throughput is full somewhere between one batch and two.
    assert 8 * 0.9 <= report.findings.knee_in_flight <= 16
    assert report.derivation.target_in_flight <= 8


@pytest.mark.soak
def test_a_server_that_collapses_is_measured_at_its_best_and_the_target_stays_away_from_the_cliff(reports):
    report = reports["collapsing"]
    assert report.findings.peak_rps == pytest.approx(8 / 0.05, rel=0.1)
    # When the eight in service end together, twelve of twenty are left: no more than `healthy`.
    assert report.findings.peak_in_flight <= 20
    assert report.findings.knee_in_flight <= 8 * 1.1
    assert report.derivation.target_in_flight <= 8


@pytest.mark.soak
def test_refusals_are_not_throughput_and_end_what_is_within_the_objective(reports):
    report = reports["refusing"]
    assert report.findings.peak_rps == pytest.approx(4 / 0.05, rel=0.1)
    assert report.findings.objective_in_flight <= 8
    assert any(step.refused for step in report.steps if step.in_flight > 8)


@pytest.mark.soak
def test_a_server_that_is_too_slow_alone_gets_no_target(reports):
    report = reports["too slow"]
    assert report.derivation is None
    assert report.findings.objective_in_flight is None
    assert report.findings.peak_rps == pytest.approx(2 / 0.05, rel=0.1)


@pytest.mark.soak
def test_arrivals_that_come_in_bursts_lower_the_rate_until_it_holds(reports):
    # 240 rps while six clients wait for each other; of arrivals at 240 × 0.55 rps one in twenty finds six there.
    report = reports["bursts"]
    assert report.findings.objective_rps == pytest.approx(6 / 0.025, rel=0.1)
    assert 0 < report.findings.open_loop_rps < 0.55 * report.findings.objective_rps
    assert 0 < report.derivation.target_rps < report.findings.open_loop_rps


async def test_answers_of_one_load_do_not_count_for_the_next():
    async with serving(fixed(servers=8, seconds=0.2)) as url:
        target = Target.of(url)
        client = Client(target, [target.post(b"{}")])
        await closed_step(client, None, 8, Options(min_step_seconds=0.2, max_step_seconds=0.2))
        client.hold(0)
        assert client.in_flight == 8
        step = await open_step(client, None, 10.0, 0.5)
        await client.close()
    # Seeded: those of ten a second that are due in the last four tenths of a second.
    assert step.requests + step.errors < 8


async def test_a_load_that_piles_up_ends_at_once_and_has_failed():
    async def never():
        await asyncio.Event().wait()

    async with serving(never) as url:
        target = Target.of(url)
        client = Client(target, [target.post(b"{}")])
        step = await open_step(client, None, 200.0, 3600.0, 10.0)
        await client.close()
    assert step.requests == 0
    assert step.errors > 100  # half a second's
    assert not step.holds(Options(slo_p95_ms=1e9))
