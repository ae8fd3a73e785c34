"""The classifier's graph: it computes what its weights say, in each precision, and gives the weights back."""

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from model.training.graph import BLOCK, EPSILON, WEIGHT_LIMIT, Scales, Shape, Weights, activations, build, weights_of

SMALL = Shape(layers=2, heads=4, hidden=256)
WORDS, PLACES, LABELS, WIDE = 50, 24, 3, 384
# What rounding every activation to 8 bits and every weight to 7 may cost a probability of so small a network.
INT8_TOLERANCE = 0.04


def small_weights() -> Weights:
    """Random weights of a network that is small, but has every part, under their Hugging Face names."""
    rng = np.random.default_rng(6)

    def random(*shape: int, scale: float = 0.3) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    hidden = SMALL.hidden
    weights: Weights = {}

    def dense(name: str, out: int, into: int) -> None:
        weights[f"{name}.weight"] = random(out, into, scale=1.7 / math.sqrt(into))
        weights[f"{name}.bias"] = random(out)

    def norm(name: str) -> None:
        weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"] = 1 + random(hidden), random(hidden)

    for name, rows in (("word", WORDS), ("position", PLACES), ("token_type", 2)):
        weights[f"bert.embeddings.{name}_embeddings.weight"] = random(rows, hidden)
    norm("bert.embeddings")
    for index in range(SMALL.layers):
        layer = f"bert.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{part}", hidden, hidden)
        dense(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output")
        dense(f"{layer}.intermediate.dense", WIDE, hidden)
        dense(f"{layer}.output.dense", hidden, WIDE)
        norm(f"{layer}.output")
    dense("bert.pooler.dense", hidden, hidden)
    dense("classifier", LABELS, hidden)
    return weights


class Reference:
    """BERT for sequence classification as its paper has it, one text at a time, in float64."""

    def __init__(self, weights: Weights) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        # The range of every activation that int8 rounds, by its name in the graph.
        self.ranges: dict[str, tuple[float, float]] = {}

    def saw(self, name: str, x: np.ndarray) -> np.ndarray:
        low, high = self.ranges.get(name, (0.0, 0.0))
        self.ranges[name] = (min(low, x.min()), max(high, x.max()))
        return x

    def dense(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        return scaled * self.weights[f"{name}.LayerNorm.weight"] + self.weights[f"{name}.LayerNorm.bias"]

    def attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        q, k, v = (
            np.stack(np.split(self.dense(x, f"{layer}.attention.self.{part}"), SMALL.heads, axis=-1))
            for part in ("query", "key", "value")
        )
        scores = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
        return np.concatenate(list(scores @ v), axis=-1)

    def probabilities(self, ids: list[int]) -> np.ndarray:
        tables = {name: self.weights[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position")}
        kind = self.weights["bert.embeddings.token_type_embeddings.weight"][0]
        x = self.norm(tables["word"][ids] + tables["position"][: len(ids)] + kind, "bert.embeddings")
        self.saw("embeddings", x)
        for index in range(SMALL.layers):
            layer, name = f"bert.encoder.layer.{index}", f"layer{index}"
            first = ".first" if index == SMALL.layers - 1 else ""
            context = self.saw(f"{name}.context{first}", self.attention(x, layer))
            x = self.norm(x + self.dense(context, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
            up = self.dense(self.saw(f"{name}.attended", x), f"{layer}.intermediate.dense")
            wide = self.saw(f"{name}.gelu", up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2)
            x = self.saw(f"{name}.output", self.norm(x + self.dense(wide, f"{layer}.output.dense"), f"{layer}.output"))
        return softmax(self.dense(np.tanh(self.dense(x[0], "bert.pooler.dense")), "classifier"))


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


ROWS = [[2, 9, 3], [2, 40, 11, 25, 8, 3], [2, 3], [2, *range(4, 24), 3], [2, 17, 17, 17, 3]]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return small_weights()


@pytest.fixture(scope="module")
def expected(weights) -> np.ndarray:
    return np.stack([Reference(weights).probabilities(row) for row in ROWS])


@pytest.fixture(scope="module")
def scales(weights) -> Scales:
    """Each activation's scale and zero point, from its range over the very rows that are tested."""
    reference = Reference(weights)
    for row in ROWS:
        reference.probabilities(row)
    found: Scales = {}
    for name in activations(SMALL):
        low, high = reference.ranges[name]
        scale = (high - low) / 255
        found[name] = (scale, round(-low / scale))
    return found


@pytest.fixture(scope="module")
def graphs(weights, scales) -> dict[str, onnx.ModelProto]:
    return {
        precision: build(dict(weights), precision, SMALL, scales if precision == "int8" else None)
        for precision in ("fp32", "fp16", "int8")
    }


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: ort.InferenceSession, rows: list[list[int]], width: int = 0, filler: int = 0) -> np.ndarray:
    """The answers to rows run together, padded to the longest or `width` with `filler`."""
    width = max(width, *map(len, rows))
    ids = np.array([row + [filler] * (width - len(row)) for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
    (probabilities,) = model.run(["probabilities"], {"input_ids": ids, "attention_mask": mask})
    return probabilities


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 0.01), ("int8", INT8_TOLERANCE)])
def test_each_precision_computes_the_network_its_weights_describe(graphs, expected, precision, tolerance):
    model = session(graphs[precision])
    found = np.concatenate([run(model, [row]) for row in ROWS])
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < tolerance


def test_the_rows_tested_have_different_answers(expected):
    assert (expected.max(axis=0) - expected.min(axis=0)).max() > 10 * INT8_TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_row_is_answered_the_same_alone_beside_others_and_in_any_padding(graphs, precision):
    model = session(graphs[precision])
    alone = np.concatenate([run(model, [row]) for row in ROWS])
    tolerance = {"fp32": 1e-6, "fp16": 1e-3, "int8": 1e-3}[precision]
    assert np.abs(run(model, ROWS) - alone).max() < tolerance
    assert np.abs(run(model, ROWS[::-1])[::-1] - alone).max() < tolerance
    assert np.abs(run(model, ROWS, width=PLACES, filler=WORDS - 1) - alone).max() < tolerance


def folded(weights: Weights) -> Weights:
    """The same network, with the embedding of token type 0 added to each position's."""
    kind = weights["bert.embeddings.token_type_embeddings.weight"]
    places = weights["bert.embeddings.position_embeddings.weight"] + kind[0]
    return weights | {
        "bert.embeddings.position_embeddings.weight": places,
        "bert.embeddings.token_type_embeddings.weight": np.zeros((1, SMALL.hidden), np.float32),
    }


def test_the_weights_read_back_from_fp32_are_the_ones_it_was_built_from(graphs, weights):
    read, original = weights_of(graphs["fp32"]), folded(weights)
    assert set(read) == set(original)
    for name, value in original.items():
        assert read[name].dtype == np.float32
        assert np.array_equal(read[name], value), name


def test_the_weights_read_back_from_fp16_are_those_rounded_to_it(graphs, weights):
    read, original = weights_of(graphs["fp16"]), folded(weights)
    assert set(read) == set(original)
    for name, value in original.items():
        assert np.array_equal(read[name], value.astype(np.float16).astype(np.float32)), name


def test_the_weights_read_back_from_int8_are_within_half_a_step(graphs, weights):
    read, original = weights_of(graphs["int8"]), folded(weights)
    assert set(read) == set(original)
    rounded = []
    for name, value in original.items():
        if np.array_equal(read[name], value):
            continue
        rounded.append(name)
        # One step for each output of a matrix, weights being [out, in], and for each block of a word's row.
        words = "word_embeddings" in name
        rows = value.reshape(-1, BLOCK) if words else value
        half = np.abs(rows).max(axis=1, keepdims=True) / (127 if words else WEIGHT_LIMIT) / 2
        assert (np.abs(read[name].reshape(rows.shape) - rows) <= half * 1.001).all(), name
    dense = 6 * SMALL.layers
    assert len(rounded) == dense + 1
    assert all(name.endswith(".weight") for name in rounded)


def test_an_int8_file_rebuilt_from_its_own_weights_is_the_same_file(graphs, scales):
    rebuilt = build(weights_of(graphs["int8"]), "int8", SMALL, scales)
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for model in (graphs["int8"], rebuilt)
    )
    assert list(before) == list(after)
    for name, value in before.items():
        if value.dtype.kind == "f":
            assert np.allclose(value, after[name], rtol=1e-6, atol=0), name
        else:
            assert np.array_equal(value, after[name]), name


def test_what_is_derived_from_the_int8_file_answers_as_the_float_network_of_its_weights(graphs):
    weights = weights_of(graphs["int8"])
    expected = np.stack([Reference(weights).probabilities(row) for row in ROWS])
    found = run(session(build(weights, "fp32", SMALL)), ROWS)
    assert np.abs(found - expected).max() < 1e-5


def test_int8_matrices_leave_a_bit_of_room_for_older_processors(graphs):
    matrices = [
        numpy_helper.to_array(tensor)
        for tensor in graphs["int8"].graph.initializer
        if tensor.name.endswith(".i8") and tensor.name != "words.i8"
    ]
    assert matrices
    # Two products of u8 and s8 must fit 16 signed bits.
    assert max(int(np.abs(matrix).max()) for matrix in matrices) * 255 * 2 < 2**15
