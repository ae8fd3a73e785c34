"""An event loop's lateness, on real loops."""

import asyncio
import time

from app.batching.lag import WEIGHT, EventLoopLag


async def busy(turns: int, seconds: float) -> None:
    for _ in range(turns):
        time.sleep(seconds)  # noqa: ASYNC251 - to be in the loop's way
        await asyncio.sleep(0)


async def test_a_loop_that_is_kept_busy_is_late_and_recovers() -> None:
    lag = EventLoopLag()
    lag.start(asyncio.get_running_loop())
    await busy(40, 0.05)
    late = lag.seconds
    assert late > 0.02
    await asyncio.sleep(1)
    assert lag.seconds < late / 2
    lag.stop()


async def test_one_hiccup_is_not_overload() -> None:
    lag = EventLoopLag()
    lag.start(asyncio.get_running_loop())
    await asyncio.sleep(0.1)
    before = lag.seconds
    started = time.perf_counter()
    await busy(1, 0.1)
    assert lag.seconds <= before + 2 * WEIGHT * (time.perf_counter() - started)
    lag.stop()


async def test_stopped_it_measures_no_more() -> None:
    lag = EventLoopLag()
    lag.start(asyncio.get_running_loop())
    lag.stop()
    await busy(5, 0.02)
    assert lag.seconds == 0.0
