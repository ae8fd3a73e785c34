"""An ONNX Runtime inference server with dynamic batching."""

__version__ = "0.1.0"
