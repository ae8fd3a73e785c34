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


def text_model(
    path: Path,
    *,
    size: int,
    per_token: bool = False,
    positions: int = 0,
    types: bool = False,
    rank: int = 2,
    activation: str = "",
    scale: float = 1.0,
    tokens: int = 100,
) -> Path:
    """int64 input_ids, attention_mask (and token_type_ids if `types`) [rows, tokens] → scores float32 [rows, size], of
    rank 1 [rows], or `per_token` [rows, tokens, size]; where tokens stand matters, and fails, if there are `positions`.

    Every token of a row counts in each of its scores, and padding in none that is not padding's own.
    """
    rng = np.random.default_rng(4)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    weights = {
        "table": rng.standard_normal((tokens, size), np.float32) * np.float32(scale),
        "last": np.array([2], np.int64),
        "middle": np.array([1], np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
    }
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["words"])]
    embedded = "words"
    if types:
        weights["type_table"] = rng.standard_normal((2, size), np.float32)
        nodes += [
            helper.make_node("Gather", ["type_table", "token_type_ids"], ["typed"]),
            helper.make_node("Add", [embedded, "typed"], ["with_types"]),
        ]
        embedded = "with_types"
    if positions:
        weights["position_table"] = rng.standard_normal((positions, size), np.float32)
        nodes += [
            helper.make_node("Shape", ["input_ids"], ["shape"]),
            helper.make_node("Gather", ["shape", "one"], ["count"]),
            helper.make_node("Range", ["zero", "count", "one"], ["places"]),
            helper.make_node("Gather", ["position_table", "places"], ["placed"]),
            helper.make_node("Mul", [embedded, "placed"], ["with_positions"]),
        ]
        embedded = "with_positions"
    nodes += [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", [embedded, "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["pooled"], keepdims=int(per_token)),
    ]
    found = "pooled"
    if per_token:
        nodes += [
            helper.make_node("Mul", ["pooled", "tenth"], ["context"]),
            helper.make_node("Add", [embedded, "context"], ["in_context"]),
        ]
        weights["tenth"], found = np.array(0.1, np.float32), "in_context"
    if activation:
        nodes.append(helper.make_node(activation, [found], ["active"]))
        found = "active"
    if rank == 1:
        nodes.append(helper.make_node("Squeeze", [found, "middle"], ["flat"]))
        found = "flat"
    nodes.append(helper.make_node("Identity", [found], ["scores"]))
    shape = ["rows", "tokens", size] if per_token else ["rows", size][:rank]
    inputs = [tensor(name, ["rows", "tokens"], TensorProto.INT64) for name in names]
    used = {name for node in nodes for name in node.input}
    return save(path, nodes, inputs, [tensor("scores", shape)], **{k: v for k, v in weights.items() if k in used})


def images(path: Path, *, layout: str = "NCHW", size: int = 8, labels: int = 3) -> Path:
    """float32 pixels [rows, 3, size, size], or [rows, size, size, 3] → scores float32 [rows, labels]: linear."""
    rng = np.random.default_rng(5)
    shape = ["rows", 3, size, size] if layout == "NCHW" else ["rows", size, size, 3]
    return save(
        path,
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
        ],
        [tensor("pixels", shape)],
        [tensor("scores", ["rows", labels])],
        weights=rng.standard_normal((3 * size * size, labels), np.float32) / np.float32(size),
    )


def few_rows(path: Path, most: int = 8) -> Path:
    """float32 x [rows, 2] → y [rows, 2]; fails on more rows than `most`, as a file exported with a fixed batch does."""
    return save(
        path,
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["count"]),
            helper.make_node("Range", ["zero", "count", "one"], ["rows"]),
            helper.make_node("Gather", ["table", "rows"], ["known"]),
            helper.make_node("Add", ["x", "known"], ["y"]),
        ],
        [tensor("x", ["rows", 2])],
        [tensor("y", ["rows", 2])],
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
        table=np.zeros((most, 2), np.float32),
    )
