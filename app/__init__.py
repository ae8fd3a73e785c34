"""An ONNX Runtime inference server with dynamic batching."""

import os

NAME = "sentiment-inference"
__version__ = "0.1.0"

# Libraries read these once, when they are loaded. Nothing phones home; and tokenizing several texts must not start a
# thread for each of the host's cores, whatever the container's quota.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
