"""Any ONNX model → an artifact folder that passes the gate: `python -m model.package`. Needs only the serving
dependencies, unless a file has to be made or changed first."""

from model.package.artifact import file_entry, write_manifest
from model.package.tensors import package_tensors
from model.package.text import package_text
from model.package.texts import GOLDEN_TEXTS

__all__ = ["GOLDEN_TEXTS", "file_entry", "package_tensors", "package_text", "write_manifest"]
