"""These tests take PyTorch: `make test-train` makes an environment that has it, and `make test` leaves them out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]
