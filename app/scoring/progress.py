"""How far a run is: a bar on a terminal, a line of the log for each shard elsewhere, counters for whoever scrapes."""

import sys
import time
from types import TracebackType

from prometheus_client import CollectorRegistry, start_http_server
from tqdm import tqdm

from app.scoring.commit import Marker
from app.telemetry import logging
from app.telemetry.metrics import ScoringMetrics


class Progress:
    """A context manager, so that a terminal is left in order."""

    def __init__(self, metrics_port: int) -> None:
        """metrics_port: where to answer scrapes; 0: nowhere."""
        registry = CollectorRegistry()
        self._metrics = ScoringMetrics(registry)
        self._bar = tqdm(unit=" rows", smoothing=0.05, disable=not sys.stderr.isatty())
        self._since = time.monotonic()
        if metrics_port:
            start_http_server(metrics_port, registry=registry)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()

    def expect(self, rows: int) -> None:
        """So many are to be scored."""
        self._bar.reset(rows)
        self._since = time.monotonic()

    def count(self, scored: int, bad: int) -> None:
        """Rows are done."""
        self._bar.update(scored + bad)
        self._metrics.scored.inc(scored)
        self._metrics.bad.inc(bad)

    def shard(self, marker: Marker) -> None:
        """A shard counts now."""
        self._metrics.shards.inc()
        since, self._since = self._since, time.monotonic()
        if self._bar.disable:
            rows, seconds = {"rows": marker.rows, "bad_rows": marker.bad_rows}, round(self._since - since, 3)
            logging.logger().info("shard", shard=marker.shard, **rows, seconds=seconds)
