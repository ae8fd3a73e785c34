"""Names of tensor datatypes: Open Inference Protocol ↔ numpy ↔ ONNX Runtime. Knows no bytes on the wire."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.errors import Invalid

Array = NDArray[Any]
Tensors = dict[str, Array]

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]  # fmt: skip

DTYPES: dict[Datatype, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}

# The same under plain strings, for names that come from outside.
DATATYPES: dict[str, np.dtype[Any]] = {str(name): dtype for name, dtype in DTYPES.items()}

_ONNX_NAMES: dict[Datatype, str] = {
    "BOOL": "tensor(bool)",
    "FP16": "tensor(float16)",
    "FP32": "tensor(float)",
    "FP64": "tensor(double)",
    "BYTES": "tensor(string)",
}
ONNX_TYPES: dict[str, Datatype] = {_ONNX_NAMES.get(name, f"tensor({name.lower()})"): name for name in DTYPES}


def datatype_of(array: Array) -> Datatype:
    """Protocol name of an array's dtype; strings of any kind are BYTES. Raises KeyError for others."""
    if array.dtype.kind in "OUS":
        return "BYTES"
    return {dtype: name for name, dtype in DTYPES.items()}[array.dtype]


def decode_strings(array: Array, where: str) -> Array:
    """BYTES elements as str. Raises Invalid if one is not UTF-8."""
    try:
        strings = [item.decode() if isinstance(item, bytes) else item for item in array.ravel()]
    except UnicodeDecodeError:
        raise Invalid(f"{where}: expected UTF-8") from None
    result = np.empty(len(strings), np.object_)
    result[:] = strings
    return result.reshape(array.shape)
