"""The same shards on a Ray cluster: a Ray Data pipeline whose actors hold one model each. Takes the extra `ray`.

Plan, names and markers are those of one process, so that either goes on with what the other began.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import ray

from app.errors import StartupError
from app.scoring.commit import Marker
from app.scoring.run import Scorer
from app.scoring.start import Options, open_scorer
from app.settings import Settings, cpu_quota


class ShardScorer:
    """One actor: the model through the gate once, then shards as they come."""

    def __init__(self, options: Options, settings: Settings) -> None:
        self._options, self._settings = options, settings
        self._scorer: Scorer | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: numbers of shards. Their markers, or the error that ends the run, as Ray would wrap an exception."""
        answer: dict[str, Any] = {"markers": "[]", "error": "", "exit_code": 0}
        try:
            self._scorer = self._scorer or open_scorer(self._options, self._settings)
            answer["markers"] = msgspec.json.encode(list(self._scorer.score(batch["shard"].tolist()))).decode()
        except StartupError as error:
            answer |= {"error": str(error), "exit_code": error.exit_code}
        return {name: np.array([value]) for name, value in answer.items()}


def score_on_ray(options: Options, settings: Settings, shards: list[int], actors: int) -> Iterator[Marker]:
    """Scores the shards on the cluster at RAY_ADDRESS, with as many actors. Raises as `Scorer.score`."""
    ray.init(logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=max(1, len(shards)))
    answers = found.map_batches(
        ShardScorer,
        fn_constructor_args=(options, settings),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpu_quota() if settings.runners == "auto" else settings.runners,
        num_gpus=1 if settings.provider == "cuda" else None,
    )
    for row in answers.iter_rows():
        if row["exit_code"]:
            error = StartupError(row["error"])
            error.exit_code = row["exit_code"]
            raise error
        yield from msgspec.json.decode(row["markers"], type=list[Marker])
