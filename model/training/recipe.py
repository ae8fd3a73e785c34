"""How to fit: the numbers that a run is made with, as options of a command. Knows no model."""

import argparse
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Recipe:
    """`batch_tokens` is of one process, `average_decay` of the weights' moving average per step, `layer_decay` of the
    learning rate per layer, `hidden_tokens` the share of tokens masked in training, `evaluations` how often an
    epoch scores and may keep the average."""

    epochs: int
    learning_rate: float
    batch_tokens: int
    rated_repeats: int
    label_smoothing: float
    average_decay: float
    layer_decay: float
    hidden_tokens: float
    evaluations: int
    seed: int


def add_recipe(parser: argparse.ArgumentParser, defaults: Recipe) -> None:
    """One option for each field of `Recipe`."""
    group = parser.add_argument_group("recipe")
    for field in fields(Recipe):
        value = getattr(defaults, field.name)
        name = f"--{field.name.replace('_', '-')}"
        group.add_argument(name, type=type(value), default=value, help="(default %(default)s)")


def recipe_of(args: argparse.Namespace) -> Recipe:
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
