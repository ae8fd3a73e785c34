"""The committed stubs are what `make stubs` makes of the definition, and are of protobuf 6."""

import subprocess
import sys

import pytest

from tests.process import ROOT

PROTO = "app/grpc/protocol/open_inference.proto"


def test_the_stubs_are_of_the_definition(tmp_path):
    pytest.importorskip("grpc_tools")
    recipe = (ROOT / "Makefile").read_text().split("\nstubs:")[1].split("\n\n")[0]
    options = recipe.split("grpc_tools.protoc ")[1].replace("--python_out=.", f"--python_out={tmp_path}")
    options = options.replace("--pyi_out=.", f"--pyi_out={tmp_path}").replace("$(PROTO)", PROTO).split()
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options], cwd=ROOT, check=True)
    for suffix in ("_pb2.py", "_pb2.pyi"):
        name = PROTO.replace(".proto", suffix)
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def test_they_run_on_protobuf_6():
    assert "# Protobuf Python Version: 6." in (ROOT / PROTO.replace(".proto", "_pb2.py")).read_text()
