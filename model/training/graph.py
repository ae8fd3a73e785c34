"""Builds the classifier's ONNX graph from its weights, already fused, in fp32, fp16 or int8.

Writing the graph down gives the fused operators that ONNX Runtime's optimiser would have to rediscover from a
traced export, the same ones on every run, and lets one function serve the CPU and the CUDA file. Knows nothing of
PyTorch: weights are numpy arrays under their Hugging Face names, which is also how they are read back out of a
committed int8 file.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Weights = dict[str, NDArray[np.float32]]
Scales = dict[str, tuple[float, int]]
CONTRIB = "com.microsoft"
# (opset, IR version). ONNX's own Attention operator, of opset 23, takes less than half the time of ONNX Runtime's
# MultiHeadAttention on a CPU; the CUDA provider has its fused kernels for the older, contributed operators.
OPSETS = {"int8": (23, 10), "fp32": (17, 8), "fp16": (17, 8)}
EPSILON = 1e-12
# Weights keep 7 of 8 bits. With 8, CPUs without VNNI (AVX2 only, still common in clusters) saturate the 16-bit sums of
# two u8 x s8 products and answer differently; the second golden test on such a node would refuse the artifact.
WEIGHT_LIMIT = 63
# Of an embedding row, under one scale.
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """What the weights do not say by themselves."""

    layers: int = 6
    heads: int = 12
    hidden: int = 384


def quantize_columns(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 [in, out] with one float32 scale per output column [out]."""
    scale = np.abs(matrix).max(axis=0) / WEIGHT_LIMIT
    scale[scale == 0] = 1
    return np.round(matrix / scale).astype(np.int8), scale.astype(np.float32)


def quantize_blocks(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 [rows, blocks, BLOCK] with float32 scales [rows, blocks, 1]; looked up, never multiplied, so all 8 bits
    serve."""
    blocks = table.reshape(len(table), -1, BLOCK)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.round(blocks / scale).astype(np.int8), scale.astype(np.float32)


class GraphBuilder:
    """Collects nodes and initializers; one method per block of the network."""

    def __init__(self, weights: Weights, shape: Shape, precision: str, scales: Scales | None) -> None:
        self.weights = weights
        self.shape = shape
        self.precision = precision
        self.scales = scales or {}
        self.float = np.float16 if precision == "fp16" else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.known: set[str] = set()

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        if name not in self.known:
            self.known.add(name)
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name].astype(self.float))

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        # CPU kernels of the fused operators return only what is asked for, so one output each.
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def quantize(self, x: str) -> tuple[str, str, str]:
        """uint8 activations and the names of their scale and zero point, fixed by calibration.

        A fixed scale makes a row's answer independent of the rows it is batched with; a scale taken from each batch
        (dynamic quantisation) does not, and costs one more pass.
        """
        scale, zero = self.scales[x]
        names = (
            self.constant(f"{x}.scale", np.array(scale, np.float32)),
            self.constant(f"{x}.zero_point", np.array(zero, np.uint8)),
        )
        quantized = f"{x}.u8"
        if quantized not in self.known:
            self.known.add(quantized)
            self.node("QuantizeLinear", [x, *names], quantized)
        return quantized, *names

    def quantized_matrix(self, name: str, matrix: NDArray[np.float32]) -> tuple[str, str, str]:
        """Names of the int8 matrix, its scales and its zero points."""
        values, scale = quantize_columns(matrix)
        return (
            self.constant(f"{name}.i8", values),
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", np.zeros(scale.shape, np.int8)),
        )

    def linear(self, x: str, prefix: str, output: str, *, bias: bool) -> str:
        """x [..., in] times the prefix's weight, [..., out]; `bias=False` where a later fused node adds it."""
        matrix = self.weights[f"{prefix}.weight"].T
        if self.precision != "int8":
            y = self.node("MatMul", [x, self.constant(f"{prefix}.matrix", matrix.astype(self.float))], f"{output}.mm")
            return self.node("Add", [y, self.weight(f"{prefix}.bias")], output) if bias else y
        a, a_scale, a_zero = self.quantize(x)
        b, b_scale, b_zero = self.quantized_matrix(prefix, matrix)
        inputs = [a, b, a_scale, b_scale, a_zero, b_zero] + ([self.weight(f"{prefix}.bias")] if bias else [])
        return self.node("MatMulIntegerToFloat", inputs, output, CONTRIB)

    def attention(self, x: str, query: str, mask: str, prefix: str, output: str) -> str:
        """Multi-head attention of `query` [rows, tokens or 1, hidden] over x [rows, tokens, hidden], without its output
        projection."""
        heads = self.shape.heads
        if self.precision == "int8":
            # Three whole products and the attention behind them: ONNX Runtime's QAttention multiplies each head of each
            # row by itself, in pieces too small for the integer kernels. One query needs the mask only once.
            mask = mask if query == x else "mask.keys"
            q, k, v = (
                self.linear(of, f"{prefix}.attention.self.{part}", f"{output}.{part}", bias=True)
                for of, part in ((query, "query"), (x, "key"), (x, "value"))
            )
            return self.node("Attention", [q, k, v, mask], output, q_num_heads=heads, kv_num_heads=heads)
        parts = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
        matrix = np.concatenate([self.weights[f"{part}.weight"].T for part in parts], axis=1).astype(self.float)
        bias = np.concatenate([self.weights[f"{part}.bias"] for part in parts]).astype(self.float)
        inputs = [x, self.constant(f"{prefix}.qkv.matrix", matrix), self.constant(f"{prefix}.qkv.bias", bias), mask]
        return self.node("Attention", inputs, output, CONTRIB, num_heads=heads)

    def mask(self) -> str:
        """What attention takes: int32 [rows, tokens] for the fused operator, bool [rows, 1, tokens, tokens] for
        ONNX's own."""
        if self.precision != "int8":
            return self.node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
        keys = self.node("Cast", ["attention_mask"], "mask.bool", to=TensorProto.BOOL)
        axes, ones = (
            self.constant("mask.axes", np.array([1, 2], np.int64)),
            self.constant("one", np.array([1], np.int64)),
        )
        keys = self.node("Unsqueeze", [keys, axes], "mask.keys")
        shape = self.node("Concat", [ones, ones, self.tokens(), ones], "mask.shape", axis=0)
        return self.node("Expand", [keys, shape], "mask")

    def tokens(self) -> str:
        """The length of the rows, int64 [1]."""
        if "tokens" not in self.known:
            self.known.add("tokens")
            ends = [self.constant(name, np.array([at], np.int64)) for name, at in (("one", 1), ("two", 2))]
            self.node("Slice", [self.node("Shape", ["input_ids"], "ids.shape"), *ends], "tokens")
        return "tokens"

    def skip_norm(self, x: str, skip: str, bias: str | None, prefix: str, output: str) -> str:
        """LayerNorm(x + skip + bias)."""
        norm = [self.weight(f"{prefix}.LayerNorm.weight"), self.weight(f"{prefix}.LayerNorm.bias")]
        if self.precision == "int8":
            # On CPUs the fused operator is scalar code, several times slower than a vectorised LayerNormalization
            # behind a sum; `Sum`, because ONNX Runtime would fuse an `Add` back into it.
            return self.normalize(self.node("Sum", [x, skip], f"{output}.sum"), norm, output)
        extra = [self.weight(bias)] if bias else []
        return self.node("SkipLayerNormalization", [x, skip, *norm, *extra], output, CONTRIB, epsilon=EPSILON)

    def normalize(self, x: str, norm: list[str], output: str) -> str:
        return self.node("LayerNormalization", [x, *norm], output, epsilon=EPSILON, axis=-1)

    def embeddings(self, ids: str) -> str:
        """Token plus position embeddings, normalised: [rows, tokens, hidden]."""
        prefix = "bert.embeddings"
        table = self.weights[f"{prefix}.word_embeddings.weight"]
        if self.precision == "int8":
            # A scale for each block of a row: a per-table one would round the small rows away.
            values, scale = quantize_blocks(table)
            rows = self.node("Gather", [self.constant("words.i8", values), ids], "words.rows")
            rows = self.node("Cast", [rows], "words.float", to=TensorProto.FLOAT)
            scales = self.node("Gather", [self.constant("words.scale", scale), ids], "words.row_scale")
            blocks = self.node("Mul", [rows, scales], "words.blocks")
            flat = self.constant("words.shape", np.array([0, 0, -1], np.int64))
            words = self.node("Reshape", [blocks, flat], "words")
        else:
            words = self.node("Gather", [self.constant("words.table", table.astype(self.float)), ids], "words")
        # Token type is always 0 for one text, so its row folds into the position table.
        positions = self.weights[f"{prefix}.position_embeddings.weight"]
        positions = positions + self.weights[f"{prefix}.token_type_embeddings.weight"][0]
        zero = self.constant("zero", np.array([0], np.int64))
        table_name = self.constant("positions.table", positions.astype(self.float))
        places = self.node("Slice", [table_name, zero, self.tokens(), zero], "positions")
        summed = self.node("Add", [words, places], "embeddings.sum")
        norm = [self.weight(f"{prefix}.LayerNorm.weight"), self.weight(f"{prefix}.LayerNorm.bias")]
        return self.normalize(summed, norm, "embeddings")

    def layer(self, index: int, x: str, mask: str) -> str:
        prefix = f"bert.encoder.layer.{index}"
        name = f"layer{index}"
        fused = self.precision != "int8"
        if index < self.shape.layers - 1:
            context = self.attention(x, x, mask, prefix, f"{name}.context")
        else:
            # Only the first token is classified: the rest of the last layer need not be computed for the others.
            first = self.constant("first", np.array([0], np.int64))
            one = self.node("Gather", [x, first], f"{x}.first", axis=1)
            self.scales[one] = self.scales.get(x, (1.0, 0))
            context = self.attention(x, one, mask, prefix, f"{name}.context" + ("" if fused else ".first"))
            if fused:
                context = self.node("Gather", [context, first], f"{name}.context.first", axis=1)
            x = one
        out = f"{prefix}.attention.output"
        y = self.linear(context, f"{out}.dense", f"{name}.projected", bias=not fused)
        x = self.skip_norm(y, x, f"{out}.dense.bias" if fused else None, out, f"{name}.attended")
        up = f"{prefix}.intermediate.dense"
        y = self.linear(x, up, f"{name}.up", bias=not fused)
        if fused:
            y = self.node("BiasGelu", [y, self.weight(f"{up}.bias")], f"{name}.gelu", CONTRIB)
        else:
            y = self.node("Gelu", [y], f"{name}.gelu")
        down = f"{prefix}.output"
        y = self.linear(y, f"{down}.dense", f"{name}.down", bias=not fused)
        return self.skip_norm(y, x, f"{down}.dense.bias" if fused else None, down, f"{name}.output")

    def head(self, x: str) -> str:
        """Pooler and classifier over x [rows, 1, hidden]; probabilities float32 [rows, labels]."""
        axis = self.constant("squeeze.axis", np.array([1], np.int64))
        x = self.node("Squeeze", [x, axis], "first.row")
        for prefix, output in (("bert.pooler.dense", "pooled"), ("classifier", "logits")):
            matrix = self.constant(f"{prefix}.matrix", self.weights[f"{prefix}.weight"].T.astype(self.float))
            x = self.node("Gemm", [x, matrix, self.weight(f"{prefix}.bias")], output)
            if output == "pooled":
                x = self.node("Tanh", [x], "pooled.tanh")
        if self.precision == "fp16":
            x = self.node("Cast", [x], "logits.float", to=TensorProto.FLOAT)
        return self.node("Softmax", [x], "probabilities", axis=-1)


def build(
    weights: Weights, precision: str, shape: Shape | None = None, scales: Scales | None = None
) -> onnx.ModelProto:
    """The classifier as ONNX: int64 `input_ids` and `attention_mask` [rows, tokens] → float32 `probabilities`
    [rows, labels].

    precision: "fp32", "fp16" or "int8"; int8 needs `scales`, each activation's (scale, zero point) from calibration.
    Raises onnx.checker.ValidationError if the graph does not check.
    """
    shape = shape or Shape()
    builder = GraphBuilder(weights, shape, precision, dict(scales or {}))
    mask = builder.mask()
    x = builder.embeddings("input_ids")
    for index in range(shape.layers):
        x = builder.layer(index, x, mask)
    builder.head(x)
    labels = weights["classifier.bias"].shape[0]
    graph = helper.make_graph(
        builder.nodes,
        "sentiment",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", labels])],
        builder.initializers,
    )
    opset, ir_version = OPSETS[precision]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="model.training")
    onnx.checker.check_model(model)
    return model


def activations(shape: Shape) -> list[str]:
    """Names of the tensors that int8 matrices multiply, so the ones to calibrate."""
    last = shape.layers - 1
    names = ["embeddings"]
    for index in range(shape.layers):
        first = ".first" if index == last else ""
        names += [f"layer{index}.context{first}", f"layer{index}.attended", f"layer{index}.gelu"]
        names += [f"layer{index}.output"] if index < last else []
    return names


def weights_of(model: onnx.ModelProto) -> Weights:
    """The inverse of `build` for a committed file: float32 weights, dequantised where the file holds int8."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights: Weights = {}
    for name, value in values.items():
        if name == "words.i8":
            table = value * values["words.scale"]
            weights["bert.embeddings.word_embeddings.weight"] = table.reshape(len(table), -1)
        elif name == "words.table":
            weights["bert.embeddings.word_embeddings.weight"] = value
        elif name == "positions.table":
            weights["bert.embeddings.position_embeddings.weight"] = value
        elif name.endswith(".i8"):
            matrix = (value * values[f"{name[:-3]}.scale"]).T
            weights |= _split(name[:-3], matrix, "weight")
        elif name.endswith(".matrix"):
            weights |= _split(name.removesuffix(".matrix"), value.T, "weight")
        elif name.endswith(".qkv.bias"):
            weights |= _split(name.removesuffix(".bias"), value, "bias")
        elif name.endswith((".weight", ".bias")):
            weights[name] = value
    hidden = weights["classifier.weight"].shape[1]
    weights["bert.embeddings.token_type_embeddings.weight"] = np.zeros((1, hidden), np.float32)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}


def _split(prefix: str, value: NDArray[np.float32], kind: str) -> Weights:
    if not prefix.endswith(".qkv"):
        return {f"{prefix}.{kind}": value}
    layer = prefix.removesuffix(".qkv")
    parts = np.split(value, 3, axis=0)
    names = ("query", "key", "value")
    return {f"{layer}.attention.self.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
