"""What an ONNX file's graph says beyond its inputs and outputs: which operators it ends in. Runs nothing.

Source: onnx.proto3 (ModelProto, GraphProto, NodeProto).
"""

import mmap
from pathlib import Path
from typing import NamedTuple

from app.artifact.external_data import messages

GRAPH, NODE = 7, 1
INPUT, OUTPUT, OPERATOR = 1, 2, 4
# Operators that change no value of their first input, but for rounding.
TRANSPARENT = {
    "Cast", "DequantizeLinear", "Flatten", "Gather", "Identity", "QuantizeLinear", "Reshape", "Slice", "Squeeze",
    "Transpose", "Unsqueeze",
}  # fmt: skip
QUANTIZED = {"ConvInteger", "DequantizeLinear", "MatMulInteger", "QGemm", "QLinearConv", "QLinearMatMul"}


class Node(NamedTuple):
    operator: str
    inputs: list[str]
    outputs: list[str]


def read_nodes(path: Path) -> list[Node]:
    """The nodes of the file's main graph, in its order. The file is one that ONNX Runtime loads."""
    nodes = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for field, start, end in messages(data, 0, len(data)):
            if field != GRAPH:
                continue
            for part, first, last in messages(data, start, end):
                if part == NODE:
                    texts: dict[int, list[str]] = {INPUT: [], OUTPUT: [], OPERATOR: [""]}
                    for key, begin, stop in messages(data, first, last):
                        if key in texts:
                            texts[key].append(data[begin:stop].decode())
                    nodes.append(Node(texts[OPERATOR][-1], texts[INPUT], texts[OUTPUT]))
    return nodes


def ends_in(nodes: list[Node], output: str) -> str:
    """The operator that computes `output`, behind those that leave its values; "" if none does."""
    made_by = {name: node for node in nodes for name in node.outputs}
    while node := made_by.get(output):
        if node.operator not in TRANSPARENT or not node.inputs:
            return node.operator
        output = node.inputs[0]
    return ""
