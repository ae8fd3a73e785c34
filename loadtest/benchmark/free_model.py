"""An artifact whose model costs nothing: a lookup of the first token. What a server with it costs is the web side."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from model.package import GOLDEN_TEXTS, package_text

TOKENS = 1 << 10


def write(folder: Path) -> Path:
    """The artifact's folder, made in `folder`."""
    table = numpy_helper.from_array(np.tile(np.array([[0.1, 0.9]], np.float32), (TOKENS, 1)), "table")
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["input_ids", "first"], ["token"], axis=1),
            helper.make_node("Gather", ["table", "token"], ["probabilities"]),
        ],
        "free",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", "tokens"])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 2])],
        [table, first],
    )
    source = folder / "free.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    artifact = folder / "free"
    artifact.mkdir()
    package_text(
        source,
        folder / "tokenizer.json",
        artifact,
        name="free",
        version="1",
        labels=["negative", "positive"],
        max_tokens=256,
        scores="probabilities",
        tolerance=0.0,
        texts=list(GOLDEN_TEXTS),
    )
    return artifact
