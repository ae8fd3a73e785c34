"""Takes out the ZipMap that converters of scikit-learn, XGBoost and LightGBM put last: it makes a tensor of
probabilities a list of dictionaries, which no tensor protocol carries. The only part of packaging that uses `onnx`."""

from pathlib import Path

from app.errors import ArtifactError

ZIPMAP = "ZipMap"


def without_zipmap(model: Path, copy: Path) -> Path:
    """Writes the model to `copy`, each ZipMap's output replaced by what it is made of: float [rows, labels], same name.

    Raises ArtifactError if `onnx` is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ArtifactError(
            f"{model}: its output is a list of dictionaries (ZipMap): convert it again without (skl2onnx: "
            "`options={id(model): {'zipmap': False}}`, onnxmltools for LightGBM: `zipmap=False`), or "
            "`pip install onnx` and packaging takes it out"
        ) from None
    proto = onnx.load(model)
    for node in proto.graph.node:
        if node.op_type != ZIPMAP:
            continue
        labels = sum(len(attribute.ints) + len(attribute.strings) for attribute in node.attribute)
        for output in proto.graph.output:
            if output.name == node.output[0]:
                tensor = onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, [None, labels])
                output.CopyFrom(tensor)
        node.CopyFrom(onnx.helper.make_node("Identity", node.input, node.output))
    onnx.save(proto, copy)
    return copy
