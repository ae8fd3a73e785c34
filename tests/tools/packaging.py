"""Small text models, Hugging Face's files beside them, and the packaging command run on them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from model.package.command import main
from tests.onnx_models import save, tensor
from tests.unit.runtime.tasks.test_text import word_tokenizer


class Command:
    """`python -m model.package … --name mine --version 3 --out made/artifact`, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], root: Path) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd
        self.made = root / "made" / "artifact"
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        """The exit code; `out` and `err` have what it wrote."""
        command = ["model.package", "--name", "mine", "--version", "3", "--out", self.made, *arguments]
        self._monkeypatch.setattr(sys, "argv", list(map(str, command)))
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        self.out, self.err = self._capfd.readouterr()
        return code

    def refused(self, *arguments: object) -> str:
        """The one line of its error, after which nothing is left behind and nothing temporary was named."""
        assert self(*arguments) == 3, self.out
        assert len(self.err.splitlines()) == 1
        assert ".package-" not in self.err
        assert not self.made.parent.exists() or not list(self.made.parent.iterdir())
        return self.err

    def manifest(self, *arguments: object) -> dict:
        """manifest.json of what it made."""
        assert self(*arguments) == 0, self.err
        return json.loads((self.made / "manifest.json").read_text())


def text_model(
    path: Path, columns: int, *, ends_in: str = "", positions: int = 64, per_token: bool = False, rank: int = 2
) -> Path:
    """int64 input_ids, attention_mask [rows, tokens] → float [rows, columns], of each token if per_token: the sum of
    what tables have for words and for `positions` places; a longer row fails. ends_in: an operator."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"]),
        helper.make_node("Range", ["zero", "length", "one"], ["range"]),
        helper.make_node("Gather", ["places", "range"], ["placed"]),
        helper.make_node("Add", ["words", "placed"], ["tokens"]),
    ]
    last = "tokens"
    if not per_token:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["tokens", "mask3"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
        ]
        last = "summed"
        if rank == 1:
            nodes.append(helper.make_node("Squeeze", ["summed", "middle"], ["squeezed"]))
            last = "squeezed"
    # As an exported linear layer ends, and then perhaps an activation.
    nodes.append(helper.make_node("Add", [last, "bias"], ["linear"]))
    nodes.append(helper.make_node(ends_in, ["linear"], ["scores"]) if ends_in else _identity())
    shape = ["rows", "tokens", columns] if per_token else ["rows", columns][:rank]
    return save(
        path,
        nodes,
        [tensor(name, ["rows", "tokens"], TensorProto.INT64) for name in ("input_ids", "attention_mask")],
        [tensor("scores", shape)],
        table=rng.standard_normal((100, columns), np.float32) * 2,
        places=rng.standard_normal((positions, columns), np.float32) / 10,
        bias=np.array(0.25, np.float32),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
        last=np.array([2], np.int64),
        middle=np.array([1], np.int64),
    )


def _identity() -> object:
    return helper.make_node("Identity", ["linear"], ["scores"])


def folder(
    path: Path, columns: int = 3, *, labels: Sequence[str] = (), config: dict | None = None, **model: object
) -> Path:
    """A folder as Hugging Face's: model.onnx, tokenizer.json, and config.json of a sequence classifier with a window of
    16 tokens and what `config` adds; None there leaves a field out."""
    path.mkdir(exist_ok=True)
    text_model(path / "model.onnx", columns, **model)  # type: ignore[arg-type]
    word_tokenizer(path / "tokenizer.json")
    names = labels or [f"label {index}" for index in range(columns)]
    fields = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(index): name for index, name in enumerate(names)},
        "max_position_embeddings": 16,
        **(config or {}),
    }
    (path / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return path
