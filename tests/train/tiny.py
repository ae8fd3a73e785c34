"""A backbone with random weights and a corpus of invented sentences, so small that a run takes seconds; and the
commands as processes of their own, which can be killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from tests.process import ROOT
from tests.text_model import BAD, GOOD, VOCABULARY, tokenizer

WAIT_SECONDS = 300
# Of both commands that fit; average_decay, so that the average is not the random start.
RECIPE = {"epochs": 2, "learning_rate": 0.001, "rated_repeats": 1, "average_decay": 0.7, "evaluations": 2}
OPTIONS = tuple(f"--{name.replace('_', '-')}={value}" for name, value in RECIPE.items())


def backbone(folder: Path) -> Path:
    """BERT of two layers, as wide as the int8 file's blocks."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=256,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer(folder / "tokenizer.json")
    return folder


def corpus(folder: Path, rows: int = 160, seed: int = 0) -> Path:
    """The four files, whose sentences have one word of praise or of blame."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)

    def write(name: str, low: float, high: float) -> None:
        lines = ["number\ttext"]
        for index in range(rows):
            word = rng.choice(GOOD if index % 2 else BAD)
            rest = " ".join(rng.choices(["and", "so", "on"], k=4))
            lines.append(f"{high if index % 2 else low}\tit was {word} " + rest)
        (folder / name).write_text("\n".join(lines) + "\n")

    for name in ("sst2-train.tsv", "sst2-dev.tsv"):
        write(name, 0, 1)
    for name in ("tweets-train.tsv", "amazon-train.tsv"):
        write(name, -3, 3)
    return folder


def environment(**more: str) -> dict[str, str]:
    """Of a machine with one processor: several would sum in the same order as well, but share it with other tests."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CODE_REVISION": "tested"} | more


def start(module: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(module: str, *arguments: object, code: int = 0, **more: str) -> str:
    """What it printed. Fails unless it ends with `code`."""
    process = start(module, *arguments, **more)
    output, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == code, output
    return output


def await_step(process: subprocess.Popen[str], checkpoints: Path, step: int) -> None:
    """Until there is a checkpoint of so many steps or more."""
    end = time.monotonic() + WAIT_SECONDS
    while steps_in(checkpoints)[-1:] < [step]:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_in(checkpoints: Path) -> list[int]:
    return sorted(int(path.stem) for path in checkpoints.glob("*.pt"))


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())
