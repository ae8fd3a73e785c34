"""Checkpoints on a disk: one file for each, whole or not there, the last two kept. Knows nothing of what is in them but
the run that they belong to.
"""

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.errors import ConfigError
from model.training.storage import sync

KEEP = 2


class Checkpoints:
    """Of one run, in a folder of its own."""

    def __init__(self, folder: Path, run: str) -> None:
        """run: its fingerprint, which a checkpoint must have."""
        self.folder, self._run = folder, run

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Written aside, forced to the disk, renamed; then older ones go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step:09}.pt"
        aside = path.with_suffix(".tmp")
        torch.save({"run": self._run, **state}, aside)
        sync(aside)
        aside.replace(path)
        sync(self.folder)
        for old in self._found()[:-KEEP]:
            old.unlink()

    def latest(self) -> dict[str, Any] | None:
        """The newest that can be read; the one before it, if a disk lost what it had promised to keep.

        Raises ConfigError if it is another run's.
        """
        for path in reversed(self._found()):
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            # Whatever a damaged file makes of the reader.
            except Exception as error:
                print(f"{path}: cannot be read ({type(error).__name__}); trying the one before", flush=True)
                continue
            if state["run"] != self._run:
                raise ConfigError(
                    f"{path}: of another run: other data, recipe, parent or number of processes; name another folder "
                    "with --checkpoints, or remove this one"
                )
            print(f"resuming from {path}", flush=True)
            return state
        return None

    def clear(self) -> None:
        """Removes them all, and nothing else that may be on their volume: the run has its result."""
        for pattern in ("*.pt", "*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink()
        with suppress(OSError):  # a volume's own folder stays
            self.folder.rmdir()

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"))


def random_state() -> dict[str, Any]:
    """Of every generator of this process."""
    numbers: Any = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (numbers[1].tolist(), *numbers[2:]),  # the safe reader of checkpoints knows no arrays
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """As `random_state` found it."""
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
