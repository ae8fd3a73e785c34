"""The reference distribution of predictions: what a model answered when it was packaged, to compare later answers with.

model/README.md documents the record, which is `evaluation.reference` of the manifest.
"""

from collections import Counter
from typing import Any, Literal

import numpy as np

from app.artifact.datatypes import Array, Tensors

Origin = Literal["given", "built-in", "generated"]
# More different values than these are no classes.
MAX_VALUES = 1000


def reference(outputs: Tensors, inputs: Origin, rows: int) -> dict[str, Any]:
    """Of each output: `counts` of its values, where they are text, truth values or integers; `deciles` of its finite
    numbers (least, nine between, greatest) where they are floats. Nothing for one without elements."""
    record = {name: _distribution(array) for name, array in outputs.items()}
    return {"inputs": inputs, "rows": rows, "outputs": {name: found for name, found in record.items() if found}}


def _distribution(array: Array) -> dict[str, Any]:
    values = array.ravel()
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)].astype(np.float64)
        if not finite.size:
            return {}
        return {"deciles": [float(f"{value:.6g}") for value in np.quantile(finite, np.linspace(0, 1, 11))]}
    counts = Counter(str(value) for value in values.tolist())
    return {"counts": dict(counts.most_common())} if 0 < len(counts) <= MAX_VALUES else {}
