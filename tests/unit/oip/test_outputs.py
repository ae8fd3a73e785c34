"""Outputs of the Open Inference Protocol: their largest values."""

import numpy as np
import pytest

from app.artifact.datatypes import DATATYPES
from app.errors import BadRequest, Invalid
from app.oip.outputs import classified
from app.oip.tensors import MAX_STRINGS

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.125, 0.375]], np.float32)
LABELS = ["cat", "dog", "heron"]


def test_the_largest_of_each_row_come_with_value_index_and_label():
    found = classified(SCORES, 2, LABELS, rows=True)
    assert found.tolist() == [["0.700000:1:dog", "0.200000:2:heron"], ["0.500000:0:cat", "0.375000:2:heron"]]


def test_more_than_there_are_are_all_there_are():
    assert classified(SCORES, 99, LABELS, rows=True).shape == (2, 3)


def test_without_a_label_for_each_value_there_is_none():
    assert classified(SCORES, 1, LABELS[:2], rows=True).tolist() == [["0.700000:1"], ["0.500000:0"]]


def test_without_rows_all_values_are_one_list():
    assert classified(SCORES, 2, [], rows=False).tolist() == ["0.700000:1", "0.500000:3"]


@pytest.mark.parametrize("name", [name for name, dtype in DATATYPES.items() if dtype.kind in "iu"])
def test_whole_numbers_are_written_as_such_and_at_their_limits(name):
    limits = np.iinfo(DATATYPES[name])
    found = classified(np.array([[limits.min, limits.max]], limits.dtype), 2, [], rows=True)
    assert found.tolist() == [[f"{limits.max}:1", f"{limits.min}:0"]]


@pytest.mark.parametrize("array", [np.array([["a"]], object), np.array([[True]])])
def test_what_is_no_number_has_no_largest(array):
    with pytest.raises(BadRequest, match="classification"):
        classified(array, 1, [], rows=True)


def test_more_classes_than_anybody_reads_are_refused():
    with pytest.raises(Invalid, match="classification"):
        classified(np.zeros((2, MAX_STRINGS)), MAX_STRINGS, [], rows=True)
