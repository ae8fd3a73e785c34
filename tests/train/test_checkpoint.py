"""Checkpoints on a disk: what is kept, and what a crash in the middle of writing leaves."""

import random

import numpy as np
import pytest
import torch

from app.errors import ConfigError
from model.training.checkpoint import Checkpoints, random_state, set_random_state


def numbers() -> list[object]:
    return [random.random(), float(np.random.random()), np.random.normal(), torch.rand(3).tolist()]


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    kept = Checkpoints(tmp_path / "new" / "folder", "mine")
    assert kept.latest() is None
    for step in (9, 10, 100):
        kept.save(step, {"weights": torch.full((2,), float(step))})
    assert sorted(path.name for path in kept.folder.iterdir()) == ["000000010.pt", "000000100.pt"]
    found = kept.latest()
    assert found is not None
    assert found["weights"].tolist() == [100.0, 100.0]
    (kept.folder / "notes.txt").touch()
    kept.clear()
    assert [path.name for path in kept.folder.iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, "mine")
    kept.save(1, {"value": 1})

    def cut_off(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(OSError, match="No space"):
        kept.save(2, {"value": 2})
    found = kept.latest()
    assert found is not None
    assert found["value"] == 1


def test_another_runs_checkpoint_is_refused(tmp_path):
    Checkpoints(tmp_path, "mine").save(1, {})
    with pytest.raises(ConfigError, match="of another run"):
        Checkpoints(tmp_path, "yours").latest()


def test_generators_go_on_from_where_they_were(tmp_path):
    np.random.normal()  # which leaves one in reserve
    kept = Checkpoints(tmp_path, "mine")
    kept.save(1, {"generators": random_state()})
    expected = numbers()
    assert numbers() != expected
    found = kept.latest()
    assert found is not None
    set_random_state(found["generators"])
    assert numbers() == expected
