"""Finishes a checkpoint for int8: `python -m model.training.quantize --checkpoint DIR --data DIR --out DIR`.

Trains on with the rounding of the int8 file simulated in the forward pass, so that the weights settle where rounding
hurts least (quantisation-aware training; Jacob et al., 2018, arXiv:1712.05877). The activation scales are measured once
before, and stored beside the weights in scales.json, where model.training.export finds them. Exit codes are train's.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertForSequenceClassification

from model.training.corpus import file_digests
from model.training.distributed import Processes, join
from model.training.export import SCALES_FILE, calibrate, calibration_texts, shape_of
from model.training.graph import WEIGHT_LIMIT, Scales
from model.training.job import Built, add_job, carry_out, corpus, exit_codes, options
from model.training.recipe import Recipe, add_recipe, recipe_of
from model.training.record import Run, file_digest, read_record

RECIPE = Recipe(1, 2e-5, 1024, 4, 0.02, 0.995, 0.9, 0.0, 16, 31)
PERCENTILE = 100.0


class RoundedWeight(nn.Module):
    """float [out, in] as the int8 file will hold it; gradients pass the rounding unchanged."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / WEIGHT_LIMIT
        rounded = (weight.detach() / scale).round() * scale
        return weight + (rounded - weight.detach())


def round_input(linear: nn.Linear, scale: float, zero_point: int) -> None:
    """Rounds what `linear` reads to the uint8 steps that the int8 file will use."""

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.fake_quantize_per_tensor_affine(inputs[0].float(), scale, zero_point, 0, 255),)

    linear.register_forward_pre_hook(hook)


def simulate(model: BertForSequenceClassification, scales: Scales) -> None:
    """Puts the int8 file's rounding into `model`'s forward pass."""
    layers = model.bert.encoder.layer
    for index, layer in enumerate(layers):
        source = f"layer{index - 1}.output" if index else "embeddings"
        first = ".first" if index == len(layers) - 1 else ""
        attention = layer.attention
        sites = [(part, source) for part in (attention.self.query, attention.self.key, attention.self.value)]
        sites += [
            (attention.output.dense, f"layer{index}.context{first}"),
            (layer.intermediate.dense, f"layer{index}.attended"),
            (layer.output.dense, f"layer{index}.gelu"),
        ]
        for linear, name in sites:
            round_input(linear, *scales[name])
            parametrize.register_parametrization(linear, "weight", RoundedWeight())


def plain_weights(folder: Path) -> None:
    """Renames parametrised weights in a saved checkpoint back to their Hugging Face names, and drops the rounding."""
    path = folder / "model.safetensors"
    weights = {name.replace("parametrizations.weight.original", "weight"): w for name, w in load_file(path).items()}
    save_file(weights, path)


def quantize(
    data: Path, recipe: Recipe, processes: Processes, *, checkpoint: Path, percentile: float, **job: Any
) -> None:
    """checkpoint: folder written by model.training.train. job: as `carry_out` takes it."""
    parent = {"sha256": file_digest(checkpoint / "model.safetensors"), "run": read_record(checkpoint)}
    numbers = {**asdict(recipe), "percentile": percentile}
    run = Run("model.training.quantize", file_digests(data), numbers, parent, processes.size)
    scales: Scales = {}

    def build() -> Built:
        torch.manual_seed(recipe.seed)
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        weights = load_file(checkpoint / "model.safetensors")
        scales.update(calibrate(weights, tokenizer, calibration_texts(data), percentile, shape_of(checkpoint)))
        model, shadow = (BertForSequenceClassification.from_pretrained(checkpoint) for _ in range(2))
        for each in (model, shadow):
            simulate(each, scales)
        return model, shadow, tokenizer

    def change(folder: Path) -> None:
        plain_weights(folder)
        (folder / SCALES_FILE).write_text(json.dumps(scales))

    carry_out(run, build, data=data, recipe=recipe, processes=processes, change=change, **job)


def main() -> None:
    """Command line of `python -m model.training.quantize`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.training.quantize",
        description=__doc__,
        epilog="example: python -m model.training.quantize --checkpoint base --data DATA --out int8",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder written by model.training.train")
    add_job(parser)
    parser.add_argument("--percentile", type=float, default=PERCENTILE, help="of a row's activations, for the scales")
    add_recipe(parser, RECIPE)
    args = parser.parse_args()
    with exit_codes("model.training.quantize"), join() as processes, corpus(args.data) as data:
        quantize(
            data, recipe_of(args), processes, checkpoint=args.checkpoint, percentile=args.percentile, **options(args)
        )


if __name__ == "__main__":
    main()
