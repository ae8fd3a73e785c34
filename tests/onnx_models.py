"""Small real ONNX models of different shapes, built here so that the tests need no files from elsewhere."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = [helper.make_opsetid("", 17)]
PRODUCT_WIDTH = 16


def save(path: Path, nodes: list, inputs: list, outputs: list, **initializers: np.ndarray) -> Path:
    """Checks and writes a graph; `initializers` by name."""
    tensors = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def tensor(name: str, shape: list, kind: int = TensorProto.FLOAT):
    """One input or output; strings in `shape` are dimensions that vary."""
    return helper.make_tensor_value_info(name, kind, shape)


def mlp(path: Path, features: int = 4, classes: int = 3) -> Path:
    """float32 features [rows, features] → scores [rows, classes]."""
    rng = np.random.default_rng(1)
    return save(
        path,
        [
            helper.make_node("Gemm", ["features", "w1", "b1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["scores"]),
        ],
        [tensor("features", ["rows", features])],
        [tensor("scores", ["rows", classes])],
        w1=rng.standard_normal((features, 8), np.float32),
        b1=rng.standard_normal(8, np.float32),
        w2=rng.standard_normal((8, classes), np.float32),
        b2=rng.standard_normal(classes, np.float32),
    )


def image(path: Path) -> Path:
    """float32 pixels [rows, 3, height, width] → classes [rows, 5]: convolution, global pooling."""
    rng = np.random.default_rng(2)
    return save(
        path,
        [
            helper.make_node("Conv", ["pixels", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["classes"]),
        ],
        [tensor("pixels", ["rows", 3, "height", "width"])],
        [tensor("classes", ["rows", 5])],
        kernel=rng.standard_normal((5, 3, 3, 3), np.float32),
    )


def two_outputs(path: Path) -> Path:
    """int64 a [rows, 2] and float32 b [rows, 2] → total float32 [rows, 2], largest int64 [rows]."""
    return save(
        path,
        [
            helper.make_node("Cast", ["a"], ["af"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["af", "b"], ["total"]),
            helper.make_node("ArgMax", ["total"], ["largest"], axis=1, keepdims=0),
        ],
        [tensor("a", ["rows", 2], TensorProto.INT64), tensor("b", ["rows", 2])],
        [tensor("total", ["rows", 2]), tensor("largest", ["rows"], TensorProto.INT64)],
    )


def lookup(path: Path) -> Path:
    """int64 index [rows] → float32 value [rows]; fails on an index of 10 or more, so one bad row can be made."""
    return save(
        path,
        [helper.make_node("Gather", ["table", "index"], ["value"])],
        [tensor("index", ["rows"], TensorProto.INT64)],
        [tensor("value", ["rows"])],
        table=np.arange(10, dtype=np.float32),
    )


def identity(path: Path, kind: int) -> Path:
    """x [rows, 2] → y [rows, 2], unchanged, of the ONNX type `kind`."""
    return save(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [tensor("x", ["rows", 2], kind)],
        [tensor("y", ["rows", 2], kind)],
    )


def classifier(
    path: Path, labels: int = 2, tokens: int = 100, table: np.ndarray | None = None, products: int = 0
) -> Path:
    """int64 input_ids, attention_mask [rows, tokens] → logits float32 [rows, labels]: the sum of what each token has in
    `table`, float32 [tokens, labels], which is random if not given.

    products: of 16 x 16 for each token, which change nothing but take time, a run as much as its rows: with 2500, rows
    that share a run take a fraction of what they take alone, as in a transformer.
    """
    if table is None:
        table = np.random.default_rng(3).standard_normal((tokens, labels), np.float32)
    labels = table.shape[1]
    width = PRODUCT_WIDTH if products else labels
    layers = [f"layer{number}" for number in range(products + 1)]
    weights = {"table": np.pad(table, ((0, 0), (0, width - labels))), "narrow": np.eye(width, labels, dtype=np.float32)}
    if products:
        weights["same"] = np.eye(width, dtype=np.float32)
    return save(
        path,
        [
            helper.make_node("Gather", ["table", "input_ids"], layers[:1]),
            *(helper.make_node("MatMul", [before, "same"], [after]) for before, after in pairwise(layers)),
            helper.make_node("MatMul", [layers[-1], "narrow"], ["embedded"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["embedded", "mask3"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "middle"], ["logits"], keepdims=0),
        ],
        [tensor(name, ["rows", "tokens"], TensorProto.INT64) for name in ("input_ids", "attention_mask")],
        [tensor("logits", ["rows", labels])],
        **weights,
        last=np.array([2], np.int64),
        middle=np.array([1], np.int64),
    )
