"""Tensors in, one run's tensors, tensors out again; and the golden files that cannot prove that."""

from pathlib import Path

import numpy as np
import pytest

from app.artifact.manifest import Artifact, FileEntry, Golden, Manifest, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.tasks.tensors import TensorTask, as_model_input, load_arrays

INPUTS = [TensorSpec("a", "FP32", [-1, 2]), TensorSpec("b", "INT64", [-1, -1])]


def tensor_task(folder: Path, *, batch_rows: int = 4, **changes: object) -> TensorTask:
    """A task of inputs `a` and `b` and output `y`, with golden rows of five elements if there is no file yet."""
    golden = {"input.a": np.zeros((1, 2), np.float32), "input.b": np.zeros((1, 3), np.int64), "output.y": np.zeros(1)}
    if not (folder / "golden.npz").exists():
        np.savez(folder / "golden.npz", **golden)
    fields: dict = {
        "manifest_version": 1,
        "name": "test",
        "version": "1",
        "task": "tensors",
        "precision": "fp32",
        "model_file": "model.onnx",
        "files": {name: FileEntry("0" * 64, 1) for name in ("model.onnx", "golden.npz")},
        "inputs": INPUTS,
        "outputs": [TensorSpec("y", "FP32", [-1])],
        "golden": Golden(0.1, file="golden.npz"),
    }
    return TensorTask(Artifact(folder, Manifest(**(fields | changes)), "0" * 64), batch_rows)


def ab(rows: int, width: int = 3) -> dict[str, np.ndarray]:
    """Inputs of `tensor_task` whose values differ in every row."""
    return {
        "a": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2),
        "b": np.arange(rows * width, dtype=np.int64).reshape(rows, width),
    }


def test_a_request_is_cut_into_units_no_larger_than_a_batch_and_joined_in_order(tmp_path):
    task = tensor_task(tmp_path, batch_rows=4)
    units = task.encode(ab(10))
    assert [(unit.rows, unit.length) for unit in units] == [(4, 1), (4, 1), (2, 1)]
    results = [{"y": unit.payload["a"]} for unit in units]
    assert np.array_equal(task.respond(units, results)["y"], ab(10)["a"])


def test_units_stacked_into_one_run_are_split_into_the_same_units(tmp_path):
    task = tensor_task(tmp_path)
    payloads = [task.encode(ab(rows))[0].payload for rows in (1, 3, 2)]
    stacked = task.assemble(payloads)
    assert {name: array.shape for name, array in stacked.items()} == {"a": (6, 2), "b": (6, 3)}
    parts = task.split(payloads, {"y": stacked["a"][:, 0], "z": stacked["b"]})
    assert [part["y"].tolist() for part in parts] == [payload["a"][:, 0].tolist() for payload in payloads]
    assert [part["z"].tolist() for part in parts] == [payload["b"].tolist() for payload in payloads]


def test_only_rows_of_the_same_shape_may_share_a_run(tmp_path):
    task = tensor_task(tmp_path)
    first, same, wider = (task.encode(inputs)[0].key for inputs in (ab(1), ab(2), ab(1, width=5)))
    assert first == same
    assert first != wider


def test_a_model_that_does_not_batch_gets_each_request_whole_and_alone(tmp_path):
    task = tensor_task(tmp_path, batching=False, batch_rows=4)
    (one,), (other,) = task.encode(ab(10)), task.encode(ab(10))
    assert one.key != other.key
    outputs = {"y": np.zeros(7)}
    assert task.assemble([one.payload])["a"].shape == (10, 2)
    assert task.split([one.payload], outputs) == [outputs]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"c": np.zeros((2, 2))}, r"expected .*\['a', 'b'\]"),
        ({"a": np.zeros((2, 3))}, r"'a'.*expected \[-1, 2\], found \[2, 3\]"),
        ({"a": np.zeros(2)}, r"'a'.*expected \[-1, 2\], found \[2\]"),
        ({"a": np.zeros((2, 2, 1))}, r"'a'.*expected \[-1, 2\], found \[2, 2, 1\]"),
        ({"a": np.zeros((3, 2))}, r"same first dimension.*found \[2, 3\]"),
        ({"a": np.zeros((0, 2)), "b": np.zeros((0, 3))}, r"at least 1.*found \[0\]"),
    ],
    ids=["unknown name", "fixed size", "rank below", "rank above", "rows differ", "no rows"],
)
def test_tensors_other_than_the_models_are_invalid(tmp_path, change, said):
    with pytest.raises(Invalid, match=said):
        tensor_task(tmp_path).encode(ab(2) | change)


def test_a_missing_input_is_invalid(tmp_path):
    with pytest.raises(Invalid, match=r"expected .*\['a', 'b'\]"):
        tensor_task(tmp_path).encode({"a": np.zeros((1, 2))})


def test_a_row_costs_as_many_golden_rows_as_it_is_large(tmp_path):
    task = tensor_task(tmp_path, batch_rows=4)
    for width, length, rows in [(1, 1, 4), (3, 1, 4), (4, 2, 2), (18, 4, 1), (100, 21, 1)]:
        units = task.encode(ab(9, width))
        assert {unit.length for unit in units} == {length}, width
        assert [unit.rows for unit in units] == [*[rows] * (9 // rows), *[9 % rows] * bool(9 % rows)]
        assert np.array_equal(np.concatenate([unit.payload["b"] for unit in units]), ab(9, width)["b"])


def test_rows_of_fixed_size_cost_the_same_whatever_the_golden_ones_are(tmp_path):
    task = tensor_task(tmp_path, inputs=INPUTS[:1])
    assert {unit.length for unit in task.encode({"a": ab(9)["a"]})} == {1}


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize(("most", "bound"), [(None, 2048), (50, 50)])
def test_a_row_has_a_bound(tmp_path, batching, most, bound):
    task = tensor_task(tmp_path, batching=batching, max_row_elements=most)
    for width in (bound - 2, bound - 1):
        if width + 2 <= bound:
            assert len(task.encode(ab(1, width))) == 1
        else:
            with pytest.raises(Invalid, match=f"at most {bound} elements in a row.*found {bound + 1}"):
                task.encode(ab(1, width))


@pytest.mark.parametrize("shape", [(2,), (4,), ()])
def test_outputs_without_one_row_per_input_row_are_an_error(tmp_path, shape):
    task = tensor_task(tmp_path)
    payloads = [unit.payload for unit in task.encode(ab(3))]
    with pytest.raises(ValueError, match="expected 3 rows"):
        task.split(payloads, {"y": np.zeros(shape)})


def test_a_first_axis_that_is_rows_is_counted_before_encoding(tmp_path):
    assert tensor_task(tmp_path).rows(ab(7)) == 7
    assert tensor_task(tmp_path, batching=False).rows(ab(7)) == 1
    assert tensor_task(tmp_path).rows({"a": np.zeros(())}) == 1
    assert not tensor_task(tmp_path).encodes_slowly(ab(1000))


def test_tensors_of_the_protocol_are_the_models_own_with_strings_decoded(tmp_path):
    task = tensor_task(tmp_path, inputs=[INPUTS[0], TensorSpec("s", "BYTES", [-1])])
    read = task.read({"a": ab(2)["a"], "s": np.array([b"n\xc3\xa9", b""], object)})
    assert read["s"].tolist() == ["n\u00e9", ""]
    assert np.array_equal(read["a"], ab(2)["a"])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": np.zeros((1, 2), np.float32)}, r"expected \['a', 's'\]"),
        ({"a": np.zeros((1, 2)), "s": np.array([b""], object)}, "input 'a': datatype: expected FP32"),
        ({"a": np.zeros((1, 2), np.float32), "s": np.array([1])}, "input 's': datatype: expected BYTES"),
        ({"a": np.zeros((1, 2), np.float32), "s": np.array([b"\xff"], object)}, "input 's': expected UTF-8"),
    ],
    ids=["missing", "float64", "numbers for strings", "no UTF-8"],
)
def test_tensors_of_other_names_or_datatypes_are_invalid(tmp_path, tensors, said):
    task = tensor_task(tmp_path, inputs=[INPUTS[0], TensorSpec("s", "BYTES", [-1])])
    with pytest.raises(Invalid, match=said):
        task.read(tensors)


# --- golden -----------------------------------------------------------------------------------------------------------


def golden_file(folder: Path, **changes: np.ndarray | None) -> None:
    """Three rows, each answered with its first number. `__` stands for the dot in names; None takes one out."""
    arrays = {f"input__{name}": array for name, array in ab(3).items()} | {"output__y": ab(3)["a"][:, 0]} | changes
    kept = {name.replace("__", "."): array for name, array in arrays.items() if array is not None}
    np.savez(folder / "golden.npz", **kept)  # type: ignore[arg-type]


def test_the_golden_file_is_one_case_in_units_no_larger_than_a_batch(tmp_path):
    golden_file(tmp_path)
    (case,) = tensor_task(tmp_path, batch_rows=2).golden()
    assert case.where == "golden.npz"
    assert [unit.rows for unit in case.units] == [2, 1]
    assert {name: array.tolist() for name, array in case.expected.items()} == {"y": [0, 2, 4]}


@pytest.mark.parametrize("name", ["input__b", "output__y"])
def test_an_array_that_the_golden_file_lacks_is_named(tmp_path, name):
    golden_file(tmp_path, **{name: None})
    with pytest.raises(ArtifactError, match=rf"golden\.npz: expected an array {name.replace('__', '.')}, found \["):
        tensor_task(tmp_path).golden()


@pytest.mark.parametrize(
    ("golden", "said"),
    [(Golden(0.1), "`golden.file`: expected an .npz file"), (Golden(0.1, file="o.npz"), "'o.npz' .* not listed")],
    ids=["none", "not listed"],
)
def test_a_manifest_without_a_golden_file_is_refused(tmp_path, golden, said):
    with pytest.raises(ArtifactError, match=rf"manifest\.json: {said}"):
        tensor_task(tmp_path, golden=golden)


@pytest.mark.parametrize("content", [b"", b"PK", b"junk" * 99])
def test_a_file_of_no_arrays_is_refused_by_its_path(tmp_path, content):
    (tmp_path / "golden.npz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"golden\.npz: expected an \.npz file without pickles"):
        load_arrays(tmp_path / "golden.npz")


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path):
    with pytest.raises(ArtifactError, match=r"golden\.npz: cannot be read: No such file"):
        load_arrays(tmp_path / "golden.npz")


@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", np.float32), ("INT64", np.int64), ("BYTES", np.object_)])
def test_arrays_get_the_dtype_that_the_model_takes(datatype, dtype):
    assert as_model_input(np.array([1, 2]), datatype).dtype == dtype


def test_warming_up_takes_one_row_and_as_many_as_a_run_takes(tmp_path):
    golden_file(tmp_path)
    (one,), (many,) = tensor_task(tmp_path).warm_up(4, 1000)
    assert (one.rows, one.length, one.payload["a"].tolist()) == (1, 1, [[0, 1]])
    assert (many.rows, many.length, many.payload["a"].tolist()) == (4, 1, [[0, 1]] * 4)


def test_warming_up_takes_all_rows_where_they_may_not_be_cut(tmp_path):
    golden_file(tmp_path)
    for units in tensor_task(tmp_path, batching=False).warm_up(2, 1000):
        assert [unit.payload["a"].shape for unit in units] == [(3, 2)]
