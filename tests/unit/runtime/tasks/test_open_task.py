"""Which class does the task that a manifest names."""

import re
from importlib import import_module

import pytest

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
