"""Takes out the ZipMap that converters of scikit-learn, XGBoost and LightGBM put last: it makes a tensor of
probabilities a list of dictionaries, which no tensor protocol carries. The only part of packaging that uses `onnx`."""

from pathlib import Path

from app.errors import ArtifactError
from model.package.graph import read_nodes

ZIPMAP = "ZipMap"


def has_zipmap(model: Path) -> bool:
    """Whether the ONNX file at `model` ends in one."""
    return any(node.operator == ZIPMAP for node in read_nodes(model))


def without_zipmap(model: Path, copy: Path) -> Path:
    """Writes the model with each ZipMap's own input, float [rows, labels], as the output in its place, to `copy`.

    Raises ArtifactError if `onnx` is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ArtifactError(
            f"{model}: its output is a list of dictionaries (ZipMap): convert it again without (skl2onnx: "
            "`options={id(model): {'zipmap': False}}`, onnxmltools for LightGBM: `zipmap=False`), or `pip install "
            "onnx` "
            "and packaging takes it out"
        ) from None
    proto = onnx.load(model)
    graph = proto.graph
    for node in [node for node in graph.node if node.op_type == ZIPMAP]:
        graph.node.remove(node)
        labels = sum(len(attribute.ints) + len(attribute.strings) for attribute in node.attribute)
        for place, output in enumerate(graph.output):
            if output.name == node.output[0]:
                tensor = onnx.helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, [None, labels])
                graph.output[place].CopyFrom(tensor)
    onnx.save(proto, copy)
    return copy
