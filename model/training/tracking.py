"""MLflow, if MLFLOW_TRACKING_URI names a server: parameters, metrics and run.json. Training never waits long for it and
never fails for it; run.json has the same facts.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.training.record import Run, code_revision, digest_of

URI_VARIABLE = "MLFLOW_TRACKING_URI"
# MLflow's own would hold a training step for minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class Tracker:
    """Of one run, which goes on as the same in MLflow when it is resumed with its `run_id`. Does nothing if `active` is
    false or no server is named."""

    def __init__(self, run: Run, run_id: str | None, *, active: bool) -> None:
        self.run_id = run_id
        self._mlflow: Any = None
        if active and os.environ.get(URI_VARIABLE):
            self._try(lambda: self._start(run))

    def _start(self, run: Run) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        tags = {"command": run.command, "code_revision": code_revision(), "data_sha256": digest_of(dict(run.data))}
        tags |= {f"parent_{name}": str(value) for name, value in run.parent.items() if isinstance(value, str)}
        started = mlflow.start_run(run_id=self.run_id, run_name=f"{run.command} {run.fingerprint}", tags=tags)
        if not self.run_id:
            mlflow.log_params({**run.recipe, "processes": run.processes})
        self.run_id, self._mlflow = started.info.run_id, mlflow

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._mlflow and self._mlflow.log_metrics(dict(values), step=step))

    def end(self, *, finished: bool, record: Path | None = None) -> None:
        """record: run.json, which goes there too."""
        if record:
            self._try(lambda: self._mlflow and self._mlflow.log_artifact(str(record)))
        self._try(lambda: self._mlflow and self._mlflow.end_run("FINISHED" if finished else "KILLED"))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        # Whatever it raises: a run of hours does not end because what watches it is away.
        except Exception as error:
            print(f"{URI_VARIABLE}: {type(error).__name__}; the run goes on, its facts are in run.json", flush=True)
