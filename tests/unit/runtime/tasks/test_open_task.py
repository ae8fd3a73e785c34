"""Which class does the task that a manifest names."""

import re
from importlib import import_module

import pytest

from app.artifact.manifest import ReferenceDistribution
from app.errors import ArtifactError
from app.runtime.tasks import TASKS, open_task
from app.runtime.tasks.text_classification import TextClassification
from tests.unit.runtime.tasks.test_text import artifact


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_class(name):
    module, _, kind = TASKS[name].rpartition(".")
    assert isinstance(getattr(import_module(module), kind), type)


def test_the_task_that_the_manifest_names_is_opened(tmp_path):
    assert type(open_task(artifact(tmp_path), 8)) is TextClassification


def test_a_task_that_nobody_knows_is_refused_and_the_known_ones_are_named(tmp_path):
    said = f"`task`: expected one of {sorted(TASKS)}, found 'guess'"
    with pytest.raises(ArtifactError, match=rf"manifest\.json: {re.escape(said)}"):
        open_task(artifact(tmp_path, task="guess"), 8)


def test_a_reference_of_labels_that_the_task_does_not_predict_is_refused(tmp_path):
    assert open_task(artifact(tmp_path, reference_distribution=ReferenceDistribution(9, {"yes": 1})), 8)
    said = (
        r"manifest\.json: reference_distribution\.ratios: expected only labels that the model predicts, found 'maybe'"
    )
    with pytest.raises(ArtifactError, match=said):
        open_task(artifact(tmp_path, reference_distribution=ReferenceDistribution(9, {"yes": 0.5, "maybe": 0.5})), 8)
