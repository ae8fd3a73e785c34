"""Finishes a checkpoint for int8: `python -m model.training.quantize --checkpoint DIR --data DIR --out DIR`.

Trains on with the rounding of the int8 file simulated in the forward pass, so that the weights settle where rounding
hurts least (quantisation-aware training; Jacob et al., 2018, arXiv:1712.05877). The activation scales are measured once
before, and stored beside the weights in scales.json, where model.training.export finds them.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertForSequenceClassification

from model.training.export import SCALES_FILE, calibrate, calibration_texts
from model.training.graph import WEIGHT_LIMIT, Scales
from model.training.train import Recipe, add_recipe, fit, recipe_of, seed_everything


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
    from safetensors.numpy import save_file

    path = folder / "model.safetensors"
    weights = {name.replace("parametrizations.weight.original", "weight"): w for name, w in load_file(path).items()}
    save_file(weights, path)


def main() -> None:
    """Command line of `python -m model.training.quantize`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.training.quantize",
        description=__doc__,
        epilog="example: python -m model.training.quantize --checkpoint base/best --data DATA --out int8",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder written by model.training.train")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--percentile", type=float, default=100.0, help="of a row's activations, for the scales")
    add_recipe(parser, Recipe(1, 2e-5, 1024, 4, 0.02, 0.995, 0.9, 0.0, 16, 31))
    args = parser.parse_args()
    recipe = recipe_of(args)
    seed_everything(recipe.seed)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    weights = load_file(args.checkpoint / "model.safetensors")
    scales = calibrate(weights, tokenizer, calibration_texts(args.data), args.percentile)
    model, shadow = (BertForSequenceClassification.from_pretrained(args.checkpoint) for _ in range(2))
    for each in (model, shadow):
        simulate(each, scales)
    fit(model, shadow, tokenizer, args.data, args.out, recipe)
    plain_weights(args.out / "best")
    (args.out / "best" / SCALES_FILE).write_text(json.dumps(scales))


if __name__ == "__main__":
    main()
